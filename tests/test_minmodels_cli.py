"""Training and generation through the command line: exact resumption, files left behind, the text of each error."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("matplotlib")  # the extra "models": a machine that has torch alone can run the other tests
pytest.importorskip("rich")
pytest.importorskip("safetensors")
import minkernels
from minmodels import files, train
from minmodels.__main__ import main
from minmodels.data import text as textdata
from minmodels.options import GPTOptions

TINY = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--batch-size", "4", "--warmup", "3"]
LINE = "the quick brown fox jumps over the lazy dog.\n"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(LINE * 30 + "Å, seen at the end alone: " + LINE * 5, encoding="utf-8")
    return str(path)


def run(*args):
    try:
        return main([str(a) for a in args])
    except SystemExit as error:  # argparse
        return error.code


def tiny(book, out, *args):
    return run("train", "gpt", "--text", book, "--out", out, *TINY, *args)


def metrics(out, key):
    records = [json.loads(line) for line in (out / files.METRICS).read_text().splitlines()]
    return [(r["step"], r[key]) for r in records if key in r]


def stop_after(monkeypatch, step):
    """Sends this process SIGINT, as Ctrl-C does, in the given step."""
    train_step = train.Run.train_step

    def stopped(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self)

    monkeypatch.setattr(train.Run, "train_step", stopped)


@pytest.mark.parametrize("dtype", GPTOptions.__dataclass_fields__["dtype"].metadata["choices"])
def test_resuming_repeats_the_losses_bit_for_bit(book, tmp_path, monkeypatch, capsys, dtype):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = "--steps", 12, "--eval-every", 4, "--dtype", dtype, "--seed", 3
    assert tiny(book, straight, *options) == 0
    with monkeypatch.context() as m:
        stop_after(m, 6)
        assert tiny(book, broken, *options) == 130
    assert f"error: interrupted; {broken / files.CHECKPOINT} holds step 6. To go on: " in capsys.readouterr().err
    assert run("train", "gpt", "--out", broken, "--resume") == 0
    for key in ("loss", "lr", "heldout"):
        assert metrics(broken, key) == metrics(straight, key)
    assert [step for step, _ in metrics(straight, "heldout")] == [4, 8, 12]
    (tensors, meta), (others, meta2) = (files.load_checkpoint(out) for out in (straight, broken))
    assert tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())
    assert meta["step"] == meta2["step"] == 12


def test_a_killed_run_resumes_from_its_last_evaluation(book, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = "--steps", 9, "--eval-every", 4
    tiny(book, straight, *options)
    train_step = train.Run.train_step
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(train.Run, "train_step", lambda self: train_step(self) if self.step < 7 else 1 / 0)
        m.setattr(files.Metrics, "due", lambda self: True)
        tiny(book, broken, *options)
    with (broken / files.METRICS).open("a") as f:
        f.write('{"step": 8, "lo')  # cut off in the middle of a line
    assert files.load_checkpoint(broken)[1]["step"] == 4 and len(metrics_lines(broken)) == 9
    assert run("train", "gpt", "--out", broken, "--resume") == 0
    assert metrics(broken, "loss") == metrics(straight, "loss")


def metrics_lines(out):
    return (out / files.METRICS).read_text().splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_ends_a_process_with_a_checkpoint(book, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "minmodels", "train", "gpt", "--text", book, "--out", out, *TINY, "--steps", "1000000"]
    process = subprocess.Popen([*command, "--eval-every", "5"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not (out / files.CHECKPOINT).exists():
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    step = int(re.search(r"^error: interrupted; .* holds step (\d+)\. To go on: ", error, re.M)[1])
    assert files.load_checkpoint(out)[1]["step"] == step == metrics(out, "loss")[-1][0] and "Traceback" not in error
    assert sorted(p.name for p in out.iterdir()) == [files.CHECKPOINT, files.METRICS, files.CONFIG]


def test_a_run_says_how_it_was_made(book, tmp_path):
    assert tiny(book, tmp_path / "run", "--steps", 2, "--lr", 0.003) == 0
    found = json.loads((tmp_path / "run" / files.CONFIG).read_text())
    assert found["model"] == "gpt" and found["options"]["lr"] == 0.003 and found["config"]["block_size"] == found["options"]["block_size"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_nobody_takes(book, tmp_path):
    """A full disk behind standard output; and a reader who has had enough."""
    assert tiny(book, tmp_path / "run", "--steps", 2) == 0
    command = [sys.executable, "-m", "minmodels", "generate", "gpt", "--checkpoint", str(tmp_path / "run"), "--tokens", "9"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: what it prints cannot be written: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 128 + 13 and done.stderr == ""


def test_a_terminal_that_cannot_show_what_is_written():
    code = """if True:
        import runpy, sys, types
        sys.modules["minmodels.generate"] = types.SimpleNamespace(generate=lambda **given: "Å \\U0001f600!")
        sys.argv[1:] = "generate", "gpt", "--checkpoint", "x"
        runpy.run_module("minmodels", run_name="__main__")"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? ?!\n", "")


def test_a_name_that_is_too_long_where_there_is_no_output(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    assert tiny(book, tmp_path / ("a" * 300)) == 2
    assert re.fullmatch(r"error: .*aaa.*: File name too long\n", capsys.readouterr().err)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd")
def test_a_text_from_a_pipe(book, tmp_path):
    """As a shell gives it for --text <(command)."""
    reader, writer = os.pipe()
    with open(book, "rb") as f, open(writer, "wb") as pipe:
        pipe.write(f.read())
    assert tiny(f"/dev/fd/{reader}", tmp_path / "run", "--steps", 1) == 0
    os.close(reader)


def test_a_path_is_printed_as_it_is(capsys):
    train.Output().print("runs/:fire:/[b]x")
    assert capsys.readouterr().out == "runs/:fire:/[b]x\n"


def test_metrics_are_whole_lines_on_a_full_disk(tmp_path):
    """The kernel itself refuses, in the middle of a record."""
    script = """if True:
        import pathlib, resource, signal
        from minmodels import UserError, files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        metrics = files.Metrics(pathlib.Path("m.jsonl"), 0)
        metrics.write({"step": 1, "loss": float("nan")})
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
        try:
            metrics.write(*({"step": step} for step in range(2, 9)))
        except UserError as error:
            print(error)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "cannot write m.jsonl: File too large\n" and not done.stderr
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_minutes_bound_the_training(book, tmp_path):
    assert tiny(book, tmp_path / "run", "--minutes", 0.01) == 0
    steps = [json.loads(line) for line in metrics_lines(tmp_path / "run") if '"lr"' in line]
    seconds, rates = [s["seconds"] for s in steps], [s["lr"] for s in steps]
    assert len(seconds) > 3 and seconds[-2] < 0.6 <= seconds[-1]
    for step in (3, len(rates) - 1):  # after the warm-up; by the clock, whatever else the machine does
        assert rates[step] == pytest.approx(GPTOptions.lr * (1 + math.cos(math.pi * seconds[step - 1] / 0.6)) / 2)


def test_accumulated_batches_are_one_step_of_the_mean_gradient(book, tmp_path):
    options = "--steps", 3, "--batch-size", 2, "--accumulate", 2
    assert tiny(book, tmp_path / "a", *options, "--weight-decay", 0.1) == 0
    assert len(metrics(tmp_path / "a", "loss")) == 3
    run = train.Run("gpt", GPTOptions(text=book, block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=2, accumulate=2))
    generator = torch.Generator().manual_seed(0)
    parts = [run.recipe.batch(generator) for _ in range(2)]
    batches = iter(parts)
    run.recipe.batch = lambda generator: next(batches)
    loss = run.train_step()["loss"]
    fresh = train.Run("gpt", run.options)
    with torch.no_grad():
        expected = torch.stack([fresh.model(*part) for part in parts]).mean()
    torch.testing.assert_close(loss, expected)


def test_training_learns_and_generation_continues(book, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny(book, out, "--steps", 120, "--n-embd", 32) == 0
    assert metrics(out, "heldout")[-1][1] < 1.0  # a repeated line; the letters alone have 3 nats
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run("eval", "gpt", "--checkpoint", out) == 0
    assert capsys.readouterr().out == f"held-out loss {metrics(out, 'heldout')[-1][1]:.3f}\n"
    texts = []
    for args in (("--temperature", 0), ("--seed", 5), ("--seed", 5), ("--seed", 6), ("--temperature", 0, "--prompt", "")):
        assert run("generate", "gpt", "--checkpoint", out, "--prompt", "the quick brown", "--tokens", 40, "--temperature", 2, *args) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("the quick brown fox jumps over the lazy dog.\nthe quick") and len(texts[0]) == 15 + 40 + 1
    assert texts[1] == texts[2] != texts[3]
    assert texts[4].startswith("the quick") and len(texts[4]) == 41  # as after a line break


TEXTS = {
    "missing": (None, r"cannot read .*x\.txt: No such file or directory"),
    "empty": (b"", r"x\.txt is empty"),
    "blank": (b" \n\n", r"x\.txt holds nothing but white space"),
    "binary": (b"text\0text", r"x\.txt is binary, not text: a NUL byte at offset 4"),
    "latin-1": ("caf\u00e9".encode("latin-1"), r"x\.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    "short": (b"too short " * 15, r"x\.txt is too short for a context of 16 characters: it has 150, of which 15 are held out"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
def test_bad_text(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    assert tiny(tmp_path / "x.txt", tmp_path / "run") == 2
    assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=repr)
def test_ends_of_lines_of_other_systems(tmp_path, end):
    found = []
    for name, line in (("x.txt", "\n"), ("y.txt", end)):
        (tmp_path / name).write_bytes((LINE * 20 + "\n\n" + LINE * 20).replace("\n", line).encode())
        found.append(textdata.load(str(tmp_path / name), 16))
    assert found[0].sha256 == found[1].sha256 and "\r" not in found[1].vocab


BAD_OPTIONS = {
    "train bart": "invalid choice: 'bart'",
    "train gpt --steps 0": "must be a whole number from 1 on, got '0'",
    "train gpt --steps 5 --minutes 1": "not allowed with argument --steps",
    "train gpt --lr nan": "must be a number from 0 on, got 'nan'",
    "train gpt --minutes 0": "must be more than 0, got '0'",
    "train gpt --dtype float16": "invalid choice: 'float16'",
    "train gpt --n-head 3": "error: n_embd must be a multiple of n_head, got 128 and 3",
    "train gpt --n-embd 4000000000": "error: not enough memory, ask for smaller sizes or batches. ",
    "train gpt --device nowhere": "error: device nowhere cannot be used: ",
    "train gpt --device hpu": "error: device hpu cannot be used: not one of cpu",
    "train gpt --device meta": "error: device meta cannot be used: not one of cpu",
    f"train gpt --seed {2**63}": f"argument --seed: must be less than 2**63, got '{2**63}'",
    "generate gpt": "the following arguments are required: --checkpoint",
    "generate gpt --checkpoint x --temperature -1": "must be a number from 0 on, got '-1'",
    "generate gpt --checkpoint x --tokens -1": "must be a whole number from 0 on, got '-1'",
    "generate gpt --checkpoint x --prompt a\udcff": r"argument --prompt: must be UTF-8 text, got 'a\udcff'",
    "fill minbert --checkpoint x a\udcff": r"argument TEXT: must be UTF-8 text, got 'a\udcff'",
    "classify gpt1 --checkpoint x a b\udcff": r"argument TEXT: must be UTF-8 text, got 'b\udcff'",
    "dance": "invalid choice: 'dance'",
    "": "the following arguments are required: COMMAND",
}


@pytest.mark.parametrize(("line", "message"), BAD_OPTIONS.items())
def test_bad_options(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore"), MemoryError()], ids=str)
def test_too_little_memory_for_a_step(book, tmp_path, monkeypatch, capsys, error):
    def full(self):
        raise error

    monkeypatch.setattr(train.Run, "train_step", full)
    assert tiny(book, tmp_path / "run") == 2
    assert re.fullmatch(r"error: not enough memory, ask for smaller sizes or batches\. (CUDA out of.* 8 GiB)?\n", capsys.readouterr().err)


@pytest.mark.parametrize("level", ["avx2", "avx512_bf16"])
@pytest.mark.parametrize("dtype", GPTOptions.__dataclass_fields__["dtype"].metadata["choices"])
def test_a_dtype_that_the_cpu_emulates(book, tmp_path, monkeypatch, capsys, library, dtype, level):
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", level)
    assert tiny(book, tmp_path / "run", "--steps", 1, "--device", "cpu", "--dtype", dtype) == 0
    slow = dtype == "bfloat16" and minkernels.info().cpu_level in ("plain", "avx2")
    assert ("--dtype float32 is several times as fast" in capsys.readouterr().out) == slow


def test_an_environment_variable_that_says_nothing(book, tmp_path, monkeypatch, capsys, library):
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", "AVX2")
    assert tiny(book, tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: MINKERNELS_CPU_LEVEL must be plain, avx2, avx512 or avx512_bf16, got AVX2\n"


def test_a_prompt_with_unknown_characters(book, tmp_path, capsys):
    tiny(book, tmp_path / "run", "--steps", 1)
    assert run("generate", "gpt", "--checkpoint", tmp_path / "run", "--prompt", "the Ωmega\tfox Å") == 2
    assert capsys.readouterr().err == "error: characters that the model has never seen: '\\t' 'Ω'\n"  # Å: held out, yet known


@pytest.mark.parametrize("command", [[], ["train"], ["train", "gpt"], ["eval"], ["generate"], ["showcase"]], ids=" ".join)
def test_help_has_examples_and_needs_no_torch(command, capsys):
    code = "import sys; sys.modules['torch'] = None; from minmodels.__main__ import main; main(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and re.search(r"examples?:\n  python -m minmodels ", result.stdout)


def test_the_topics_held_out_share_no_paragraph_with_the_rest():
    text = textdata.load("", 64)
    train_text, heldout = (textdata.decode(ids, text.vocab) for ids in (text.train, text.heldout))
    assert 0.09 < len(heldout) / (len(train_text) + len(heldout)) < 0.11
    long = [p.strip() for p in heldout.split("\n\n") if len(p) > 60]
    assert len(long) > 50 and not any(p in train_text for p in long)
    assert torch.equal(text.heldout, textdata.load("", 64).heldout)


def test_windows():
    ids = torch.arange(100, dtype=torch.int32)
    idx, targets = textdata.sample(ids, 50, 8, torch.Generator().manual_seed(0))
    assert idx.shape == (50, 8) and torch.equal(targets, idx + 1) and torch.equal(idx - idx[:, :1], torch.arange(8).expand(50, 8))
    assert textdata.sample(ids[:9], 4, 8, torch.Generator())[1][:, -1].tolist() == [8] * 4
    for block_size in (1, 8, 9, 99):  # each target once, from the half of a window before it at least
        idx, targets = textdata.sweep(ids, block_size)
        assert targets[targets >= 0].tolist() == list(range(1, 100)) and (targets[0] >= 0).all()
        assert torch.equal((idx + 1)[targets >= 0], targets[targets >= 0]) and (targets[1:, : block_size // 2] == -1).all()
        near = textdata.mean_loss((idx, targets), lambda idx, targets: targets[targets >= 0].double().mean())
        assert near == pytest.approx(50)
    targets = textdata.sweep(ids, 9, most=20)[1]
    assert targets.max() == 99 and len(targets) == 4 and (targets >= 0).sum() == 9 + 5 + 5 + 5


def test_the_whole_default_text_is_judged_and_of_a_long_one_how_much_is_told():
    assert len(textdata.load("", 64).heldout) < textdata.MOST == 65536
    ids = torch.zeros(200_000, dtype=torch.int32)
    assert textdata.told(ids[:99]) == "99 held out" and textdata.told(ids) == "200,000 held out, 65,536 of them judged"
    assert 65_536 <= (textdata.sweep(ids, 64)[1] >= 0).sum() < 65_536 + 64
