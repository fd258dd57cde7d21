"""A study's file: arms that differ in their overrides, the rates to sweep, the seeds; and the configuration of each run.

    base: config/demo.yaml          # seen from the study's file, from here or from the project
    rates: [4.0e-3, 8.0e-3]         # to begin the sweep with
    seeds: [1, 2, 3, 4, 5]
    arms:
      full-rank: [model.relora=null]
      relora: {overrides: [model.relora.r=4], rates: [8.0e-3, 1.6e-2]}
      large: {base: config/pico-decoder-large.yaml}    # a configuration of its own: a suite of scales
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from config import Config, ConfigError, load_config, option
from config.reading import build, read_yaml, yaml_text

ROOT = Path(__file__).resolve().parent.parent
RATE, SEED, FIRST_ROW = "training.optimization.lr", "training.seed", "data.dataloader.first_row"
SET_BY_STUDY = (RATE, SEED, "checkpointing.run_name", "checkpointing.runs_dir")


@dataclass
class Arm:
    overrides: list[str] = field(default_factory=list)  # section.key=value, on top of the base
    base: str | None = None  # in place of the study's
    rates: list[float] | None = None  # in place of the study's
    against: str | None = None  # the arm that this one is compared with, in place of the study's reference


@dataclass
class Study:
    base: str | None = None  # a configuration, seen from the study's file, from here or from the project
    rates: list[float] | None = None  # to begin the sweep with; where there is one, it is taken; null: the base's own
    seeds: list[int] = option(factory=lambda: [1, 2, 3, 4, 5], least=0)
    sweep_seeds: list[int] = option(factory=lambda: [0], least=0)  # of the sweep; their losses are averaged
    overrides: list[str] = field(default_factory=list)  # for all arms
    reference: str | None = None  # the arm that the others are compared with; null: the first
    vary: Literal["seed", "data"] = "seed"  # data: each seed also begins at other rows
    selection_rows: int = 1024  # of val, on which the rate is chosen and the curves are drawn
    final_rows: int | None = None  # of val, behind these, that count; null: all
    extend: int = option(3, least=0)  # rates that the sweep may add beyond each of its ends


class Job(NamedTuple):
    """One run of an arm."""
    arm: str
    rate: float
    seed: int
    final: bool  # counts for the verdict; else it belongs to the sweep

    @property
    def name(self) -> str:
        return f"{'final' if self.final else 'sweep'}-lr{self.rate:g}-seed{self.seed}"


class Plan:
    """A study's file, checked: its arms, and the configuration of each of its runs."""

    def __init__(self, path: Path, out: Path | None = None):
        tree = _read(path)
        arms = tree.pop("arms", None)
        self.study = _built(Study, tree, path)
        if not isinstance(arms, dict) or not arms:
            raise ConfigError(f"{path}: arms: names none; write `arms: {{NAME: [section.key=value, ...]}}`")
        listed = {str(name): value if isinstance(value, dict) else {"overrides": value or []} for name, value in arms.items()}
        self.arms = {name: _built(Arm, tree, path, f"arms.{name}") for name, tree in listed.items()}
        self.name, self.out = path.stem, out or Path("runs") / path.stem
        self.reference = self.study.reference or next(iter(self.arms))
        self._places = (path.parent, Path(), ROOT)  # where a base may lie
        self._check(path)

    def _check(self, path: Path) -> None:
        """Raise ConfigError before the first run for what the last would have met."""
        named = {"reference": self.reference} | {f"arms.{name}.against": self.against(name) for name in self.arms}
        for key, arm in named.items():
            if arm not in self.arms:
                raise ConfigError(f"{path}: {key}: {arm!r} is no arm; there are {', '.join(self.arms)}")
        for name, values in (("seeds", self.study.seeds), ("rates", self.study.rates), ("sweep_seeds", self.study.sweep_seeds)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigError(f"{path}: {name}: {values} are empty or hold one twice")
        if both := set(self.study.seeds) & set(self.study.sweep_seeds):
            raise ConfigError(f"{path}: sweep_seeds: {sorted(both)} are among seeds too; a rate would be chosen on the runs that "
                              "are reported")
        for name, arm in self.arms.items():
            if (arm.base or self.study.base) is None:
                raise ConfigError(f"{path}: base: is not set, and arms.{name} has none of its own; add base: CONFIG.yaml to one")
            if not re.fullmatch(r"[\w.+-]{1,80}", name) or name.startswith("."):
                raise ConfigError(f"{path}: arms: {name!r} cannot name a folder; use letters, digits, '.', '_', '+' and '-'")
            words = [word.partition("=")[0] for word in [*self.study.overrides, *arm.overrides]]
            if taken := next((key for key in SET_BY_STUDY if key in words), None):
                raise ConfigError(f"{path}: arms.{name}: sets {taken}, which the study sets for each run; leave it out")
            if "val" not in (self.config(Job(name, self.rates(name)[0], self.study.seeds[0], True)).evaluation.metrics or []):
                raise ConfigError(f"{path}: arms.{name}: evaluation.metrics must hold val, by which rates are chosen")

    def base(self, arm: str) -> Path:
        """The configuration that an arm's overrides stand on."""
        name = self.arms[arm].base or self.study.base
        return next((place / name for place in self._places if (place / name).is_file()), Path(name))

    def rates(self, arm: str) -> list[float]:
        own = self.arms[arm].rates or self.study.rates
        return sorted(own or [self._plain(arm).training.optimization.lr])

    def against(self, arm: str) -> str:
        """The arm that its losses are compared with."""
        return self.arms[arm].against or self.reference

    def words(self, job: Job) -> list[str]:
        """What train.py is told beside the base, later overrides in place of earlier ones."""
        options = self._options(job.arm) | {
            RATE: f"{job.rate:g}", SEED: str(job.seed), "checkpointing.run_name": job.name,
            "checkpointing.runs_dir": str(self.out / job.arm)}
        if self.study.vary == "data":
            options[FIRST_ROW] = str(self._first_row(job.seed))
        return [f"{key}={value}" for key, value in options.items()]

    def _options(self, arm: str) -> dict[str, str]:
        """{option: value} of an arm's every run."""
        words = [word.partition("=") for word in [*self.study.overrides, *self.arms[arm].overrides]]
        return {"evaluation.val.max_rows": str(self.study.selection_rows)} | {key: value for key, _, value in words}

    def _first_row(self, seed: int) -> int:
        """Behind the rows of the seeds before, the same for every arm: as many for each as the longest arm's whole run takes."""
        seeds = [*self.study.sweep_seeds, *self.study.seeds]
        arms = [self._plain(arm) for arm in self.arms]
        return seeds.index(seed) * max(cfg.data.dataloader.batch_size * cfg.last_step for cfg in arms)

    def _plain(self, arm: str) -> Config:
        """An arm's configuration before the study sets rate, seed and folder."""
        return load_config(self.base(arm), [f"{key}={value}" for key, value in self._options(arm).items()])

    def config(self, job: Job) -> Config:
        return load_config(self.base(job.arm), self.words(job))

    def folder(self, job: Job) -> Path:
        return self.out / job.arm / job.name


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(yaml_text(path))
    except (OSError, UnicodeDecodeError) as error:
        near = ", ".join(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("config/s*/*.yaml")))
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); there are {near}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys such as `base:` and `arms:`")
    return dict(tree)


def _built(cls: type, tree: dict[str, Any], path: Path, where: str = "") -> Any:
    try:
        return build(cls, tree, where)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
