"""Every option of the lab: typed, with its default and the reason for it.

A configuration is a YAML file plus `section.key=value` words from the command line, checked
against the dataclasses below. A number must be above 0 where no `option` beside its field says
otherwise. The keys and defaults of pico-train and relora-pico are kept, so their files load
unchanged; keys that are ours say so with "(ours)".

    from config import load_config
    cfg = load_config("config/demo.yaml", ["training.max_steps=10"])
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from config.checks import check, check_resume, check_strategy, warnings  # noqa: F401 (some are for importers)
from config.reading import (ConfigError, UserError, apply_overrides, build, flat, option, read_yaml, show,  # noqa: F401
                            yaml_text)

for _module in Path(__file__).parent.parent.glob("*.py"):  # this is the first import of every command
    if (_module.with_suffix("") / "__init__.py").exists():  # it would win the import from the module, and be executed
        print(f"error: {_module.with_suffix('')}/: a folder with an __init__.py would be run in place of {_module.name}; data "
              f"sets belong in corpora/: rename the folder, or delete its __init__.py", file=sys.stderr)
        raise SystemExit(2)

# OpenMP's threads spin for milliseconds where they wait for each other; beside other busy programs they then keep the very core
# that the awaited one needs (docs/performance.md has figures). Read when torch is loaded (GNU's OpenMP, Linux).
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"  # as good as endless between the operations of a step, a fraction of a time slice
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for training.deterministic, read before the first product on CUDA


# ---- data ---------------------------------------------------------------------------------------

@dataclass
class DatasetConfig:
    name: str = "pico-lm/pretokenized-dolma"  # a folder made by shards.py, or a dataset on the Hub
    cache_dir: str = "corpora/hub"  # (ours) where shards from the Hub are kept
    prefetch_shards: int = option(2, least=0)  # (ours) shards fetched ahead of the one in use
    keep_shards: int | None = option(None, least=0)  # (ours) shards kept behind it; null: all (the whole of Dolma is 840 GB)
    revision: str | None = None  # (ours) a commit or branch of the Hub dataset; null: main, pinned at first contact
    subset: str | None = None  # (ours) which, where a Hub dataset holds several, such as gpt2/train-00000-of-00001.parquet's gpt2
    patience_minutes: float = option(60, most=1e6)  # (ours) how long the Hub may be away before the run checkpoints and stops


@dataclass
class DataLoaderConfig:
    batch_size: int = 1024  # rows of one update over all ranks: the G of the data order
    first_row: int = option(0, least=0)  # (ours) where batch 0 begins; past the last row the order wraps


@dataclass
class TokenizerConfig:
    name: str = "allenai/OLMo-7B-0724-hf"  # a folder or a Hub model, for a dataset of more than bytes without a tokenizer.json
    vocab_size: int = 50304  # unused, kept for pico-train's files: see model.vocab_size
    eos: str | None = None  # (ours) the token that ends a text; null: what the tokenizer's own files say


@dataclass
class DataConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dataloader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


# ---- model --------------------------------------------------------------------------------------

@dataclass
class OptimizerResetConfig:
    mode: Literal["zero", "random", "magnitude", "none"] = "random"  # (ours) what a reset does to Adam's moments
    ratio: float = option(0.999, least=0, most=1)  # (ours) the share that random and magnitude prune; zero prunes all


@dataclass
class ReLoRAConfig:
    target_modules: list[str]  # substrings of the names of the linear layers to adapt
    reset_frequency: int  # updates between merges
    r: int = option(128, most=2 ** 20)  # rank of one cycle's update
    lora_alpha: float = option(32, most=1e9)  # the update is scaled by lora_alpha / r
    lora_dropout: float = option(0.1, least=0, below=1)  # on the adapter's input only; 0 opens the faster path
    keep_original_weights: bool | None = None  # true (the default): W starts at the model's own initialisation
    lora_only: bool = False  # no W at all, and no merges: plain low-rank training
    trainable_scaling: bool = False  # scale by tanh of a learnt scalar instead
    warm_start_steps: int = option(0, least=0)  # (ours) full-rank updates first; Lialin et al. gain 9 perplexity at 130M
    optimizer_reset: OptimizerResetConfig = field(default_factory=OptimizerResetConfig)
    reference_faults: list[Literal["dead_adapters", "unscaled_merge", "undone_reset", "late_merge", "kept_adam_step",
                                   "kept_scaling", "pruned_apart"]] = field(default_factory=list)  # (ours) to reproduce others

    @property
    def has_initial_weights(self) -> bool:
        """True where W starts at the model's own initialisation, false where it is zero or absent."""
        return not self.lora_only and self.keep_original_weights is not False


@dataclass
class ModelConfig:
    model_type: Literal["pico_decoder"] = "pico_decoder"  # names what is built
    d_model: int = option(768, most=2 ** 20)
    n_layers: int = option(12, most=10_000)
    vocab_size: int = option(50304, most=2 ** 31 - 1)  # 50,280 entries of the OLMo tokenizer, padded to a multiple of 128
    batch_size: int = 1024  # unused, kept for pico-train's files: see data.dataloader.batch_size
    max_seq_len: int = option(2048, most=2 ** 24)  # training rows hold one token more: the last label
    attention_n_heads: int = 12
    attention_n_kv_heads: int = 4  # grouped queries: a third of the KV cache
    activation_hidden_dim: int = option(3072, most=2 ** 22)  # SwiGLU's inner width, 4 d_model in every preset
    norm_eps: float = 1e-6
    position_emb_theta: float = 10000.0
    relora: ReLoRAConfig | None = None  # null: full-rank training
    fast_paths: bool = True  # (ours) the formulas of kernels.py; false: plain ones, slower, for reading and checking


# ---- training -----------------------------------------------------------------------------------

@dataclass
class FabricConfig:
    """Device settings of pico-train's launcher. Here torchrun decides; a mismatch is reported."""
    num_nodes: int = 1
    num_devices: int = 1
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"  # autocast over float32 weights; CPUs use 32-true
    accelerator: Literal["cuda", "cpu", "mps", "auto"] = "cuda"  # used if present, else the next best, and said so


@dataclass
class OptimizationConfig:
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"  # muon: the blocks' matrices, in bf16; AdamW: the rest
    lr: float = 3e-4  # ReLoRA wants about twice the full-rank rate
    lr_scheduler: Literal["linear_with_warmup", "relora_jagged_cosine", "cosine_with_warmup", "constant_with_warmup",
                          "wsd"] = "linear_with_warmup"
    lr_warmup_steps: int = option(2500, least=0)
    decay_share: float = option(0.2, least=0, most=1)  # (ours) of max_steps, over which wsd falls to min_lr_ratio at the end
    restart_warmup_steps: int = option(0, least=0)  # updates over which the jagged schedule climbs back after a merge
    min_lr_ratio: float = option(0.0, least=0, most=1)  # floor of the cosines and of wsd, as a share of lr
    gradient_accumulation_steps: int = 128  # micro-batch = batch_size / (ranks x this)
    weight_decay: float = option(0.01, least=0)  # (ours) PyTorch's AdamW default, which the published runs used
    betas: list[float] = option(factory=lambda: [0.9, 0.999], least=0, below=1)  # (ours) Adam's averages
    momentum: float = option(0.95, least=0, below=1)  # (ours) of sgd and muon


@dataclass
class TrainingConfig:
    max_steps: int = 200000  # the horizon of the schedule
    stop_at_step: int | None = None  # (ours) end early without bending the schedule
    seed: int = option(42, least=0)  # (ours) everything random follows from this and the step
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # (ours) auto: DDP; fsdp shards over all, hsdp in each machine
    micro_batch_size: int | None = None  # (ours) rows a forward, in place of gradient_accumulation_steps
    grad_clip: float | None = None  # (ours) largest gradient norm; the published runs do not clip
    compile: bool | None = None  # (ours) torch.compile each block; null: on CUDA, where it pays
    cuda_graph: bool | None = None  # (ours) one GPU: start all kernels of a micro-batch at once; null: where blocks are compiled
    deterministic: bool = True  # (ours) on CUDA: the same bits each time, as on CPUs; false: faster attention
    start_from: str | None = None  # (ours) a run, step or Llama folder to take weights from: Lialin's other warm start
    fork_from: str | None = None  # (ours) a run or step folder whose whole state, moments and position too, this run begins with
    hang_timeout_minutes: float = option(30, most=1e6)  # (ours) a rank silent for so long shows where it hangs, and ends the run
    max_nonfinite_steps: int = 20  # (ours) skipped updates in a row after which the run stops
    fabric: FabricConfig = field(default_factory=FabricConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)


# ---- evaluation, monitoring, checkpointing ----------------------------------------------------------

@dataclass
class ValConfig:
    batch_size: int = 16  # (ours) rows a forward
    max_rows: int | None = 512  # (ours) of the dataset's val split; null: all
    skip_rows: int = option(0, least=0)  # (ours) of it, left out before these: for choosing on other rows than one reports


@dataclass
class PalomaConfig:
    dataset_name: str = "pico-lm/pretokenized-paloma-tinsy"  # a Hub dataset or a folder made by shards.py
    dataset_split: str = "val"
    max_length: int = option(2048, least=2)  # longer rows are cut
    batch_size: int = 16


@dataclass
class BlimpConfig:
    dataset_name: str = "nyu-mll/blimp"  # (ours) a Hub dataset, or a folder or zip of BLiMP's jsonl files
    metric_uids: list[str] = field(default_factory=lambda: ["*"])  # globs over the 67 paradigms
    batch_size: int = 16
    samples_per_set: int | None = None  # null: all 1,000
    start_token: Literal["eos"] | None = None  # (ours) before every sentence; recorded with the result


@dataclass
class EvaluationConfig:
    metrics: list[Literal["val", "paloma", "blimp"]] | None = field(default_factory=lambda: ["paloma"])
    every_n_steps: int | None = None  # (ours) null: with every checkpoint; always at the end
    val: ValConfig = field(default_factory=ValConfig)
    paloma: PalomaConfig = field(default_factory=PalomaConfig)
    blimp: BlimpConfig = field(default_factory=BlimpConfig)


@dataclass
class LoggingConfig:
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_every_n_steps: int = 100


@dataclass
class WandbConfig:
    project: str = ""
    entity: str = ""


@dataclass
class MonitoringConfig:
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    save_to_wandb: bool = False  # mirrors metrics.jsonl; can never stop a run
    save_to_tensorboard: bool = False  # (ours) another mirror, in RUN/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class HFCheckpointConfig:
    repo_id: str = ""  # owner/name; without an owner that of the token
    collection_slug: str | None = None


@dataclass
class CheckpointTrainingConfig:
    auto_resume: bool = True


@dataclass
class CheckpointEvaluationConfig:
    eval_results_dir: str = "eval_results"


@dataclass
class LearningDynamicsConfig:
    # (ours) also residual, the stream after each block, and attention.entropy, of each head's attention
    layer_suffixes: list[str] = field(default_factory=lambda: ["attention.v_proj", "attention.o_proj", "swiglu.w_2"])
    sequence_idx: int | list[int] = option(-1, least=-math.inf)  # whose activations are kept; (ours) a list: of each position
    batch_size: int = 8  # rows a forward of the snapshot; bounds its memory, not its size
    eval_data: str | None = "pico-lm/pretokenized-paloma-tinsy"  # of the val snapshot: Hub name, folder, or val
    max_rows: int | None = 2048  # (ours) rows of a snapshot at most; null: the whole batch, all of eval_data
    steps: Literal["log"] | list[int] | None = option(None, least=0)  # (ours) snapshots at these too; log: 1, 2, 4, 8, ...
    optimizer_states: bool = False  # (ours) also keep the optimizer's state of these layers


@dataclass
class CheckpointingConfig:
    run_name: str | None = None  # null: the time of the start
    runs_dir: str = "runs"
    checkpoints_dir: str = "checkpoints"
    logs_dir: str = "logs"
    fabric_checkpoint_dir: str = "training_state"
    fabric_checkpoint_filename: str = "checkpoint.pt"
    learning_dynamics_dir: str = "learning_dynamics"
    save_every_n_steps: int = 1000
    keep_training_states: int | None = None  # (ours) null: all; older ones are pruned, snapshots never
    save_to_hf: bool = False
    upload_grace_seconds: float = option(120, most=1e8)  # (ours) at the end of a run, for uploads that are left
    hf_checkpoint: HFCheckpointConfig = field(default_factory=HFCheckpointConfig)
    training: CheckpointTrainingConfig = field(default_factory=CheckpointTrainingConfig)
    evaluation: CheckpointEvaluationConfig = field(default_factory=CheckpointEvaluationConfig)
    learning_dynamics: LearningDynamicsConfig | None = field(default_factory=LearningDynamicsConfig)  # null: none


class Due(NamedTuple):
    """What is to be written of a step."""
    state: bool  # what a resume needs
    evaluation: bool
    snapshot: bool


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)

    @property
    def last_step(self) -> int:
        """Updates after which the run ends: stop_at_step, or else the schedule's horizon."""
        stop = self.training.stop_at_step
        return self.training.max_steps if stop is None else min(stop, self.training.max_steps)

    def due(self, step: int, first: bool = False) -> Due:
        """What is to be written of `step`: a function of it alone, so that a run that is resumed writes the same.

        Snapshots come with every checkpoint, and at learning_dynamics.steps; log: powers of two, up to the first checkpoint.
        A checkpoint is also written of the `first` step that a run makes, wherever it begins.
        """
        every, dynamics = self.checkpointing.save_every_n_steps, self.checkpointing.learning_dynamics
        last = step == self.last_step
        state = last or first or step % every == 0
        dense = dynamics is not None and (
            step < every and step & (step - 1) == 0 if dynamics.steps == "log" else step in (dynamics.steps or ()))
        evaluation = last or step % (self.evaluation.every_n_steps or every) == 0
        return Due(state, evaluation, dense or dynamics is not None and state)

    def micro_batches(self, world: int) -> tuple[int, int]:
        """(rows a forward, forwards an update) for each of `world` ranks; ConfigError where they do not divide."""
        rows, micro = self.data.dataloader.batch_size, self.training.micro_batch_size
        key, asked = (("training.micro_batch_size", micro) if micro is not None else
                      ("training.optimization.gradient_accumulation_steps",
                       self.training.optimization.gradient_accumulation_steps))
        fit = [n for n in range(1, rows // world + 1) if rows % (world * n) == 0]
        if asked not in fit:
            hint = (f"try {key}={min(fit, key=lambda n: abs(n - asked))}" if fit else
                    f"use a batch size that {world} divides")
            raise ConfigError(f"data.dataloader.batch_size: {rows} is not divisible by {world} ranks x {key} {asked}; {hint}")
        other = rows // (world * asked)
        return (other, asked) if micro is None else (asked, other)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked configuration of a YAML file with `section.key=value` overrides on top.

    Raises ConfigError, one line with the key, the value and the nearest valid choice.
    """
    path = Path(path)
    try:
        text = yaml_text(path)
    except (OSError, UnicodeDecodeError) as error:
        presets = sorted(p.name for p in Path(__file__).parent.glob("*.yaml"))
        near = difflib.get_close_matches(path.name, presets, n=1, cutoff=0.3) or presets[:1]
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                          f"did you mean config/{near[0]}?") from None
    try:
        tree = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not (tree is None or isinstance(tree, dict)):
        raise ConfigError(f"{path}: expected sections such as `training:`, found a {type(tree).__name__}")
    return config_from_dict(tree or {}, overrides)


def config_from_dict(tree: dict, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked configuration of a nested dict, as load_config does for a file."""
    cfg = build(Config, apply_overrides(tree, overrides))
    check(cfg)
    return cfg


def to_dict(cfg: Any) -> dict:
    """The resolved configuration as nested plain dicts: every section, every default."""
    return dataclasses.asdict(cfg)
