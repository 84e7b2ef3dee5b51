"""The showcase: its page, what it says of a part that fails or cannot be done here, and how it ends when it is interrupted."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from rich.console import Console

from minmodels import UserError, exhibits, forked, page, showcase, speed
from minmodels.__main__ import main
from minmodels.exhibits import EXHIBITS
from test_minmodels_cli import LINE, run
from vision_cases import shapes, squares

SIZES = {
    "attention": (1, 2, 33, 16), "cross_entropy": (70, 50), "linear_cross_entropy": (9, 16, 50), "bce_dice_loss": (2, 3, 9),
    "iou_match": (2, 30, 4), "yolo_detect": (2, 3, 3),
}  # fmt: skip
TRANSFORMER = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4"
OPTIONS = {
    "gpt": TRANSFORMER,
    "bigram": "--block-size 16 --batch-size 4",
    "adder": TRANSFORMER.removeprefix("--block-size 16 "),
    "transformer": TRANSFORMER.removeprefix("--block-size 16 "),
    "gpt1": TRANSFORMER + " --vocab-size 300",
    "minbert": TRANSFORMER + " --vocab-size 120",
    "unet": "--images {0}/images --masks {0}/masks --width 4 --depth 2 --crop 32 --batch-size 4",
    "yolo": "--yolo {1} --width 4 --cells 4 --batch-size 4",
}


@pytest.fixture
def book(tmp_path):
    path, line = tmp_path / "book.txt", LINE.capitalize()
    path.write_text("\n\n\n".join(f"{line}\n{letter} is <b>another</b> & more. {line}" for letter in "ABCDEFGHIJKLMNOPQRST"))
    return str(path)


def tiny(monkeypatch, tmp_path, *names):
    """The exhibits of those names, made tiny, with data of our own."""
    places = tmp_path / "masks", tmp_path / "boxes"
    if "unet" in names:
        squares(places[0])
    if "yolo" in names:
        shapes(places[1])
    chosen = [one._replace(options=OPTIONS[one.name].format(*places), bfloat16=False) for one in EXHIBITS if one.name in names]
    monkeypatch.setattr(exhibits, "EXHIBITS", tuple(chosen))


class Now:
    """A process, run here and at once."""

    def __init__(self, argv, threads, errors):
        assert argv[0] == "train" and threads >= 1
        self.argv, self.errors = argv, errors

    def start(self):
        with open(self.errors, "w") as f, contextlib.redirect_stderr(f), contextlib.redirect_stdout(None):
            self.exitcode = run(*self.argv)

    def is_alive(self):
        return False


RUN = forked.run


def without_tokenizers(argv, threads, errors):
    sys.modules["tokenizers"] = None
    RUN(argv, threads, errors)


def sleep(argv, threads, errors):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as run() does
    if "gpt" in argv:
        time.sleep(99)
    Path(errors).write_text("error: no sums today\n")
    sys.exit(1)


class Page(HTMLParser):
    """Its text, its pictures, and whether its tags are balanced."""

    EMPTY = "meta", "link", "img", "br"

    def __init__(self, path):
        super().__init__()
        self.open, self.pictures, self.text, self.links, self.sections = [], [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script" and not any(name.startswith("on") for name in attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag == "img":
            self.pictures.append((attrs["src"], attrs["alt"]))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] == ["h2"]:
            self.sections.append(data)


def shown(out):
    found = Page(out / "index.html")
    for src, alt in found.pictures:
        assert (out / src).read_bytes().startswith(b"\x89PNG") and len(alt) > 20
    assert not any(re.match("[a-z]+:(?!,)|/", link) for link in found.links)  # all beside it, but for the empty icon
    return found


def test_the_page_shows_each_model(book, tmp_path, monkeypatch, capsys):
    pytest.importorskip("minkernels._host")
    names, with_tokens = [one.name for one in EXHIBITS], importlib.util.find_spec("tokenizers") is not None
    folders = [name for name in names if with_tokens or name not in ("minbert", "gpt1")]
    tiny(monkeypatch, tmp_path, *names)
    monkeypatch.setattr(forked, "process", Now)
    out = tmp_path / "show"
    for _ in range(2):  # the second one over the first
        showcase.showcase(book, str(out), minutes=0.01, seconds=0.01, sizes=SIZES)
        assert sorted(os.listdir(out)) == sorted([*folders, "index.html"])
    printed, found = capsys.readouterr().out, shown(out)
    if not with_tokens:
        assert "minBERT" in found.sections and "Left out: tokenizers is not installed: pip install" in found.text
    titles = [f"{one.title}: {one.claim}" for one in EXHIBITS if one.name in folders and one.name != "bigram"]
    assert [title for title in found.sections if ": " in title] == titles and found.sections[-2:] == ["The ops", "This machine"]
    pictures = ["gpt/loss.png", "unet/segmentation.png", "yolo/detections.png", "yolo/precision_recall.png"]
    assert [src for src, _ in found.pictures] == pictures
    for text in ("minGPT writes", "the bigram model", "nats per character", "unseen sums right", "minUNet: Dice", "minYOLO: AP50"):
        assert text in found.text
    assert len(re.findall(r"\d+ \+ \d+", found.text)) == 8 and "python -m minmodels train unet --images" in found.text
    if with_tokens:
        assert found.text.count("[MASK]") == exhibits.SENTENCES and found.text.count("It was: ") == 2 * exhibits.SENTENCES
    for row in ("attention fwd", "linear_cross_entropy fwd+bwd", "yolo_detect fwd"):
        assert row in found.text and row in printed
    assert "C++ library" in found.text
    assert printed.endswith(f"The page: {out / 'index.html'}\n") and len(printed.splitlines()) < 2 * 40


def test_a_missing_package_leaves_out_one_part(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch, tmp_path, "minbert", "adder")
    monkeypatch.setattr(forked, "run", without_tokenizers)
    showcase.showcase("", str(tmp_path / "show"), minutes=0.01, seconds=0.01, sizes=SIZES)
    reason = "left out: tokenizers is not installed: pip install 'minkernels[models]'"
    assert re.search(rf"^minBERT +\d+ s  {re.escape(reason)}$", capsys.readouterr().out, re.M)
    found = shown(tmp_path / "show")
    assert found.sections[:2] == ["adder: it adds", "minBERT"] and reason.replace("left", "Left") in found.text


def test_parts_that_fail_leave_the_others(book, tmp_path, monkeypatch, capsys):
    tiny(monkeypatch, tmp_path, "gpt", "bigram", "adder", "minbert", "unet")
    failures = {"gpt": "--n-head 3", "unet": "--masks nowhere"}
    chosen = [one._replace(options=f"{one.options} {failures.get(one.name, '')}") for one in exhibits.EXHIBITS]
    chosen = [one._replace(show=lambda run: 1 / 0) if one.name == "bigram" else one for one in chosen]
    monkeypatch.setattr(exhibits, "EXHIBITS", tuple(chosen))

    class Crashes(Now):
        def start(self):
            super().start()
            if "minbert" in self.argv:
                Path(self.errors).write_text("")
                self.exitcode = -signal.SIGSEGV

    monkeypatch.setattr(forked, "process", Crashes)
    monkeypatch.setattr(showcase, "BUDGET", 0.0)  # whoever is late has a tenth of its time
    out = tmp_path / "show"
    showcase.showcase(book, str(out), minutes=0.01, seconds=0.01, sizes=SIZES)
    printed, found = capsys.readouterr().out, shown(out)
    assert found.sections == ["minGPT", "bigram", "adder: it adds", "minBERT", "minUNet", "The ops", "This machine"] and not found.pictures
    assert re.search(r"train adder .* --minutes 0\.00035$", found.text, re.M)
    for reason in (
        "n_embd must be a multiple of n_head, got 16 and 3",
        "ZeroDivisionError: division by zero",
        f"the training ended with status {-signal.SIGSEGV}",
        "nowhere is no folder",
    ):
        assert re.search(f"left out: .*{reason}", printed) and re.search(f"Left out: .*{reason}", found.text)


def test_a_file_in_the_way_leaves_out_one_part(book, tmp_path, monkeypatch, capsys):
    tiny(monkeypatch, tmp_path, "gpt", "adder")
    monkeypatch.setattr(forked, "process", Now)
    out = tmp_path / "my show"
    out.mkdir()
    (out / "gpt").touch()
    showcase.showcase(book, str(out), minutes=0.01, seconds=0.01, sizes=SIZES)
    assert re.search(r"^minGPT +\d+ s  left out: cannot write ", capsys.readouterr().out, re.M)
    assert f"--out '{out / 'adder'}'" in shown(out).text  # a command that a shell takes


def test_a_file_whose_name_is_no_text(book, tmp_path, monkeypatch):
    tiny(monkeypatch, tmp_path, "gpt")
    monkeypatch.setattr(forked, "process", Now)
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), errors="replace"))  # as the command line has it
    text = tmp_path / os.fsdecode(b"caf\xe9.txt")
    os.rename(book, text)
    showcase.showcase(str(text), str(tmp_path / "show"), minutes=0.01, seconds=0.01, sizes=SIZES)
    assert re.search(r"train gpt .*/caf\?\.txt' ", shown(tmp_path / "show").text)


def test_one_that_takes_too_long_is_stopped(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch, tmp_path, "gpt", "adder")
    monkeypatch.setattr(showcase, "GRACE", 0.0)
    monkeypatch.setattr(forked, "run", sleep)
    with pytest.raises(UserError, match="nothing can be shown: "):
        showcase.showcase("", str(tmp_path / "show"), minutes=0.05)
    assert re.search(r"^minGPT +\d s  left out: it was not done after 3 seconds$", capsys.readouterr().out, re.M)
    assert not (tmp_path / "show" / "index.html").exists()


def test_a_forked_command_is_the_command(tmp_path):
    errors = tmp_path / "errors"
    errors.touch()
    command = ["train", "bigram", "--steps", "2", "--out"]
    for status, said in ((0, ""), (2, "error: .* exists: --resume continues it, --overwrite starts anew\n")):
        process = forked.process([*command, str(tmp_path / "run")], 1, str(errors))
        process.start()
        process.join(120)
        assert process.exitcode == status and re.fullmatch(said, errors.read_text()), errors.read_text()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "minmodels", *command, tmp_path / "alone"]
    subprocess.run(alone, check=True, env=environment, stdout=subprocess.DEVNULL)
    losses = [[json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("run", "alone")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupted_it_ends_its_trainings_and_writes_no_page(book, tmp_path, number):
    out = tmp_path / "show"
    command = [sys.executable, "-m", "minmodels", "showcase", "--text", book, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not any(out.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and error == "error: interrupted; no page was written\n"
    sizes = {path: path.stat().st_size for path in out.glob("*/metrics.jsonl")}
    assert sizes and not (out / "index.html").exists()
    time.sleep(0.5)
    assert sizes == {path: path.stat().st_size for path in out.glob("*/metrics.jsonl")}  # nobody writes on


def test_bad_input(tmp_path, capsys):
    assert main(["showcase", "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path / "show")]) == 2
    assert re.fullmatch(r"error: cannot read .*none\.txt: No such file or directory\n", capsys.readouterr().err)
    (tmp_path / "file").touch()
    assert main(["showcase", "--out", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"error: cannot write .*file: File exists\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["file"]


def test_what_stands_on_the_page_is_text(tmp_path):
    sections = page.section("<i>", "a & b", page.text("<t>", "<script>x</script>"), command="--a '<b>'"), page.left_out("<u>", 'no "<v>"')
    path = tmp_path / "index.html"
    path.write_text(page.page("<h>", "<a>", [("<1>", "<2>")], sections, "<f>"), encoding="utf-8")
    found = Page(path)
    assert found.sections == ["<i>", "<u>"]
    for text in ("<h>", "<a>", "<1>", "<2>", "a & b", "<t>", "<script>x</script>", "--a '<b>'", 'Left out: no "<v>"', "<f>"):
        assert text in found.text


def test_the_ops_are_measured_and_judged_on_both_roads():
    rows = speed.measure(seconds=0.01, sizes=SIZES)
    softmax = [(f"{op} {what}", dtype) for op, what in (("attention", "fwd"), ("attention", "fwd+bwd"), ("cross_entropy", "fwd+bwd"),
               ("linear_cross_entropy", "fwd+bwd"), ("bce_dice_loss", "fwd+bwd")) for dtype in ("fp32", "bf16")]  # fmt: skip
    assert [row[:2] for row in rows] == [*softmax, ("iou_match fwd", "fp32"), ("yolo_detect fwd", "fp32")]
    for row in rows:
        assert row.ms > 0 and row.torch_ms > 0 and row.cells()[4] == f"{row.torch_ms / row.ms:.2f}x"
        assert all(0 <= e < (1e-5 if row.dtype == "fp32" else 3e-2) for e in (row.error, row.torch_error))
    assert sum(row.error > 0 for row in rows) > 8


def test_the_table_fits_a_terminal():
    row = speed.Row("linear_cross_entropy fwd+bwd", "fp32", 0.8802, 1234.5, 1.2e-7, 3.4e-7)
    console = Console(width=80, file=StringIO())
    console.print(speed.table([row]))
    _, head, _, cells = (" ".join(line.split()) for line in console.file.getvalue().splitlines())
    assert head == " ".join(speed.HEAD) and cells == " ".join(row.cells())


def test_a_guess_that_html_has_signs_for():
    assert exhibits._guesses([("'", 0.5), ("<", 0.2)], "'").count("&#x27;") == 2  # the guess, and what it was
