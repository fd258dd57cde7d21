"""The configuration: FACTS.md's keys and defaults, strict reading of files and overrides, and errors of one line."""

import copy
import functools
import re
import subprocess
import sys
import time

import lab
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError, config_from_dict, load_config, to_dict

RELORA = {"target_modules": ["attention"], "reset_frequency": 10}
JAGGED = ["training.optimization.lr_scheduler=relora_jagged_cosine", "training.optimization.min_lr_ratio=0.1",
          "training.optimization.restart_warmup_steps=2"]

DEFAULTS = {  # of the seed; our one change is fabric_checkpoint_dir, and null for keep_original_weights means true
    "data.dataset.name": "pico-lm/pretokenized-dolma", "data.dataloader.batch_size": 1024,
    "data.tokenizer.name": "allenai/OLMo-7B-0724-hf", "data.tokenizer.vocab_size": 50304,
    "model.model_type": "pico_decoder", "model.d_model": 768, "model.n_layers": 12, "model.vocab_size": 50304,
    "model.batch_size": 1024, "model.max_seq_len": 2048, "model.attention_n_heads": 12,
    "model.attention_n_kv_heads": 4, "model.activation_hidden_dim": 3072, "model.norm_eps": 1e-6,
    "model.position_emb_theta": 10000.0, "model.relora": None,
    "training.max_steps": 200000, "training.fabric.num_nodes": 1, "training.fabric.num_devices": 1,
    "training.fabric.precision": "bf16-mixed", "training.fabric.accelerator": "cuda",
    "training.optimization.optimizer": "adamw", "training.optimization.lr": 3e-4,
    "training.optimization.lr_scheduler": "linear_with_warmup", "training.optimization.lr_warmup_steps": 2500,
    "training.optimization.restart_warmup_steps": 0, "training.optimization.min_lr_ratio": 0.0,
    "training.optimization.gradient_accumulation_steps": 128, "training.optimization.weight_decay": 0.01,
    "training.optimization.betas": [0.9, 0.999], "training.grad_clip": None, "training.seed": 42,
    "evaluation.metrics": ["paloma"], "evaluation.paloma.dataset_name": "pico-lm/pretokenized-paloma-tinsy",
    "evaluation.paloma.dataset_split": "val", "evaluation.paloma.max_length": 2048,
    "evaluation.paloma.batch_size": 16, "evaluation.blimp.metric_uids": ["*"], "evaluation.blimp.batch_size": 16,
    "evaluation.blimp.samples_per_set": None,
    "monitoring.logging.log_level": "INFO", "monitoring.logging.log_every_n_steps": 100,
    "monitoring.save_to_wandb": False, "monitoring.wandb.project": "", "monitoring.wandb.entity": "",
    "checkpointing.run_name": None, "checkpointing.runs_dir": "runs", "checkpointing.checkpoints_dir": "checkpoints",
    "checkpointing.logs_dir": "logs", "checkpointing.fabric_checkpoint_dir": "training_state",
    "checkpointing.fabric_checkpoint_filename": "checkpoint.pt",
    "checkpointing.learning_dynamics_dir": "learning_dynamics", "checkpointing.save_every_n_steps": 1000,
    "checkpointing.save_to_hf": False, "checkpointing.hf_checkpoint.repo_id": "",
    "checkpointing.hf_checkpoint.collection_slug": None, "checkpointing.training.auto_resume": True,
    "checkpointing.evaluation.eval_results_dir": "eval_results",
    "checkpointing.learning_dynamics.layer_suffixes": ["attention.v_proj", "attention.o_proj", "swiglu.w_2"],
    "checkpointing.learning_dynamics.sequence_idx": -1, "checkpointing.learning_dynamics.batch_size": 8,
    "checkpointing.learning_dynamics.eval_data": "pico-lm/pretokenized-paloma-tinsy",
}
RELORA_DEFAULTS = {"r": 128, "lora_alpha": 32, "lora_dropout": 0.1, "keep_original_weights": None, "lora_only": False,
                   "trainable_scaling": False, "warm_start_steps": 0, "reference_faults": []}


def value_of(cfg, key):
    return functools.reduce(getattr, key.split("."), cfg)


def refusal(*overrides, tree=None):
    """The message with which these overrides are refused: always one line."""
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree or {}, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- defaults and presets ------------------------------------------------------------------------------------

@pytest.mark.parametrize("section, defaults", [("", DEFAULTS), ("model.relora.", RELORA_DEFAULTS)])
def test_every_default_is_the_one_in_the_facts(section, defaults):
    cfg = config_from_dict({"model": {"relora": RELORA}} if section else {})
    assert {key: repr(value_of(cfg, section + key)) for key in defaults} == {k: repr(v) for k, v in defaults.items()}


@pytest.mark.parametrize("extra, kept", [({}, True), ({"keep_original_weights": False}, False),
                                         ({"lora_only": True}, False), ({"keep_original_weights": True}, True)])
def test_original_weights_are_kept_unless_lora_only_or_told_otherwise(extra, kept):
    assert config_from_dict({"model": {"relora": RELORA | extra}}).model.relora.has_initial_weights is kept


@pytest.mark.parametrize("path", sorted(lab.ROOT.glob("config/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_the_round_trip_through_yaml(path):
    cfg = load_config(path)
    assert config_from_dict(to_dict(cfg)) == cfg
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(to_dict(cfg)))) == cfg


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == config_from_dict({})


# ---- overrides -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word, value", [
    ("training.optimization.lr=3e-4", 3e-4), ("training.optimization.lr='1e-2'", 1e-2),
    ("training.max_steps=1e3", 1000), ("training.max_steps=7", 7), ("training.grad_clip=1", 1.0),
    ("training.grad_clip=null", None),
    ("monitoring.save_to_wandb=true", True), ("checkpointing.run_name=a-b", "a-b"), ("checkpointing.run_name='7'", "7"),
    ("evaluation.metrics=[val, blimp]", ["val", "blimp"]), ("evaluation.metrics=null", None),
    ("training.optimization.betas=[0, 9e-1]", [0.0, 0.9]), ("checkpointing.learning_dynamics=null", None)])
def test_an_override_has_the_type_of_its_key(word, value):
    found = value_of(config_from_dict({}, [word]), word.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


def test_overrides_create_sections_win_over_the_file_and_leave_it_as_it_was():
    tree = {"training": {"max_steps": 5, "optimization": {"lr": 1.0}}}
    before = copy.deepcopy(tree)
    cfg = config_from_dict(tree, ["model.relora.target_modules=[swiglu]", "model.relora.reset_frequency=9",
                                  "training.optimization.lr=3"])
    assert cfg.model.relora.target_modules == ["swiglu"] and cfg.model.relora.reset_frequency == 9
    assert cfg.training.optimization.lr == 3 and cfg.training.max_steps == 5
    assert tree == before


def test_an_override_nulls_a_section():
    assert config_from_dict({"model": {"relora": RELORA}}, ["model.relora=null"]).model.relora is None


def test_an_override_given_twice_is_refused_unless_it_says_the_same():
    assert "training.seed: is given twice, as '1' and as '2'" in refusal("training.seed=1", "training.seed=2")
    assert config_from_dict({}, ["training.seed=1", "training.seed=1"]).training.seed == 1


@pytest.mark.parametrize("name", ["2026-11-25", "2026-13-45", "1_1_1", "1e5", "on", "off", "12.30", "0x1F", "exp #2", "5",
                                  "~x", "no"])
def test_a_name_is_a_name_whatever_yaml_takes_it_for(tmp_path, name):
    assert config_from_dict({}, [f"checkpointing.run_name={name}"]).checkpointing.run_name == name
    path = tmp_path / "config.yaml"
    path.write_text(f"checkpointing:\n  run_name: {name}\n")  # in a file, a # begins a comment
    assert load_config(path).checkpointing.run_name == name.partition(" #")[0]


@pytest.mark.parametrize("text, key", [
    ("training: {seed: 1}\nmodel: {n_layers: 2}\ntraining: {max_steps: 5}", "'training' is written twice, on lines 1 and 3"),
    ("model:\n  n_layers: 2\n  d_model: 96\n  n_layers: 2", "'n_layers' is written twice, on lines 2 and 4"),
    ("evaluation: {paloma: {batch_size: 1, batch_size: 2}}", "'batch_size' is written twice")])
def test_a_key_written_twice_is_refused_with_its_lines(tmp_path, text, key):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(key)):
        load_config(path)


def test_a_strangers_yaml_is_refused_at_once_and_in_a_short_line(tmp_path):
    lists = ["a: &a [0,0,0,0,0,0,0,0,0]"] + [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    for text in ("\n".join(lists), "training:\n  max_steps: &a [" + lists[0][4:] + "]\n  seed: *a",
                 "\n".join([*lists, "training: {seed: *i}"]), "training: {seed: 0x" + "f" * 6000 + "}"):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        begun = time.perf_counter()
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert len(str(caught.value)) < 500 and time.perf_counter() - begun < 1


@pytest.mark.parametrize("word", ["training.max_steps", "=3", "", "training.max_steps=["])
def test_a_malformed_override_is_refused(word):
    assert word.split("=")[0] in refusal(word)


@pytest.mark.parametrize("key, nearest", [
    ("training.max_step", "training.max_steps"), ("trainig.max_steps", "training"),
    ("training.lr", "training.optimization.lr"), ("lr_scheduler", "training.optimization.lr_scheduler"),
    ("model.lora_alpha", "model.relora.lora_alpha"), ("evaluation.blimp.batchsize", "evaluation.blimp.batch_size")])
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(key, nearest):
    message = refusal(f"{key}=1")
    assert message in (f"{name}: unknown key; did you mean {nearest}?" for name in (key, key.partition(".")[0]))


@pytest.mark.parametrize("key", ["two\nlines", "\x85", "", "\xe9", "=", 5, None, True, (1, 2), 1.5])
def test_a_strange_key_is_refused_in_one_line(key):
    assert "unknown key" in refusal(tree={"training": {key: 1}})


# ---- wrong types and impossible values -----------------------------------------------------------------------

@pytest.mark.parametrize("word", [
    "training.max_steps=1.5", "training.max_steps=many", "training.max_steps=true", "training.max_steps=null",
    "training.max_steps=[1]", "training.max_steps=.inf", "training.seed=.nan", "training.optimization.lr=.nan",
    "training.optimization.lr=-.inf", "training.optimization.lr=1e999", "training.optimization.lr=fast",
    "training.optimization.lr=false", "training.optimization.betas=0.9", "training.optimization.betas=[a, b]",
    "training.optimization.optimizer=adamv", "training.optimization.optimizer=[adamw]", "evaluation.metrics=paloma",
    "evaluation.metrics=[paloma, glue]", "monitoring.save_to_wandb=1", "monitoring.save_to_wandb='true'",
    "checkpointing.runs_dir=[5]", "checkpointing.runs_dir=null", "model.relora.target_modules=attention",
    "training.optimization=fast", "model.relora=true", "data=[1]"])
def test_a_wrong_type_is_refused_naming_the_key(word):
    tree = {"model": {"relora": RELORA}}
    assert word.partition("=")[0] in refusal(word, tree=tree).partition(":")[0]


@pytest.mark.parametrize("value", ["2024-13-45", "0x_", "!!int x", "!!timestamp x", "!!bool x", "[" * 900, "9" * 5000],
                         ids=lambda value: value[:13])
def test_what_pyyaml_cannot_digest_is_refused_on_the_command_line_and_in_a_file(tmp_path, value):
    assert refusal(f"training.max_steps={value}").startswith("training.max_steps: ")
    (tmp_path / "odd.yaml").write_text(f"training:\n  max_steps: {value}")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "odd.yaml")


@pytest.mark.parametrize("missing", RELORA)
def test_what_relora_needs_is_asked_for(missing):
    tree = {"model": {"relora": {key: value for key, value in RELORA.items() if key != missing}}}
    assert f"model.relora.{missing}" in refusal(tree=tree)


@pytest.mark.parametrize("key, words", [
    ("model.d_model", ["model.d_model=770"]), ("model.d_model", ["model.d_model=36"]),
    ("model.attention_n_kv_heads", ["model.attention_n_kv_heads=5"]),
    ("model.vocab_size", ["model.vocab_size=2147483648"]),
    ("training.optimization.min_lr_ratio", ["training.optimization.min_lr_ratio=1.1"]),
    ("training.optimization.betas", ["training.optimization.betas=[0.9]"]),
    ("training.optimization.betas", ["training.optimization.betas=[0.9, 1]"]),
    ("training.optimization.momentum", ["training.optimization.momentum=1"]),
    ("training.optimization.lr_scheduler", [*JAGGED, "model.relora=null"]),
    ("training.optimization.min_lr_ratio", [*JAGGED, "training.optimization.min_lr_ratio=0"]),
    ("training.optimization.restart_warmup_steps", [*JAGGED, "training.optimization.restart_warmup_steps=0"]),
    ("model.relora.target_modules", ["model.relora.target_modules=[]"]),
    ("model.relora.lora_dropout", ["model.relora.lora_dropout=1"]),
    ("model.relora.optimizer_reset.ratio", ["model.relora.optimizer_reset.ratio=1.5"]),
    ("model.relora.lora_only", ["model.relora.lora_only=true", "model.relora.keep_original_weights=true"]),
    *(("model.relora.keep_original_weights", [f"model.relora.{odd}", warm])
      for odd in ("keep_original_weights=false", "lora_only=true")
      for warm in ("model.relora.warm_start_steps=5", "training.start_from=runs/other")),
    *((key, [f"{key}=-1"]) for key in ("training.seed", "training.optimization.lr_warmup_steps", "training.max_steps",
                                       "training.optimization.weight_decay", "model.relora.warm_start_steps")),
    *((key, [f"{key}=0"]) for key in ("training.max_steps", "training.optimization.lr", "model.relora.r",
                                      "data.dataloader.batch_size", "checkpointing.save_every_n_steps")),
    *(("checkpointing.run_name", [f"checkpointing.run_name='{name}'"]) for name in ("../x", "a/b", "/x", "..", ".", "",
                                                                                   "a\\b"))])
def test_an_impossible_value_is_refused_naming_its_key(key, words):
    assert refusal(*words, tree={"model": {"relora": RELORA}}).startswith(f"{key}: ")


def test_the_jagged_schedule_is_possible_with_relora_floor_and_restart():
    assert config_from_dict({"model": {"relora": RELORA}}, JAGGED)


# ---- micro-batches -------------------------------------------------------------------------------------------

def micro_batches(world, batch, accumulation=1, micro=None):
    cfg = config_from_dict({}, [f"data.dataloader.batch_size={batch}", f"training.micro_batch_size={micro or 'null'}",
                                f"training.optimization.gradient_accumulation_steps={accumulation}"])
    return cfg.micro_batches(world)


@pytest.mark.parametrize("world, batch, accumulation, micro, expected", [
    (1, 1024, 128, None, (8, 128)), (4, 1024, 128, None, (2, 128)), (2, 8, 4, None, (1, 4)), (3, 9, 1, None, (3, 1)),
    (1, 1024, 128, 16, (16, 64)), (4, 1024, 7, 16, (16, 16)), (2, 8, 128, 4, (4, 1))])
def test_micro_batches_divide_the_batch_or_have_the_size_asked_for(world, batch, accumulation, micro, expected):
    assert micro_batches(world, batch, accumulation, micro) == expected


@pytest.mark.parametrize("world, batch, accumulation, micro", [
    (3, 24, 5, None), (1, 8, 128, None), (2, 6, 2, None), (2, 24, 1, 5), (1, 7, 1, 100)])
def test_an_indivisible_batch_is_refused_with_a_suggestion_that_works(world, batch, accumulation, micro):
    with pytest.raises(ConfigError) as caught:
        micro_batches(world, batch, accumulation, micro)
    suggestion = str(caught.value).rpartition("try ")[2]
    cfg = config_from_dict({}, [f"data.dataloader.batch_size={batch}", suggestion])
    rows, forwards = cfg.micro_batches(world)
    assert rows * forwards * world == batch


@pytest.mark.parametrize("micro", [None, 2])
def test_a_batch_that_the_ranks_cannot_share_is_refused(micro):
    with pytest.raises(ConfigError, match="use a batch size that 2 divides"):
        micro_batches(2, 7, 1, micro)


# ---- files and commands --------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, reason", [
    (b"- a\n- b\n", "list"), (b"words", "str"), (b"a: [1", "not YAML"), (b"a: b: c", "not YAML"),
    (b"\x00", "not YAML"), (b"model:\n\t- x", "not YAML"), (b"\xff\xfe\xfa", "cannot be read")])
def test_a_file_that_is_no_mapping_of_utf8_yaml_is_refused(tmp_path, content, reason):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(tmp_path / "bad.yaml")
    assert str(tmp_path / "bad.yaml") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["demmo.yaml", "config/pico-relora-tyny.yaml", "config", "nowhere/demo.yml"])
def test_a_missing_file_suggests_a_preset_that_is_there(wrong):
    with pytest.raises(ConfigError, match="did you mean config/") as caught:
        load_config(wrong)
    assert (lab.ROOT / str(caught.value).rpartition("did you mean ")[2].rstrip("?")).is_file()


def test_config_does_not_import_torch():
    code = "import sys, config; config.load_config('config/demo.yaml'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=lab.ROOT) == b"False\n"


@pytest.mark.parametrize("ranks, code", [(0, 2), (2, 1)])  # 1 is torchrun's own
def test_the_command_tells_an_error_once_without_a_traceback_and_makes_no_run(tmp_path, dataset, ranks, code):
    config = lab.write_config(tmp_path / "config.yaml", lab.tiny_tree(dataset, tmp_path / "runs"))
    printed = lab.run("train.py", config, "training.lr=1", ranks=ranks, code=code)
    told = [line for line in printed.splitlines() if "error: " in line]
    assert told == ["error: training.lr: unknown key; did you mean training.optimization.lr?"]
    assert not (tmp_path / "runs").exists()
    assert ranks or printed.splitlines() == told


# ---- anything at all -----------------------------------------------------------------------------------------

SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
           | st.binary(max_size=4) | st.sampled_from(["3e-4", "adamw", "auto", "val", "../x", 1, 2, 8, 0.5]))
NAMES = sorted({part for key in DEFAULTS for part in key.split(".")} | RELORA.keys())
KEYS = st.sampled_from(NAMES) | st.text(max_size=6)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
                        max_leaves=12)


def mostly_valid(tree):
    """A strategy for subtrees of the resolved configuration `tree` with some values replaced by anything."""
    if not isinstance(tree, dict):
        return st.just(tree) | ANYTHING
    return st.fixed_dictionaries({}, optional={key: mostly_valid(value) for key, value in tree.items()}) | ANYTHING


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(tree=ANYTHING | mostly_valid(to_dict(config_from_dict({"model": {"relora": RELORA}}))))
def test_any_yaml_tree_loads_or_is_refused_in_one_line(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        cfg = load_config(path)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert config_from_dict(to_dict(cfg)) == cfg


# ---- the presets of relora-pico and pico-train, their keys and values ----------------------------------------------------

RELORA_TINY = {"model": {"d_model": 96, "activation_hidden_dim": 384, "relora": RELORA | {"reset_frequency": 2000, "r": 16}},
               "training": {"optimization": {"gradient_accumulation_steps": 32, "lr_scheduler": "relora_jagged_cosine",
                                             "lr_warmup_steps": 2000, "min_lr_ratio": 0.1, "restart_warmup_steps": 100},
                            "fabric": {"num_nodes": 1, "num_devices": 2}},
               "monitoring": {"save_to_wandb": True, "wandb": {"entity": "pico-lm", "project": "pico-relora"}},
               "evaluation": {"metrics": ["blimp", "paloma"], "paloma": {"batch_size": 16}, "blimp": {"batch_size": 64}},
               "checkpointing": {"run_name": "pico-relora-tiny-v2-sn", "save_every_n_steps": 50, "save_to_hf": True,
                                 "hf_checkpoint": {"repo_id": "pico-relora-tiny-v2-sn", "collection_slug": "yuvalw/pico-6"},
                                 "learning_dynamics": {"batch_size": 64}}}
DEMO = {"data": {"dataloader": {"batch_size": 32}}, "model": {"d_model": 96, "activation_hidden_dim": 384},
        "checkpointing": {"run_name": "pico-decoder-demo-1", "save_every_n_steps": 50, "save_to_hf": True,
                          "hf_checkpoint": {"repo_id": "pico-lm/demo"}, "learning_dynamics": {"batch_size": 16}},
        "evaluation": {"paloma": {"batch_size": 32}}, "monitoring": {"logging": {"log_every_n_steps": 10}},
        "training": {"max_steps": 100, "optimization": {"lr": 0.001, "lr_warmup_steps": 30, "gradient_accumulation_steps": 2},
                     "fabric": {"num_devices": 1}}}


@pytest.mark.parametrize("tree, words", [
    (RELORA_TINY, []), (RELORA_TINY, ["model.d_model=384", "model.activation_hidden_dim=1536", "training.fabric.num_devices=4"]),
    (RELORA_TINY, ["evaluation.blimp.batch_size=128", "monitoring.logging.log_every_n_steps=1"]), (DEMO, [])],
    ids=["pico-relora-tiny-sn", "pico-relora-small-sn", "hpc_intr_relora_small", "pico-train demo"])
def test_the_presets_of_the_published_runs_load_as_they_are(tmp_path, tree, words):
    """Whose repositories have no owner: the token's, when it uploads."""
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(tree))
    cfg = load_config(path, words)
    assert cfg.checkpointing.hf_checkpoint.repo_id == tree["checkpointing"]["hf_checkpoint"]["repo_id"]


@pytest.mark.parametrize("name, more, told", [
    ("local_relora, hpc_intr_2, hpc_intr_4, hpc_intr_relora", {"data": {"dataset": "pico-lm/pretokenized-paloma-tinsy"}},
     "data.dataset: expected keys below it, got 'pico-lm/pretokenized-paloma-tinsy'"),
    ("local, hpc_intr_pico", {"training": {"learning_rate": 0.001}}, "training.learning_rate: unknown key; did you mean "),
    ("hpc_intr_*", {"training": {"fabric": {"accelerator": "gpu"}}}, "training.fabric.accelerator: 'gpu' is not one of"),
    ("pico-relora-tiny", {"checkpointing": {"hcollection_slug": "yuvalw/pico-relora-6"}},
     "checkpointing.hcollection_slug: unknown key; did you mean"),
    ("demo-with-pico-report", {"monitoring": {"save_to_picolabs": True}}, "monitoring.save_to_picolabs: unknown key")],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_their_scratch_files_are_refused_by_the_key(name, more, told):
    assert told in refusal(tree=more)
