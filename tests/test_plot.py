"""The pictures of training runs: what they show, and names that Matplotlib would take for something else."""

import json
import warnings

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # of the extra "models"
pytest.importorskip("PIL")

from minmodels import plot, segment
from minmodels.data.masks import Example
from minmodels.metrics import Curve

NAMES = ["$x_$", "_hidden", "50 $", "plain"]
NO_TEXT = "caf\udce9"  # what Python makes of a name of Latin-1


def test_loss_curve(tmp_path):
    lines = [{"step": i, "loss": 3.0 / i + 1, "lr": 0.1, "seconds": 0.1 * i} for i in range(1, 251)]
    lines.insert(125, {"step": 125, "heldout": 1.1, "seconds": 12.5})
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 250, "heldout": 1.0, "seconds": 25.0}]))
    figure = plot.loss_figure(tmp_path / "m", "a title", "nats")
    axes = figure.axes[0]
    assert axes.get_title() == "a title" and axes.get_xlabel() == "training time (s)" and "nats" in axes.get_ylabel()
    raw, mean, heldout = axes.get_lines()
    assert len(raw.get_xdata()) == 250 and len(mean.get_xdata()) == 125 and list(heldout.get_ydata()) == [1.1, 1.0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["training, mean over 2 steps", "held-out"]


def drawn(figure, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [*NAMES, NO_TEXT])
def test_any_name_is_drawn_as_it_is(tmp_path, name):
    (tmp_path / "m").write_text('{"step": 1, "loss": 2.0, "seconds": 1.0}\n{"step": 1, "heldout": 1.0, "seconds": 1.0}\n')
    drawn(plot.loss_figure(tmp_path / "m", f"gpt learns a{name}_$b", name.replace(NO_TEXT, "nats")), tmp_path / "loss.png")
    example = Example(f"a{name}_$b", np.eye(8, dtype=np.uint8), np.eye(8, dtype=np.uint8))
    drawn(segment.figure([example], [example.mask], 1), tmp_path / "segmentation.png")


def test_each_class_stands_in_the_legend(tmp_path):
    curve = Curve(np.array([0.0, 1.0]), np.array([1.0, 0.5]), np.array([0.9, 0.1]))
    figure = plot.precision_recall_figure(dict.fromkeys(NAMES, curve), "a $ title_$")
    drawn(figure, tmp_path / "curves.png")
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == NAMES
