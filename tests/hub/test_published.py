"""Models that pico-train and relora-pico have published, imported: they compute the same, or are refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lab
from config import ModelConfig, ReLoRAConfig
from fake_hub import Hub
from hub.llama import byte_tokenizer_json, load_decoder
from hub.published import load_published
from model import PicoDecoder
from relora import apply_relora


def published(folder, model, cfg, kind):
    """A folder as pico-train (pico_decoder) or relora-pico (pico_relora_decoder) publish it."""
    folder.mkdir()
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in ((".lora_A", ".A_lora.weight"), (".lora_B", ".B_lora.weight"), (".scaling", ".s")):
            name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
        renamed[f"pico_decoder.{name}"] = tensor.clone()
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(cfg), "model_type": kind, "auto_map": {}}))
    return folder


@pytest.mark.parametrize("options", [None, {}, {"trainable_scaling": True}], ids=["full-rank", "relora", "scaled"])
def test_a_published_model_computes_the_same_after_import(tmp_path, options):
    torch.manual_seed(0)
    relora = None if options is None else ReLoRAConfig(["attention", "swiglu"], 100, r=4, lora_alpha=6, lora_dropout=0.0,
                                                      **options)
    cfg = ModelConfig(d_model=32, n_layers=2, vocab_size=300, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                      activation_hidden_dim=64, relora=relora)
    model = PicoDecoder(cfg)
    if relora:
        apply_relora(model, relora)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * 0.1 if "lora_B" in name or "scaling" in name else 0)
    folder = published(tmp_path / "theirs", model, cfg, "pico_relora_decoder" if relora else "pico_decoder")
    printed = lab.call("export.py", "import", folder, tmp_path / "ours", code=2)
    assert "--tokenizer" in printed and not (tmp_path / "ours").exists()
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    lab.call("export.py", "import", folder, tmp_path / "ours", "--tokenizer", tmp_path / "tokenizer.json")
    ids = torch.randint(300, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path / "ours")(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spoil, message", [
    (lambda t, c: t.pop("pico_decoder.layers.0.swiglu.w_1.B_lora.weight"), "layers.0.swiglu.w_1.lora_B is missing"),
    (lambda t, c: t.pop("pico_decoder.layers.0.swiglu.w_1.A_lora.weight"), "layers.0.swiglu.w_1.lora_A is missing"),
    (lambda t, c: t.pop("pico_decoder.layers.0.attention.v_proj.weight"), "layers.0.attention.v_proj.weight is missing"),
    (lambda t, c: c["relora"].update(trainable_scaling=True), "scaling is missing"),
    (lambda t, c: c["relora"].update(r=8), "lora_A is (4, 32), not (8, 32)"),
    (lambda t, c: c.update(relora=None), "lora_A is unexpected"), (lambda t, c: c.update(relora="abc"), "config.json"),
    (lambda t, c: c.pop("n_layers"), "n_layers missing"), (lambda t, c: c.update(model_type="gpt2"), "gpt2")],
    ids="B A weight scaling rank no-relora relora-text n_layers type".split())
def test_a_published_model_that_does_not_fit_its_config_is_refused(tmp_path, spoil, message):
    relora = ReLoRAConfig(["attention", "swiglu"], 100, r=4, lora_alpha=6)
    cfg = ModelConfig(d_model=32, n_layers=1, vocab_size=64, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                      activation_hidden_dim=64, relora=relora)
    model = PicoDecoder(cfg)
    apply_relora(model, relora)
    folder = published(tmp_path / "theirs", model, cfg, "pico_relora_decoder")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    printed = lab.call("export.py", "import", folder, tmp_path / "ours", code=2)
    assert message in printed and "Traceback" not in printed and not (tmp_path / "ours").exists()


# ---- what relora-pico trains and saves, and this lab would not train -----------------------------------------------------

SMALL = ModelConfig(d_model=32, n_layers=2, vocab_size=64, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                    activation_hidden_dim=48)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "w_0", "w_1", "w_2", "de_embedding_proj")
RELORA = {"reset_frequency": 100, "r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "keep_original_weights": True, "lora_only": False,
          "trainable_scaling": False}


def by_its_formula(folder, kind, prefix, **relora):
    """(the decoder that a folder's tensors make by relora-pico's formula, the folder as it saves them)."""
    relora = RELORA | relora
    plain, saved = PicoDecoder(SMALL).eval(), {}
    targets = [target.lower() for target in relora["target_modules"]]
    for name, weight in plain.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.split(".")[-1] in LINEAR and any(target in layer for target in targets):
            A, B = torch.randn(4, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 4) * 0.1
            s = torch.rand(1) if relora["trainable_scaling"] else None
            saved |= {f"{layer}.A_lora.weight": A, f"{layer}.B_lora.weight": B, name: weight.clone()}
            saved |= {} if s is None else {f"{layer}.s": s}
            update = (B.double() @ A.double()) * (6 / 4 if s is None else s.double().tanh())
            weight.copy_(update if relora["lora_only"] else weight.double() + update)
        else:
            saved[name] = weight.clone()
    folder.mkdir()
    save_file({prefix + name: tensor for name, tensor in saved.items()}, folder / "model.safetensors")
    config = dataclasses.asdict(SMALL) | {"model_type": kind, "relora": relora, "auto_map": {"AutoModel": "x.py"}}
    del config["fast_paths"]
    (folder / "config.json").write_text(json.dumps(config))
    return plain, folder


@pytest.mark.parametrize("relora, adapted", [
    ({"target_modules": ["attention", "swiglu"], "lora_only": True, "keep_original_weights": False}, 14),
    ({"target_modules": ["Attention", "SwiGLU"]}, 14), ({"target_modules": ["proj"]}, 9),
    ({"target_modules": ["de_embedding"]}, 1), ({"target_modules": ["V_PROJ"], "trainable_scaling": True}, 2),
    ({"target_modules": ["proj"], "lora_only": True, "keep_original_weights": False, "trainable_scaling": True}, 9)], ids=str)
@pytest.mark.parametrize("kind, prefix", [("pico_relora_decoder", "pico_decoder."), ("relora-pico", "pico."),
                                          ("relora-pico", "")])
def test_everything_that_relora_pico_saves_is_imported(tmp_path, said, kind, prefix, relora, adapted):
    expected, folder = by_its_formula(tmp_path / "theirs", kind, prefix, **relora)
    assert len([name for name in load_file(folder / "model.safetensors") if name.endswith("A_lora.weight")]) == adapted
    cfg, state = load_published(folder)
    assert cfg == SMALL and state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert said == ([f"{folder}: {adapted} weights of layers that are lora_only are left out; nothing reads them"]
                    if relora.get("lora_only") else [])


@pytest.mark.parametrize("change, message", [
    (lambda t, c: t.update({"other.output_norm.weight": torch.ones(32)}), "output_norm.weight twice"),
    (lambda t, c: c["relora"].update(use_rslora=True), "model.relora.use_rslora: unknown key"),
    (lambda t, c: c.pop("position_emb_theta"), "position_emb_theta missing"),
    (lambda t, c: c["relora"].update(target_modules=["w_0"]), "is unexpected"),
    (lambda t, c: c["relora"].update(target_modules=["attention", "swiglu", "proj"]), "de_embedding_proj.lora_A is missing"),
    (lambda t, c: c.update(n_layers=10_000), "10000 layers"), (lambda t, c: t.update(
        {"pico_decoder.output_norm.weight": torch.ones(32, dtype=torch.int8)}), "int8")],
    ids="twice key theta fewer more layers int8".split())
def test_what_is_not_as_its_config_says_is_refused(tmp_path, change, message):
    _, folder = by_its_formula(tmp_path / "theirs", "pico_relora_decoder", "pico_decoder.",
                               target_modules=["attention", "swiglu"])
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    printed = lab.call("export.py", "import", folder, tmp_path / "ours", code=2)
    assert message in printed and len(printed.splitlines()) == 1 and not (tmp_path / "ours").exists()


# ---- the tokenizer, and from the Hub ----------------------------------------------------------------------------------

def test_a_tokenizer_is_the_one_that_is_named_or_nothing(tmp_path):
    model = PicoDecoder(SMALL)
    folder = published(tmp_path / "theirs", model, SMALL, "pico_decoder")
    for name in ("other.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps(byte_tokenizer_json()))
    printed = lab.call("export.py", "import", folder, tmp_path / "a", "--tokenizer", tmp_path / "other.json", code=2)
    assert "other.json is neither a tokenizer.json nor a folder that has one" in printed
    assert "no tokenizer.json" in lab.call("export.py", "import", folder, tmp_path / "a", "--tokenizer", folder, code=2)
    printed = lab.call("export.py", "import", folder, tmp_path / "b", "--tokenizer", tmp_path)
    assert "its tokenizer has 257 ids, and the model knows 64" in printed
    assert "its ids are taken for bytes" in lab.call("export.py", "import", folder, tmp_path / "c")


def test_a_model_is_imported_from_the_hub(tmp_path):
    cfg = ModelConfig(d_model=32, n_layers=1, vocab_size=64, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                      activation_hidden_dim=64)
    model = PicoDecoder(cfg).eval()
    folder = published(tmp_path / "theirs", model, cfg, "pico_decoder")
    with Hub() as hub:
        hub.repos["models/lab/theirs"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        lab.forked("export.py", "import", "lab/theirs", tmp_path / "ours", env=hub.env(tmp_path / "hf"))
        printed = lab.forked("export.py", "import", "lab/none", tmp_path / "none", env=hub.env(tmp_path / "hf"), code=2)
    assert "lab/none" in printed and "Traceback" not in printed and not (tmp_path / "none").exists()
    ids = torch.randint(64, (2, 16))
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path / "ours")(ids), model(ids))


def test_what_is_missing_from_a_published_model_is_listed(tmp_path):
    cfg = ModelConfig(d_model=32, n_layers=1, vocab_size=64, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                      activation_hidden_dim=64)
    model = PicoDecoder(cfg)
    del model.layers[0].swiglu.w_1
    folder = published(tmp_path / "theirs", model, cfg, "pico_decoder")
    printed = lab.call("export.py", "import", folder, tmp_path / "ours", code=2)
    assert "layers.0.swiglu.w_1.weight is missing" in printed and not (tmp_path / "ours").exists()


def test_of_a_model_on_the_hub_one_kind_of_weights_is_fetched(tmp_path):
    model = PicoDecoder(SMALL).eval()
    folder = published(tmp_path / "theirs", model, SMALL, "pico_decoder")
    torch.save({f"pico_decoder.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Hub() as hub:
        hub.repos |= {"models/lab/both": files,
                      "models/lab/old": {name: data for name, data in files.items() if name != "model.safetensors"}}
        for name in ("both", "old"):
            lab.forked("export.py", "import", f"lab/{name}", tmp_path / name, env=hub.env(tmp_path / "hf"))
        assert len(hub.fetched("pytorch_model.bin")) == len(hub.fetched("model.safetensors")) == 1
    for name in ("both", "old"):
        assert torch.equal(load_decoder(tmp_path / name).output_norm.weight, model.output_norm.weight)
