"""Draw docs/demo.png, the README's picture, from a real runs/demo; and docs/figures/early.png, of two runs with log steps.

    make demo && .venv/bin/python analyze.py runs/demo && .venv/bin/python docs/demo_picture.py
    .venv/bin/python docs/demo_picture.py runs/log-full runs/log-relora
"""

import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from instruments import plots  # noqa: E402
from instruments.record import training_record  # noqa: E402

LAYER, SINCE = "swiglu.w_2", "updates since the start"


def early(runs: list[Path]) -> None:
    """Means over all matrices of the blocks, over steps on a logarithmic axis: each kind of data a row, each measure a column."""
    plt, kinds, metrics = plots.pyplot(), ("weights", SINCE, "gradients"), ("per", "condition_number")
    figure, axes = plots.panels(plt, len(kinds), len(metrics), 1.8, top=0.4, across=0.75, down=0.6)
    for number, run in enumerate(runs):
        rows = json.loads((run / "analysis/metrics.json").read_text())
        for across, data in zip(axes, kinds):
            for axis, metric in zip(across, metrics):
                at: dict[int, list[float]] = {}
                for row in rows:
                    if row["data"] == data and row["metric"] == metric and row["value"] and "ov_circuit" not in row["component"]:
                        at.setdefault(row["step"], []).append(row["value"])
                points = [(max(step, 0.5), plots.average(values, metric)) for step, values in sorted(at.items())]
                axis.plot(*zip(*points), "o-", color=f"C{number}", markersize=3, linewidth=1, label=run.name.removeprefix("log-"))
                axis.set_xscale("log")
                axis.set_title(f"{data}: {plots.LABELS[metric]}", fontsize=8)
                if metric == "condition_number":
                    axis.set_yscale("log")
                for step, _ in training_record(run)["relora/reset_count"]:
                    axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step (0 is drawn at 0.5; dotted: merges)")
    figure.savefig(ROOT / "docs/figures/early.png", dpi=90)


def main() -> None:
    if len(sys.argv) > 1:
        return early([Path(word) for word in sys.argv[1:]])
    run, plt = ROOT / "runs/demo", plots.pyplot()
    record, rows = training_record(run), json.loads((run / "analysis/metrics.json").read_text())
    figure, [[upper], [lower]] = plots.panels(plt, 2, 1, 2, top=0.3, down=0.8)  # 4.9 inches wide: read on a narrow screen
    plots.draw_loss(upper, record, record["train/loss"], "tab:blue", "training loss")
    upper.set(ylabel="loss (nats a byte)", title="the loss, and its merges")
    upper.legend(fontsize=9)
    for metric, style in (("numerical_rank", "--"), ("effective_rank", "-")):
        by_layer = plots.curves(rows, SINCE, metric)[LAYER]
        for line in plots.layer_lines(plt, by_layer, metric, len(by_layer)):
            label = f"{line.label}, {plots.LABELS[metric]}"
            lower.plot(*zip(*line.points), f"o{style}", color=line.colour, markersize=3, label=label)
    lower.set(title=f"rank of the update ({LAYER}, 128 x 512)", ylim=(0, None))
    lower.legend(fontsize=8, handlelength=3, loc="upper left")
    for axis in (upper, lower):
        plots.over_steps(axis)
        for step, _ in record["relora/reset_count"]:
            axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
    figure.savefig(ROOT / "docs/demo.png", dpi=100)
    with Image.open(ROOT / "docs/demo.png") as picture:  # 64 colours: a quarter of the bytes
        picture.convert("RGB").quantize(64).save(ROOT / "docs/demo.png", optimize=True)


if __name__ == "__main__":
    main()
