"""A checkpoint's Llama folder: what transformers makes of it, the way back, and folders that are none."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lab
from checkpoint import CheckpointError, publish
from config import config_from_dict
from hub.llama import load_decoder, load_plain, writers
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


def test_a_tokenizer_that_changed_meanwhile_is_read_again(plain, tmp_path):
    cfg, state, _ = plain
    for number, end in enumerate(("<a>", "<b>")):
        text = {"model": {"type": "WordLevel", "vocab": {"x": 0, "<a>": 1, "<b>": 2}, "unk_token": "x"}, "added_tokens": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(text))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        os.utime(tmp_path / "tokenizer_config.json", (number, number))
        write_file(tmp_path / f"{number}.out", writers(state, cfg.model, tmp_path)["config.json"].write)
        assert json.loads((tmp_path / f"{number}.out").read_text())["eos_token_id"] == number + 1


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
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"hidden_size": "32"}, {"num_attention_heads": 0},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"factor": 2.0}}, {"rope_scaling": [1]},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0}}, {"rope_parameters": {"rope_theta": 1e6}},
    {"partial_rotary_factor": 0.5}, {"attention_bias": True}, {"mlp_bias": True}, {"quantization_config": {"bits": 4}},
    {"auto_map": {"AutoModel": "theirs.py"}}], ids=str)
def test_a_config_that_would_compute_something_else_is_refused_by_name(damaged, change):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    told, (key,) = refusal(damaged), change
    assert key in told or key in ("rope_scaling", "num_attention_heads", "rope_parameters")
    assert "rotary" in told or "rope" not in key or change in ({"rope_scaling": [1]}, {"rope_parameters": {"rope_theta": 1e6}})


@pytest.mark.parametrize("change", [
    {"rope_scaling": None}, {"rope_scaling": {"type": "default"}}, {"rope_theta": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}}, {"hidden_act": "swish"}, {"head_dim": None},
    {"quantization_config": None}, {"pretraining_tp": 2, "use_cache": False}], ids=str)
def test_other_words_for_the_same_model_are_read(plain, damaged, change):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_plain(damaged)[0] == plain[0].model


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_refused(damaged, size):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refusal(damaged)


def test_absent_weights_and_absent_folders_are_refused(damaged):
    (damaged / "model.safetensors").unlink()
    refusal(damaged)
    refusal(damaged / "nowhere")


# ---- as starting weights ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused(damaged, value, dtype):
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 4] = value
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    assert "lm_head.weight holds numbers that are not finite" in refusal(damaged)


# ---- older folders, tied ones, folders of our own ----------------------------------------------------------------------

def test_rotary_frequencies_of_older_folders_are_left_out_and_said_unless_they_are_others(plain, damaged, said):
    path, cfg = damaged / "model.safetensors", plain[0].model
    tensors = load_file(path)
    frequencies = cfg.position_emb_theta ** -(torch.arange(0, 8, 2) / 8)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"):
        save_file(tensors | {name: frequencies.bfloat16()}, path)
        load_plain(damaged)
        tensors[name] = frequencies.clone()
    save_file(tensors, path)
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in load_plain(damaged)[1].items())
    assert said[-1:] == [f"{damaged}: 2 tensors rotary_emb.inv_freq are left out; they follow from rope_theta"]
    save_file(tensors | {name: frequencies / 4}, path)
    assert "layers.1.self_attn.rotary_emb.inv_freq holds other frequencies than rope_theta 300 gives" in refusal(damaged)


def test_a_folder_with_one_tensor_as_embedding_and_head_computes_what_transformers_does(plain, tmp_path, said):
    from transformers import AutoConfig, LlamaForCausalLM
    theirs = LlamaForCausalLM(AutoConfig.from_pretrained(plain[2], tie_word_embeddings=True)).eval()
    theirs.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    ours = load_decoder(tmp_path / "tied")
    ids = torch.randint(264, (2, 96))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert said == [f"{tmp_path / 'tied'}: its embedding is its head too; here they are two tensors, equal now, which would "
                    "train apart"]
    lab.call("export.py", "hf", tmp_path / "tied", tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits
    torch.testing.assert_close(again, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_a_tokenizer_returns_can_be_handed_to_generate(dataset, tmp_path):
    from transformers import AutoTokenizer
    cfg = make_config(dataset)
    model = mid_cycle(cfg)
    folder = export(model, cfg, dataset, tmp_path / "folder")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["model_input_names"] == ["input_ids", "attention_mask"]
    twin, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("import os", return_tensors="pt")
    assert list(batch) == told["model_input_names"]
    twin.generation_config.eos_token_id = None
    greedy = twin.generate(**batch, max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy, model.generate(torch.tensor([list(b"import os")]), 20, temperature=0))


def test_an_export_of_a_run_of_bytes_keeps_the_tokens_that_end_and_pad(dataset, tmp_path):
    pytest.importorskip("hub.tokenizers")
    cfg = make_config(dataset)
    step = export(mid_cycle(cfg), cfg, dataset, tmp_path / "step")
    lab.call("export.py", "hf", step, tmp_path / "out")
    lab.call("export.py", "import", tmp_path / "out", tmp_path / "back")
    for folder in (step, tmp_path / "out", tmp_path / "back"):
        told = json.loads((folder / "config.json").read_text()) | json.loads((folder / "tokenizer_config.json").read_text())
        assert (told["eos_token_id"], told["pad_token_id"], told["pad_token"]) == (256, 256, "<|endoftext|>"), folder


def test_loading_draws_nothing_and_takes_the_file_over(plain, tmp_path):
    cfg = plain[0].model
    before = torch.get_rng_state()
    model = load_decoder(plain[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.rope_cos, PicoDecoder(cfg).rope_cos) and not model.rope_cos.is_meta
    wide = PicoDecoder(dataclasses.replace(cfg, vocab_size=200_000))
    publish(tmp_path / "wide", writers(wide.state_dict(), wide.cfg, tmp_path))
    size = sum(parameter.nbytes for parameter in wide.parameters())

    def memory():  # of this process alone, in bytes
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
    held = memory()
    again = load_decoder(tmp_path / "wide")
    assert memory() - held < size / 4
    again.output_norm.weight.data.zero_()  # is not written to the file
    assert load_decoder(tmp_path / "wide").output_norm.weight.all()


@pytest.fixture
def our_own(plain, tmp_path):
    """A folder under our own names, as of a model whose formula somebody changed."""
    cfg, state, _ = plain
    folder = tmp_path / "own"
    folder.mkdir()
    for name, (write, _) in writers(state, cfg.model, tmp_path, not_llama="its logits differ").items():
        write_file(folder / name, write)
    return folder


def test_a_folder_of_our_own_is_read_bit_for_bit_and_by_nobody_else(plain, our_own, tmp_path):
    found, again = load_plain(our_own)
    assert found == plain[0].model and all(torch.equal(again[name], tensor) for name, tensor in plain[1].items())
    told = json.loads((our_own / "config.json").read_text())
    assert (told["model_type"], told["not_llama"], told["relora"]) == ("pico_decoder", "its logits differ", None)
    for words in (["hf", our_own], ["import", our_own]):
        printed = lab.call("export.py", *words, tmp_path / "out", code=2)
        assert "its logits differ" in printed and len(printed.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_folder_of_our_own_is_compared_strictly_both_ways(our_own):
    path = our_own / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.attention.q_proj.weight"]
    save_file(tensors | {"layers.0.attention.q_norm.weight": torch.ones(8)}, path)
    told = refusal(our_own)
    assert "layers.1.attention.q_proj.weight is missing" in told and "layers.0.attention.q_norm.weight is unexpected" in told
    (our_own / "config.json").write_text(json.dumps(json.loads((our_own / "config.json").read_text()) | {"q_norm": True}))
    assert "q_norm: unknown key" in refusal(our_own)


def test_a_tensor_without_a_place_in_a_llama_is_never_dropped(plain, tmp_path):
    cfg, state, _ = plain
    made = writers(state | {"layers.0.attention.q_norm.weight": torch.ones(8)}, cfg.model, tmp_path)
    with pytest.raises(CheckpointError, match="layers.0.attention.q_norm.weight is unexpected"):
        write_file(tmp_path / "model.safetensors", made["model.safetensors"].write)


def test_weights_that_float16_cannot_hold_are_refused(plain, tmp_path):
    shutil.copytree(plain[2], tmp_path / "large")
    path = tmp_path / "large" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, path)
    printed = lab.call("export.py", "hf", tmp_path / "large", tmp_path / "out", "--dtype", "float16", code=2)
    assert "model.norm.weight holds 7e+04, and float16 ends at 65504; use bfloat16" in printed
    assert not list(tmp_path.glob("*out*"))
    lab.call("export.py", "hf", tmp_path / "large", tmp_path / "out", "--dtype", "bfloat16")


def test_weights_in_several_files_are_read(tmp_path, plain):
    from transformers import LlamaForCausalLM
    theirs = LlamaForCausalLM.from_pretrained(plain[2])
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    found, expected = load_plain(tmp_path / "sharded")[1], load_plain(plain[2])[1]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_imported_model_starts_a_run(tmp_path, dataset):
    lab.call("train.py", lab.write_config(tmp_path / "a.yaml", lab.tiny_tree(dataset, tmp_path, "full", relora=False)))
    lab.call("export.py", "hf", tmp_path / "full", tmp_path / "model", "--dtype", "bfloat16")
    lab.call("export.py", "import", tmp_path / "model", tmp_path / "again")
    lab.call("train.py", lab.write_config(tmp_path / "b.yaml", lab.tiny_tree(dataset, tmp_path, "warm")),
            f"training.start_from={tmp_path / 'again'}", "training.max_steps=3")
    full, warm = lab.metrics(tmp_path / "full", "eval/val_loss"), lab.metrics(tmp_path / "warm", "eval/val_loss")
    assert warm[0] == pytest.approx(full[20], abs=0.01), "bfloat16 rounds a little"
