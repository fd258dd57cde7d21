"""The model card of an uploaded run: what it is, its numbers, how to load a step, how to cite."""

from __future__ import annotations

import html
import re
from pathlib import Path

from config import UserError, load_config
from runtime.files import read_object
from runtime.log import printable

RELORA = "ReLoRA (arXiv 2307.05695)"


def model_card(run: Path, step: int) -> str:
    """README.md of a run's repository as of `step`: YAML that the Hub reads, then Markdown."""
    cfg = load_config(run / "training_config.yaml")
    model, relora = cfg.model, cfg.model.relora
    tags = ["pico", "llama", "learning-dynamics", *(["relora"] if relora else [])]
    how = (f"{RELORA}: rank {relora.r}, alpha {relora.lora_alpha:g}, merged every {relora.reset_frequency} steps" if relora
           else "full-rank")
    repo = cfg.checkpointing.hf_checkpoint.repo_id
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]", "---", "",
        f"# {plain(run.resolve().name)}", "",
        f"A Pico decoder, d_model {model.d_model}, {model.n_layers} layers, {model.vocab_size:,} ids, trained {how}, with a "
        "record of how it learned. The weights are a plain LlamaForCausalLM, adapters merged.", "",
        f"- data: {plain(cfg.data.dataset.name)}, {cfg.data.dataloader.batch_size} rows of {model.max_seq_len} tokens a step",
        f"- optimizer: {cfg.training.optimization.optimizer}, learning rate {cfg.training.optimization.lr:g}, "
        f"{cfg.training.optimization.lr_scheduler}, seed {cfg.training.seed}",
        f"- steps: {step:,} of {cfg.last_step:,} so far; each uploaded step has a tag, `step-N`", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", revision="step-{step}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}", revision="step-{step}")', "```", "",
        "`training_config.yaml` holds every option, `metrics.jsonl` the record, `manifest.json` the SHA-256 of every file of a "
        "step, `learning_dynamics/` activations, weights and gradients.", "",
        *_numbers(run, cfg.checkpointing.evaluation.eval_results_dir),
        "## Citation", "", "If you use ReLoRA, cite Lialin et al., ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv "
        "2307.05695."]
    return "\n".join(lines) + "\n"


def plain(text: object) -> str:
    """A stranger's name as text of Markdown, and no more than that."""
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(printable(str(text))))


def _numbers(run: Path, results_dir: str) -> list[str]:
    """A table of the evaluations that there are."""
    lines = []
    for path in sorted((run / results_dir).glob("step_*.json"), key=lambda path: (len(path.name), path.name)):
        try:
            told = [f"{plain(name)} {plain(key.replace('_', ' '))} {value:.4f}" for name, metrics in read_object(path).items()
                    for key, value in metrics.items() if isinstance(value, float)]
        except (OSError, UserError, ValueError, AttributeError):
            continue
        lines.append(f"| {plain(path.stem.removeprefix('step_'))} | {', '.join(told)} |")
    return ["| step | evaluation |", "| --- | --- |", *lines, ""] if lines else []
