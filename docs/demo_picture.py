"""Draw docs/demo.png, the README's picture, from a real runs/demo.

    make demo && .venv/bin/python analyze.py runs/demo && .venv/bin/python docs/demo_picture.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from instruments import plots  # noqa: E402
from instruments.record import training_record  # noqa: E402

LAYER, SINCE = "swiglu.w_2", "updates since the start"


def main() -> None:
    run, plt = ROOT / "runs/demo", plots.pyplot()
    record, rows = training_record(run), json.loads((run / "analysis/metrics.json").read_text())
    figure, [(left, right)] = plots.panels(plt, 1, 2, 2.3, top=0.3, across=0.75)
    plots.draw_loss(left, record, record["train/loss"], "tab:blue", "training loss")
    left.set(ylabel="loss (nats a byte)", title="the loss, and its merges")
    left.legend(fontsize=7)
    for metric, style in (("numerical_rank", "--"), ("effective_rank", "-")):
        by_layer = plots.curves(rows, SINCE, metric)[LAYER]
        for line in plots.layer_lines(plt, by_layer, metric, len(by_layer)):
            label = f"{line.label}, {plots.LABELS[metric]}"
            right.plot(*zip(*line.points), f"o{style}", color=line.colour, markersize=3, label=label)
    right.set(title=f"rank of the update ({LAYER}, 128 x 512)", ylim=(0, None))
    right.legend(fontsize=7, handlelength=3)
    for axis in (left, right):
        plots.over_steps(axis)
        for step, _ in record["relora/reset_count"]:
            axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
    figure.savefig(ROOT / "docs/demo.png", dpi=90)


if __name__ == "__main__":
    main()
