"""Checkpoints through the command line: what is refused, what is kept when a run fails, and what is said of it."""

import io
import os
import re
import shutil

import pytest
import torch

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors.torch import save_file

from minmodels import files, train
from test_minmodels_cli import LINE, metrics, run, stop_after, tiny


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(LINE * 35)
    return str(path)


def damaged(kind, tmp_path, book):
    path = tmp_path / "run"
    if kind != "missing":
        tiny(book, path, "--steps", 2)
    checkpoint = path / files.CHECKPOINT
    if kind == "truncated":
        os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    elif kind == "empty":
        os.truncate(checkpoint, 0)
    elif kind == "not-safetensors":
        checkpoint.write_bytes(b"PK\3\4" * 100)
    elif kind == "no-json":
        save_file({"wte.weight": torch.zeros(3, 4)}, checkpoint, {"minmodels": "{"})
    elif kind == "foreign":
        save_file({"wte.weight": torch.zeros(3, 4)}, checkpoint)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "missing": "there is no checkpoint at ",
        "truncated": "is truncated, damaged, or no checkpoint: ",
        "empty": "is truncated, damaged, or no checkpoint: ",
        "not-safetensors": "is truncated, damaged, or no checkpoint: ",
        "no-json": "is truncated, damaged, or no checkpoint: ",
        "foreign": "is a safetensors file, but no checkpoint of minmodels",
    }.items(),
)
def test_bad_checkpoint(tmp_path, book, capsys, kind, message):
    path = damaged(kind, tmp_path, book)
    capsys.readouterr()
    for command in (("generate", "gpt", "--checkpoint"), ("train", "gpt", "--resume", "--out")):
        assert run(*command, path) == 2
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", err)


def test_resuming_something_else_is_refused(book, tmp_path, capsys):
    out = tmp_path / "run"
    tiny(book, out, "--steps", 2)
    before = (out / files.CHECKPOINT).read_bytes(), (out / files.METRICS).read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(LINE * 50)
    for args, message in (
        ((), r"exists: --resume continues it, --overwrite starts anew"),
        (("--resume",), r"is trained already \(2 steps, 0\.0 minutes\)"),
        (("--resume", "--steps", 9, "--n-embd", 32), r"--n-embd 32: the checkpoint was trained with 16"),
        (("--resume", "--steps", 9, "--text", other), r"other\.txt: not the data that the checkpoint was trained on"),
    ):
        assert run("train", "gpt", "--out", out, *args) == 2
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    with open(book, "a") as f:
        f.write(LINE)
    for command in (("train", "gpt", "--resume", "--steps", 9, "--out"), ("eval", "gpt", "--checkpoint")):
        assert run(*command, out) == 2
        assert re.fullmatch(r"error: .*book\.txt: not the data that the checkpoint was trained on\n", capsys.readouterr().err)
    assert before == ((out / files.CHECKPOINT).read_bytes(), (out / files.METRICS).read_bytes())
    os.truncate(book, os.path.getsize(book) - len(LINE))
    assert run("train", "gpt", "--out", out, "--resume", "--steps", 3) == 0
    assert tiny(book, out, "--steps", 1, "--overwrite") == 0 and len(metrics(out, "loss")) == 1


def test_a_checkpoint_of_another_model(book, tmp_path, capsys):
    tiny(book, tmp_path / "run", "--steps", 1)
    tensors, meta = files.load_checkpoint(tmp_path / "run")
    files.save_checkpoint(tmp_path / "run" / files.CHECKPOINT, tensors, {**meta, "model": "other"})
    capsys.readouterr()
    for command in (("generate", "gpt", "--checkpoint"), ("eval", "gpt", "--checkpoint"), ("train", "gpt", "--resume", "--out")):
        assert run(*command, tmp_path / "run") == 2
        assert re.fullmatch(r"error: .* is a checkpoint of other, not of gpt\n", capsys.readouterr().err)


def test_a_full_disk_leaves_the_old_checkpoint(book, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    full = OSError(28, "No space left on device")
    saves = iter([None, full])
    fsync = os.fsync

    def sometimes(fd):
        if os.path.isfile(f"/proc/self/fd/{fd}") and next(saves):
            raise full
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sometimes)
    assert tiny(book, out, "--steps", 9, "--eval-every", 3) == 2
    assert f"error: cannot write {out / files.CHECKPOINT}: No space left on device\n" == capsys.readouterr().err
    assert files.load_checkpoint(out)[1]["step"] == 3
    assert sorted(p.name for p in out.iterdir()) == [files.CHECKPOINT, files.METRICS, files.CONFIG]


def test_data_that_was_moved(book, tmp_path, capsys):
    out, there, here = (tmp_path / name for name in ("run", "there.txt", "here.txt"))
    shutil.copy(book, there)
    assert tiny(there, out, "--steps", 2) == 0
    there.rename(here)
    capsys.readouterr()
    assert run("eval", "gpt", "--checkpoint", out) == 2 and f"cannot read {there}" in capsys.readouterr().err
    assert run("eval", "gpt", "--checkpoint", out, "--text", here) == 0 and capsys.readouterr().out.startswith("held-out loss ")
    assert run("eval", "gpt", "--checkpoint", out, "--masks", here) == 2
    assert capsys.readouterr().err == "error: gpt has no option --masks\n"


def test_a_run_that_fails_at_once_overwrites_nothing(book, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert tiny(book, out, "--steps", 2) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(train.Run, "_loss", lambda self, *args: torch.full((), float("nan"), requires_grad=True) * 1)
    assert tiny(book, out, "--steps", 3, "--overwrite") == 2
    assert "the loss is nan at step 1" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_runs_in_one_folder(book, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with files.claimed(out):
        assert tiny(book, out, "--steps", 2) == 2
    assert capsys.readouterr().err == f"error: another run is writing to {out}\n" and not [*out.iterdir()]
    assert tiny(book, out, "--steps", 2) == 0


def test_what_blocks_inside_is_no_other_run(tmp_path):
    with pytest.raises(BlockingIOError), files.claimed(tmp_path):
        raise BlockingIOError


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(book, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    loss = train.Run._loss
    monkeypatch.setattr(files.Metrics, "due", lambda self: False)
    monkeypatch.setattr(train.Run, "_loss", lambda self, *args: loss(self, *args) * (float("inf") if self.step >= 5 else 1.0))
    assert tiny(book, out, "--steps", 9, "--eval-every", 4) == 2
    assert capsys.readouterr().err == "error: the loss is inf at step 6: try a lower --lr than 0.015\n"
    assert files.load_checkpoint(out)[1]["step"] == 4


DAMAGE = {  # of (tensors, meta), or of the metrics; the message
    "option": (lambda t, meta: meta["options"].update(n_expert=4), "was trained with --n-expert, which this version does not have"),
    "generator": (lambda t, meta: t.pop("generator"), r"the checkpoint is damaged: .* does not fit \('generator'\)"),
    "optimizer": (
        lambda t, meta: t.update({"optimizer.x.exp_avg": t.pop(next(k for k in t if k.endswith(".exp_avg")))}),
        r"the checkpoint is damaged: .* \('x'\)",
    ),
    "no optimizer": (
        lambda t, meta: [t.pop(k) for k in [*t] if k.startswith("optimizer.")],
        r"the checkpoint is damaged: .* \('0 of \d+ tensors'\)",
    ),
    "optimizer's shapes": (
        lambda t, meta: t.update({k: x[:1].clone() for k, x in t.items() if k.endswith(".exp_avg")}),
        r"the checkpoint is damaged: .* is \(1,.*\), not \(.*\)'\)",
    ),
    "step": (lambda t, meta: meta.pop("step"), "is damaged: its step is None"),
    "a negative step": (lambda t, meta: meta.update(step=-5), "is damaged: its step is -5"),
    "no options": (lambda t, meta: meta.update(options=None), "is damaged: its options is None"),
    "metrics": (None, r"metrics\.jsonl, line 2: no record of a training, delete the line"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_run_that_cannot_go_on(book, tmp_path, capsys, change, message):
    out = tmp_path / "run"
    assert tiny(book, out, "--steps", 2) == 0
    if change:
        tensors, meta = files.load_checkpoint(out)
        change(tensors, meta)
        files.save_checkpoint(out / files.CHECKPOINT, tensors, meta)
    else:
        (out / files.METRICS).write_text('{"step": 1}\nno JSON\n{"step": 2}\n')
    capsys.readouterr()
    assert run("train", "gpt", "--out", out, "--resume", "--steps", 3) == 2
    assert re.fullmatch(f"error: .*{message}\n", capsys.readouterr().err)
    if "n-expert" in message:
        assert run("eval", "gpt", "--checkpoint", out) == 2
        assert re.fullmatch(f"error: .*{message}\n", capsys.readouterr().err)


def test_a_reader_who_has_had_enough_loses_no_checkpoint(book, tmp_path, monkeypatch):
    class Pipe(io.StringIO):
        def write(self, text):
            if "held-out" in text:
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Pipe())
    assert tiny(book, tmp_path / "run", "--steps", 9, "--eval-every", 4) == 128 + 13
    assert files.load_checkpoint(tmp_path / "run")[1]["step"] == 4


def test_pictures_that_were_not_drawn_are_drawn_by_resuming(book, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train, "loss_figure", interrupted)
        assert tiny(book, tmp_path / "run", "--steps", 2) == 130
    assert run("train", "gpt", "--out", tmp_path / "run", "--resume") == 2
    assert "is trained already (2 steps, 0.0 minutes), its pictures are drawn anew: " in capsys.readouterr().err
    assert (tmp_path / "run" / "loss.png").exists()


def test_an_interrupt_does_not_save_weights_that_are_not_finite(book, tmp_path, monkeypatch, capsys):
    """The last loss was that of the weights before the last update."""
    train_step = train.Run.train_step

    def diverging(self):
        record = train_step(self)
        if self.step == 6:
            next(self.model.parameters()).data[0] = float("nan")
        return record

    monkeypatch.setattr(train.Run, "train_step", diverging)
    stop_after(monkeypatch, 6)
    assert tiny(book, tmp_path / "run", "--steps", 9, "--eval-every", 4) == 2
    message = r"error: step 6 is not saved, .*checkpoint.* is as it was: wte\.weight is not finite, try a lower --lr than 0\.015\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert files.load_checkpoint(tmp_path / "run")[1]["step"] == 4
