"""A checkpoint's Llama folder: what transformers makes of it, the way back, and folders that are none."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lab
from checkpoint import CheckpointError
from config import ModelConfig, ReLoRAConfig, config_from_dict
from fake_hub import Hub
from hub.llama import byte_tokenizer_json, load_decoder, load_plain, writers
from model import PicoDecoder
from relora import apply_relora, relora_layers
from runtime.files import write_file

PROMPT = torch.arange(14).view(2, 7)


def make_config(dataset, **changes):
    tree = lab.tiny_tree(dataset, "runs", relora=False)
    tree["model"] |= {"max_seq_len": 96, "vocab_size": 264, "position_emb_theta": 300.0, "norm_eps": 1e-5} | changes
    return config_from_dict(tree)


def mid_cycle(cfg):
    """A decoder whose norms, and adapters where it has any, are as after some training."""
    model = PicoDecoder(cfg.model)
    if cfg.model.relora is not None:
        apply_relora(model, cfg.model.relora)
    for layer in relora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        if layer.scaling is not None:
            torch.nn.init.uniform_(layer.scaling, 0.2, 0.9)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def export(model, cfg, dataset, folder):
    folder.mkdir()
    for name, (write, _) in writers(model.state_dict(), cfg.model, dataset).items():
        write_file(folder / name, write)
    return folder


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """(config, state dict, folder) of a decoder without adapters; tests copy the folder before they damage it."""
    cfg = make_config(dataset)
    torch.manual_seed(0)
    model = mid_cycle(cfg)
    return cfg, model.state_dict(), export(model, cfg, dataset, tmp_path_factory.mktemp("export") / "plain")


@pytest.fixture
def damaged(plain, tmp_path):
    return shutil.copytree(plain[2], tmp_path / "folder")


def relora(**changes):
    return {"target_modules": ["attention", "swiglu"], "reset_frequency": 5, "r": 4, "lora_alpha": 12} | changes


def refusal(folder, load=load_plain):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    words = str(error.value)
    assert str(folder) in words and "\n" not in words
    return words


# ---- out -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"relora": relora()}, {"relora": relora(trainable_scaling=True)}, {"relora": relora(lora_only=True)},
    {"relora": relora(keep_original_weights=False)}, {"relora": relora(target_modules=["k_proj", "w_1"])},
    {}, {"relora": relora(), "attention_n_kv_heads": 4}, {"relora": relora(), "attention_n_heads": 2}])
def test_transformers_computes_the_same(dataset, tmp_path, changes):
    cfg = make_config(dataset, **changes)
    model = mid_cycle(cfg)
    folder = export(model, cfg, dataset, tmp_path / "folder")
    twin, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    assert not any(told.values()), told  # missing, unexpected, mismatched keys and errors
    ids = torch.randint(264, (3, 96))
    with torch.no_grad():
        assert (twin.eval()(ids).logits - model(ids)).abs().max() < 1e-4
    twin.generation_config.eos_token_id = None  # random weights may stumble on it
    greedy = twin.generate(PROMPT, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(PROMPT))
    assert torch.equal(greedy, model.generate(PROMPT, 64, temperature=0))


def test_the_folder_is_plain_llama_data(plain):
    cfg, _, folder = plain
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}  # no code, no pickles
    told = json.loads((folder / "config.json").read_text())
    assert told["model_type"] == "llama" and "auto_map" not in told and told["eos_token_id"] == 256  # bytes
    assert all(t.dtype == torch.float32 for t in load_file(folder / "model.safetensors").values())


def test_the_tokenizer_goes_along_and_names_eos_and_pad(tmp_path):
    text = {"model": {"type": "WordLevel", "vocab": {"a": 0, "<|padding|>": 1, "<|endoftext|>": 2}, "unk_token": "a"},
            "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    cfg = make_config(tmp_path)
    folder = export(mid_cycle(cfg), cfg, tmp_path, tmp_path / "folder")
    assert json.loads((folder / "tokenizer.json").read_text()) == text
    told = json.loads((folder / "config.json").read_text())
    assert (told["eos_token_id"], told["pad_token_id"]) == (2, 1)


def test_a_vocabulary_without_the_tokenizers_eos_loads_too(dataset, tmp_path):
    cfg = make_config(dataset, vocab_size=64)  # bytes end with id 256
    folder = export(mid_cycle(cfg), cfg, dataset, tmp_path / "folder")
    twin = AutoModelForCausalLM.from_pretrained(folder)
    assert (twin.config.eos_token_id, twin.config.pad_token_id) == (None, None)


# ---- and back ------------------------------------------------------------------------------------------------

def test_import_of_an_export_is_bit_for_bit(plain):
    cfg, state, folder = plain
    found, again = load_plain(folder)
    assert found == cfg.model
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
    model = PicoDecoder(cfg.model)
    model.load_state_dict(state)
    assert torch.equal(load_decoder(folder)(PROMPT), model(PROMPT))


def test_a_folder_that_transformers_wrote_is_read(plain, tmp_path):
    cfg, state, folder = plain
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    found, again = load_plain(tmp_path / "theirs")
    assert found == cfg.model and all(torch.equal(again[n], state[n]) for n in state)


def test_bf16_weights_are_read_as_float32(plain, damaged):
    _, state, _ = plain
    path = damaged / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    again = load_plain(damaged)[1]
    assert all(torch.equal(again[n], state[n].bfloat16().float()) for n in state)


def test_a_run_folder_stands_for_its_newest_step(plain, tmp_path):
    for step in (5, 10, 9):
        shutil.copytree(plain[2], tmp_path / "run" / "checkpoints" / f"step_{step}")
    path = tmp_path / "run" / "checkpoints" / "step_10" / "model.safetensors"
    save_file({n: t * 2 for n, t in load_file(path).items()}, path)
    assert torch.equal(load_plain(tmp_path / "run")[1]["output_norm.weight"], 2 * plain[1]["output_norm.weight"])


# ---- what is refused -----------------------------------------------------------------------------------------

def test_missing_and_unexpected_tensors_are_listed(damaged):
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors | {"model.extra": torch.zeros(2)}, path)
    words = refusal(damaged)
    for part in ("model.norm.weight is missing", "model.layers.1.mlp.up_proj.weight is missing",
                 "model.extra is unexpected"):
        assert part in words


@pytest.mark.parametrize("load", [load_plain, load_decoder])
@pytest.mark.parametrize("name, shape, ours", [
    ("model.layers.0.self_attn.q_proj.weight", (30, 32), "q_proj"), ("lm_head.weight", (64, 31), "de_embedding_proj"),
    ("model.layers.1.self_attn.k_proj.weight", (32, 32), "k_proj"), ("model.norm.weight", (31,), "output_norm")])
def test_misshapen_tensors_are_listed(damaged, load, name, shape, ours):
    path = damaged / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(shape)}, path)
    words = refusal(damaged, load)
    assert (name in words or ours in words) and str(tuple(shape)) in words


@pytest.mark.parametrize("text", [
    '{"model_type": "gpt2", "n_embd": 32, "n_layer": 2}', "[]", '"llama"', "{", "", "\ufffe",
    '{"hidden_size": "many", "num_hidden_layers": 2}'])
def test_another_config_is_refused(damaged, text):
    (damaged / "config.json").write_text(text)
    refusal(damaged)


@pytest.mark.parametrize("change", [
    {"model_type": "gemma"}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"head_dim": 16},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"hidden_size": "32"}, {"num_attention_heads": 0}])
def test_a_config_that_would_compute_something_else_is_refused(damaged, change):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refusal(damaged)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_refused(damaged, size):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refusal(damaged)


def test_absent_weights_and_absent_folders_are_refused(damaged):
    (damaged / "model.safetensors").unlink()
    refusal(damaged)
    refusal(damaged / "nowhere")


# ---- published Pico models -----------------------------------------------------------------------------------------

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


def test_weights_in_several_files_are_read(tmp_path, plain):
    from transformers import LlamaForCausalLM
    theirs = LlamaForCausalLM.from_pretrained(plain[2])
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    found, expected = load_plain(tmp_path / "sharded")[1], load_plain(plain[2])[1]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


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


def test_an_imported_model_starts_a_run(tmp_path, dataset):
    lab.call("train.py", lab.write_config(tmp_path / "a.yaml", lab.tiny_tree(dataset, tmp_path, "full", relora=False)))
    lab.call("export.py", "hf", tmp_path / "full", tmp_path / "model", "--dtype", "bfloat16")
    lab.call("export.py", "import", tmp_path / "model", tmp_path / "again")
    lab.call("train.py", lab.write_config(tmp_path / "b.yaml", lab.tiny_tree(dataset, tmp_path, "warm")),
            f"training.start_from={tmp_path / 'again'}", "training.max_steps=3")
    full, warm = lab.metrics(tmp_path / "full", "eval/val_loss"), lab.metrics(tmp_path / "warm", "eval/val_loss")
    assert warm[0] == pytest.approx(full[20], abs=0.01), "bfloat16 rounds a little"


def test_what_is_missing_from_a_published_model_is_listed(tmp_path):
    cfg = ModelConfig(d_model=32, n_layers=1, vocab_size=64, max_seq_len=16, attention_n_heads=4, attention_n_kv_heads=2,
                      activation_hidden_dim=64)
    model = PicoDecoder(cfg)
    del model.layers[0].swiglu.w_1
    folder = published(tmp_path / "theirs", model, cfg, "pico_decoder")
    printed = lab.call("export.py", "import", folder, tmp_path / "ours", code=2)
    assert "layers.0.swiglu.w_1.weight is missing" in printed and not (tmp_path / "ours").exists()
