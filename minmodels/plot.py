"""The picture of a training run, and that of average precision."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from minmodels import files
from minmodels.metrics import Curve

plain = matplotlib.rc_context({"text.parse_math": False})  # decorates what makes a figure: a $ in a name begins no formula


@plain
def loss_figure(metrics: Path, title: str, unit: str) -> Figure:
    """Training and held-out loss over the seconds of training, from the lines of metrics.jsonl."""
    records = files.records(metrics)
    steps, tests = ([r for r in records if key in r] for key in ("loss", "heldout"))
    width = max(1, len(steps) // 100)
    parts = [steps[i : i + width] for i in range(0, len(steps), width)]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(_column(steps, "seconds"), _column(steps, "loss"), color="tab:blue", alpha=0.25, linewidth=0.5)
    means = ([statistics.mean(_column(part, key)) for part in parts] for key in ("seconds", "loss"))
    axes.plot(*means, color="tab:blue", label=f"training, mean over {width} steps" if width > 1 else "training")
    axes.plot(_column(tests, "seconds"), _column(tests, "heldout"), "o-", color="tab:orange", label="held-out")
    last = tests[-1]["seconds"], tests[-1]["heldout"]
    axes.annotate(f"{last[1]:.3f}", last, (0, 8), textcoords="offset points", ha="center", color="tab:orange", weight="bold")
    axes.set(title=drawable(title), xlabel="training time (s)", ylabel=f"loss ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper right")  # "best" takes seconds with many steps
    return figure


@plain
def precision_recall_figure(curves: Mapping[str, Curve], title: str) -> Figure:
    """The curves of CocoAP.curve() or VocAP.curve(), by the names that they get in the legend."""
    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve.recall, curve.precision, label=name)
    axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    legend = axes.legend(axes.lines, ["?"] * len(curves), frameon=False)
    for text, name in zip(legend.get_texts(), curves, strict=True):
        text.set_text(name)  # as a label one that begins with _ would be left out
    return figure


def drawable(name: str) -> str:
    """The name of a file, whose bytes need not be text: Matplotlib refuses others."""
    return name.encode(errors="replace").decode()


def _column(records: list[dict], key: str) -> list[float]:
    return [record[key] for record in records]
