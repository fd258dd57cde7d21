"""The model card of an uploaded run: what it is, its numbers, how to load a step, how to cite."""

from __future__ import annotations

import json
from pathlib import Path

from config import load_config

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
        f"# {run.resolve().name}", "",
        f"A Pico decoder, d_model {model.d_model}, {model.n_layers} layers, {model.vocab_size:,} ids, trained {how}, with a "
        "record of how it learned. The weights are a plain LlamaForCausalLM, adapters merged.", "",
        f"- data: {cfg.data.dataset.name}, {cfg.data.dataloader.batch_size} rows of {model.max_seq_len} tokens a step",
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


def _numbers(run: Path, results_dir: str) -> list[str]:
    """A table of the evaluations that there are."""
    lines = []
    for path in sorted((run / results_dir).glob("step_*.json"), key=lambda path: (len(path.name), path.name)):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            told = [f"{name} {key.replace('_', ' ')} {value:.4f}" for name, metrics in found.items()
                    for key, value in metrics.items() if isinstance(value, float)]
        except (OSError, ValueError, AttributeError):
            continue
        lines.append(f"| {path.stem.removeprefix('step_')} | {', '.join(told)} |")
    return ["| step | evaluation |", "| --- | --- |", *lines, ""] if lines else []
