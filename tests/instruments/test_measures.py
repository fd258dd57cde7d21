"""Measures against closed forms and values worked out by hand."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from instruments import measures, similarity
from instruments.measures import Undefined, condition_number, effective_rank, gini, hoyer, of_matrix, singular_values
from instruments.similarity import Examples, Pair

SMALL = torch.tensor([[3.0, 0.0], [4.0, 5.0]])  # singular values sqrt 45 and sqrt 5
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [2.0, 2.0], [-2.0, -2.0]])


def of_two(measure):
    return lambda x, y: measure(Pair(Examples(x), Examples(y)))


cka, cka_of_chance, cka_debiased, pwcca = (of_two(getattr(similarity, name)) for name in (
    "cka", "cka_of_chance", "cka_debiased", "pwcca"))


def values_of(matrix, *args, **options):
    return {name: value for name, (value, _) in of_matrix(matrix, *args, **options).items()}


def test_only_what_is_asked_for_is_measured(monkeypatch):
    monkeypatch.setitem(measures.SINGLE, "gini", measures.Measure(lambda m: pytest.fail("it was not asked for"), "Gini"))
    assert list(of_matrix(torch.eye(3), metrics=["per", "norm_inf"])) == ["per", "norm_inf"]


def with_spectrum(values, rows, columns, seed=0):
    made = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=made, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=made, dtype=torch.float64))[0]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


def test_the_identity():
    found = values_of(torch.eye(7))
    assert found["effective_rank"] == pytest.approx(7) and found["per"] == pytest.approx(1)
    assert found["numerical_rank"] == 7 and found["condition_number"] == pytest.approx(1)
    assert found["stable_rank"] == found["participation_ratio"] == pytest.approx(7)
    assert found["norm_frobenius"] == pytest.approx(math.sqrt(7)) and found["norm_nuclear"] == pytest.approx(7)
    assert found["norm_spectral"] == pytest.approx(1) and found["norm_inf"] == 1
    assert found["gini"] == pytest.approx(1 - 1 / 7)  # 7 of 49 entries hold all, equally
    assert found["hoyer"] == pytest.approx((7 - math.sqrt(7)) / 6)


def test_rank_one_is_one_and_well_conditioned_on_its_non_zero_part():
    found = values_of(torch.outer(torch.arange(1.0, 6), torch.arange(2.0, 10)))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-5) and found["numerical_rank"] == 1
    assert found["condition_number"] == pytest.approx(1) and found["per"] == pytest.approx(1 / 5, abs=1e-5)


@pytest.mark.parametrize("spectrum", [[1.0, 1.0, 1.0, 1.0], [8.0, 4.0, 2.0, 1.0], [10.0, 1e-2, 1e-3]])
def test_a_known_spectrum(spectrum):
    p = [s / sum(spectrum) for s in spectrum]
    found = values_of(with_spectrum(spectrum, 9, 12))
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-6)
    assert found["per"] == pytest.approx(found["effective_rank"] / 9) and found["numerical_rank"] == len(spectrum)
    assert found["condition_number"] == pytest.approx(spectrum[0] / spectrum[-1], rel=1e-6)
    squares = [s * s for s in spectrum]
    assert found["stable_rank"] == pytest.approx(sum(squares) / max(squares), rel=1e-6)
    assert found["participation_ratio"] == pytest.approx(sum(squares) ** 2 / sum(q * q for q in squares), rel=1e-6)


def test_values_by_hand_on_a_small_matrix():
    values = singular_values(SMALL)
    assert values.tolist() == pytest.approx([math.sqrt(45), math.sqrt(5)])
    assert condition_number(values, (2, 2)) == pytest.approx(3)
    p = 0.75  # sqrt 45 / (sqrt 45 + sqrt 5) = 3 / 4
    assert effective_rank(values) == pytest.approx(math.exp(-p * math.log(p) - 0.25 * math.log(0.25)))
    assert gini(SMALL) == pytest.approx(2 * (2 * 3 + 3 * 4 + 4 * 5) / (4 * 12) - 5 / 4)
    assert hoyer(SMALL) == pytest.approx(2 - 12 / math.sqrt(50))


def test_cka_and_pwcca_by_hand():
    y = X[:, :1]
    # X'X = [[10, 8], [8, 10]], Y'Y = 10, X'Y = (10, 8): 164 / (sqrt 328 * 10)
    assert cka(X, y) == pytest.approx(164 / (math.sqrt(328) * 10))
    assert pwcca(y, X) == pytest.approx(1)  # all of y lies in the span of X
    independent = torch.tensor([[1.0], [1.0], [1.0], [1.0], [-2.0], [-2.0]])  # orthogonal to both columns of X
    assert cka(X, independent) == pytest.approx(0, abs=1e-12) and pwcca(X, independent) == pytest.approx(0, abs=1e-6)


def hsic_of_quadruples(x, y):
    """The unbiased estimate as its definition has it: the mean over all ordered quadruples of distinct examples."""
    K, L = (x @ x.T).tolist(), (y @ y.T).tolist()
    found = [K[i][j] * (L[i][j] + L[q][r] - 2 * L[i][q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("n, p, q", [(7, 3, 2), (6, 9, 8), (5, 1, 7)])
def test_debiased_cka_is_the_u_statistic(n, p, q):
    made = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, size, generator=made, dtype=torch.float64) + 3 for size in (p, q))
    xy, xx, yy = (hsic_of_quadruples(*pair) for pair in ((x, y), (x, x), (y, y)))
    assert cka_debiased(x, y) == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-9)
    assert cka_debiased(x, -2 * x + 1) == pytest.approx(1)


def test_what_cka_gives_by_chance_is_its_mean_over_all_pairings():
    made = torch.Generator().manual_seed(3)
    x, y = (torch.randn(6, size, generator=made, dtype=torch.float64) for size in (4, 7))
    found = [cka(x, y[list(order)]) for order in itertools.permutations(range(6))]
    assert cka_of_chance(x, y) == pytest.approx(sum(found) / len(found), rel=1e-9)


def test_noise_is_alike_to_plain_cka_and_not_to_the_debiased_one():
    """16 examples of 512 dimensions: 0.97 by plain CKA, as is said beside it; 0 without the bias."""
    made = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 16, 512, generator=made) for _ in range(40)]
    plain, chance, debiased = (torch.tensor([measure(*pair) for pair in pairs]) for measure in (cka, cka_of_chance, cka_debiased))
    assert plain.mean() > 0.96 and (plain - chance).abs().max() < 0.01
    assert debiased.mean().abs() < 3 * debiased.std() / math.sqrt(40) and debiased.std() < 0.1 and (debiased < 0).any()
    with pytest.raises(Undefined, match="3 examples are too few"):
        cka_debiased(X[:3], X[:3])


def test_pwcca_weighs_each_correlation_by_its_share_of_x():
    basis = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    x = basis[:, :2] @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    y = torch.stack([basis[:, 0], 0.6 * basis[:, 1] + 0.8 * basis[:, 2]], 1)  # correlations 1 and 0.6
    assert pwcca(x, y) == pytest.approx((3 * 1 + 1 * 0.6) / 4)


@pytest.mark.parametrize("measure", [cka, cka_debiased, pwcca])
def test_rotation_scale_and_shift_change_nothing_and_permuted_examples_much(measure):
    made = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=made, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(6, 6, generator=made, dtype=torch.float64))[0]
    assert measure(x, 3 * x @ q + 5) == pytest.approx(1)
    assert measure(x, x[torch.randperm(200, generator=made)]) < 0.3


@pytest.mark.parametrize("matrix", [torch.zeros(3, 4), torch.zeros(2, 2)])
def test_what_is_undefined_says_so(matrix):
    found = values_of(matrix)
    assert found["effective_rank"] is found["condition_number"] is found["gini"] is found["hoyer"] is None
    undefined = {name for name, value in found.items() if value is None}
    assert undefined == {"effective_rank", "per", "condition_number", "condition_number_all", "stable_rank",
                         "participation_ratio", "gini", "hoyer"}
    assert found["numerical_rank"] == 0 and found["norm_nuclear"] == 0


def test_too_few_examples_are_undefined():
    with pytest.raises(Undefined, match="5 examples are too few"):
        pwcca(torch.randn(5, 8), torch.randn(5, 8))
    for measure in (cka, cka_debiased, cka_of_chance):
        with pytest.raises(Undefined, match="same for every example"):
            measure(torch.ones(9, 3), torch.randn(9, 3))


def test_independent_noise_is_never_called_alike_by_construction():
    """60 + 60 dimensions of 100 examples share 21 whatever they hold; 20 + 20 of 100 need share none."""
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 100, 60, generator=made, dtype=torch.float64)
    with pytest.raises(Undefined, match="100 examples are too few for ranks 60 and 60"):
        pwcca(x, y)
    assert pwcca(x[:, :20], y[:, :20]) < 0.6


def test_the_condition_number_of_all_counts_rounding_and_the_other_does_not():
    made = torch.Generator().manual_seed(0)
    low_rank = torch.randn(20, 3, generator=made) @ torch.randn(3, 30, generator=made)
    found = values_of(low_rank)
    s = np.linalg.svd(low_rank.double().numpy(), compute_uv=False)
    assert found["condition_number"] == pytest.approx(s[0] / s[2]) and found["condition_number"] < 10
    assert found["condition_number_all"] == pytest.approx(s[0] / s[-1], rel=1e-6) and found["condition_number_all"] > 1e6
    assert values_of(SMALL)["condition_number_all"] == pytest.approx(3)
    value, why = of_matrix(torch.diag(torch.tensor([1.0, 0.0])))["condition_number_all"]
    assert value is None and why == "a singular value is zero"


def test_overlap_of_updates_whose_angles_are_known():
    """Columns e1, e2 beside e1 and e2 turned by 60 degrees towards e3; rows e1, e2 beside e3, e4."""
    e = torch.eye(6)
    turned = math.cos(math.pi / 3) * e[1] + math.sin(math.pi / 3) * e[2]
    now = torch.stack([3 * e[0], e[1]], 1), e[:2]
    before = torch.stack([e[0] + turned, 5 * turned], 1), e[2:4]
    found = {name: value for name, (value, _) in similarity.of_updates(now, before).items()}
    assert found == {"overlap_out": pytest.approx((1 + 0.25) / 2), "overlap_in": pytest.approx(0, abs=1e-15)}
    within = similarity.of_updates((e[:, :3], torch.randn(3, 9)), (e[:, 1:2], torch.randn(1, 9)))
    assert within["overlap_out"][0] == pytest.approx(1), "one within the other"
    zero = similarity.of_updates((torch.zeros(6, 2), e[:2]), before)
    assert set(zero.values()) == {(None, "the update is zero")}
    assert set(similarity.of_updates(now, (e[:, :2] * math.nan, e[:2])).values()) == {(None, "the update is not finite")}


def test_overlap_is_the_mean_squared_cosine_of_the_angles_and_that_of_chance_is_known():
    made = torch.Generator().manual_seed(0)
    found = []
    for _ in range(50):
        now, before = ((torch.randn(40, r, generator=made), torch.randn(r, 30, generator=made)) for r in (4, 6))
        value = similarity.of_updates(now, before)["overlap_out"][0]
        found.append(value)
        spans = [np.linalg.qr(factors[0].double().numpy())[0] for factors in (now, before)]
        assert value == pytest.approx(np.mean(np.linalg.svd(spans[0].T @ spans[1], compute_uv=False) ** 2), rel=1e-9)
    assert np.mean(found) == pytest.approx(6 / 40, abs=4 * np.std(found) / 50 ** 0.5)


def test_a_product_has_the_singular_values_of_its_entries():
    left, right = torch.randn(3, 9, 4), torch.randn(3, 4, 7)
    expected = np.linalg.svd(left.double().numpy() @ right.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(measures.singular_values_of_product(left, right).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
def test_singular_values_hold_to_rounding_of_the_largest(shape, condition):
    """Against mpmath with 60 digits: a value of 1e-6 of the largest to 1e-9 of itself, one of 1e-9 to 1e-6, and so on."""
    made = torch.Generator().manual_seed(0)
    size = min(shape)
    matrix = torch.randn(shape[0], size, generator=made, dtype=torch.float64) * torch.logspace(0, -math.log10(condition), size,
                                                                                              dtype=torch.float64)
    matrix = matrix @ torch.linalg.qr(torch.randn(shape[1], size, generator=made, dtype=torch.float64))[0].T
    with mpmath.workdps(60):
        exact = [float(v) for v in mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)]
    assert exact[0] / exact[-1] > condition / 10
    np.testing.assert_allclose(singular_values(matrix).numpy(), exact, rtol=0, atol=4e-15 * exact[0])
    batch = singular_values(torch.stack([matrix, 2 * matrix]))
    np.testing.assert_allclose(batch.numpy(), [exact, [2 * v for v in exact]], rtol=0, atol=8e-15 * exact[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_gini_by_its_definition(dtype):
    """The mean difference of all pairs over twice the mean, in NumPy's float64."""
    x = torch.randn(7, 11).to(dtype)
    sizes = np.abs(x.double().numpy().ravel())
    assert gini(x) == pytest.approx(np.abs(sizes[:, None] - sizes).mean() / (2 * sizes.mean()), rel=1e-12)


def test_what_rounding_leaves_of_two_weights_is_no_rank():
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=made)
    update = 1e-4 * torch.randn(128, 3, generator=made) @ torch.randn(3, 256, generator=made) / 128
    difference = (weight + update) - weight
    noise = 2 * measures.EPSILON * weight.norm().item()
    assert values_of(difference)["numerical_rank"] == 128
    assert values_of(difference, noise=noise)["numerical_rank"] == 3


@pytest.mark.parametrize("n, p, rank, condition", [(40, 60, 9, 1), (60, 40, 9, 1), (90, 40, 40, 1e2), (40, 60, 9, 1e4),
                                                   (90, 40, 40, 1e4), (40, 60, 9, 1e9), (90, 40, 20, 1e9)])
def test_bases_by_gram_matrices_span_what_the_svd_does(n, p, rank, condition):
    """Well-conditioned ones; others are left to the SVD, where with condition 1e9 some of them are rounding, and are cut off."""
    made = torch.Generator().manual_seed(rank)
    values = np.logspace(0, -math.log10(condition), rank)
    x = with_spectrum(values.tolist(), n, p, seed=rank)
    x = x - x.mean(0) + torch.randn(p, generator=made)
    for given in (x, x.float()):
        basis = Examples(given).basis.numpy()
        u, s, _ = np.linalg.svd(given.double().numpy() - given.double().numpy().mean(0), full_matrices=False)
        expected = u[:, s > max(n, p) * measures.EPSILON * s[0]]
        assert basis.shape == expected.shape
        np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-9)
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)


def test_low_rank_features_need_only_as_many_examples_as_their_rank():
    x = torch.randn(30, 2, dtype=torch.float64) @ torch.randn(2, 50, dtype=torch.float64)
    assert pwcca(x, 2 * x) == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_undefined_and_spoils_nothing_beside_it(bad):
    spoilt = torch.eye(3)
    spoilt[1, 2] = bad
    values = singular_values(torch.stack([spoilt, torch.eye(3)]))
    assert set(of_matrix(spoilt, values[0]).values()) == {(None, "the matrix is not finite")}
    assert values[1].tolist() == [1, 1, 1]
    for pair in (cka, pwcca):
        with pytest.raises(Undefined, match="not finite"):
            pair(X, torch.where(X == 2, bad, X))
