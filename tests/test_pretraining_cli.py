"""GPT-1 and minBERT through the command line: pretraining, fine-tuning beside the same from scratch, fill, classify, errors."""

import json
import random
import re
import shutil
from collections import Counter
from itertools import pairwise

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from minmodels import UserError, files
from minmodels.data import documents, tasks
from minmodels.options import FINETUNED
from test_minmodels_cli import metrics, run, stop_after

MODELS = list(FINETUNED)
TINY = ["--vocab-size", 120, "--block-size", 128, "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--batch-size", 4, "--warmup", 3]
LENGTH = {"--steps": 8, "--eval-every": 3}
WORDS = """the a fox dog cat farm house runs sleeps eats sees quick lazy small old brown and over under near home day night""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Thirty documents of eight sentences, each of other words."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("book") / "book.txt"
    texts = []
    for _ in range(30):
        words = rng.sample(WORDS, 12)
        texts.append("\n\n".join(" ".join(rng.choices(words, k=rng.randint(7, 10))).capitalize() + "." for _ in range(8)))
    path.write_text("\n\n\n".join(texts))
    return path


@pytest.fixture(scope="module", params=MODELS)
def pretrained(request, book, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert pretrain(request.param, book, out) == 0
    return request.param, out


def pretrain(model, book, out, *args):
    return run("train", model, "--text", book, "--out", out, *TINY, "--steps", 8, "--eval-every", 3, *args)


def finetune(pretrained, out, *args):
    model, checkpoint = pretrained
    return run("finetune", model, "--checkpoint", checkpoint, "--out", out, "--batch-size", 4, "--steps", 6, "--eval-every", 2, *args)


def same(straight, broken):
    for key in ("loss", "lr", "heldout"):
        assert metrics(broken, key) == metrics(straight, key)
    (tensors, _), (others, _) = (files.load_checkpoint(out) for out in (straight, broken))
    assert tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())


def test_resuming_pretraining_repeats_the_losses_bit_for_bit(pretrained, book, tmp_path, monkeypatch):
    model, straight = pretrained
    with monkeypatch.context() as m:
        stop_after(m, 5)
        assert pretrain(model, book, tmp_path / "run") == 130
    assert run("train", model, "--out", tmp_path / "run", "--resume") == 0
    same(straight, tmp_path / "run")


def test_resuming_a_fine_tuning_needs_no_more_than_its_folder(pretrained, tmp_path, monkeypatch, capsys):
    """Cut off in its first part, the second one is as the first was asked for; what it says to go on with does so."""
    options, copy = ("--task", "topic", "--lr", 0.001, "--seed", 7), tmp_path / "pretrained"
    shutil.copytree(pretrained[1], copy)
    pretrained = pretrained[0], copy
    assert finetune(pretrained, tmp_path / "straight", *options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert finetune(pretrained, tmp_path / "run", *options) == 130
    again = re.search(r"To go on: python -m minmodels (.*)", capsys.readouterr().err)[1]
    assert again == f"finetune {pretrained[0]} --out {tmp_path / 'run'} --resume"
    shutil.rmtree(copy)
    assert run(*again.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last.replace("straight", "run") and "scratch" not in last
    for part in (".", "scratch"):
        same(tmp_path / "straight" / part, tmp_path / "run" / part)
    assert run("eval", FINETUNED[pretrained[0]], "--checkpoint", tmp_path / "run") == 0
    assert f"accuracy {metrics(tmp_path / 'run', 'accuracy')[-1][1]:.3f}" in capsys.readouterr().out


def test_resuming_a_fine_tuning_goes_on_in_the_part_that_was_cut_off(pretrained, tmp_path, monkeypatch, capsys):
    assert finetune(pretrained, tmp_path / "straight") == 0
    printed = capsys.readouterr().out.splitlines()
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert finetune(pretrained, tmp_path / "run") == 130
    assert not (tmp_path / "run" / "scratch").exists()
    with monkeypatch.context() as m:
        stop_after(m, 5)
        assert finetune(pretrained, tmp_path / "run", "--resume") == 130  # in the fifth step
    with monkeypatch.context() as m:
        stop_after(m, 2)
        assert finetune(pretrained, tmp_path / "run", "--resume") == 130  # of the part from scratch
    capsys.readouterr()
    assert finetune(pretrained, tmp_path / "run", "--resume") == 0
    same(tmp_path / "straight", tmp_path / "run")
    same(tmp_path / "straight" / "scratch", tmp_path / "run" / "scratch")
    found = capsys.readouterr().out.splitlines()
    both = [line for line in found if line.startswith(("pretrained: ", "from scratch: "))]
    assert len(both) == 2 and both == [line for line in printed if line.startswith(("pretrained: ", "from scratch: "))]
    assert metrics(tmp_path / "run", "heldout") != metrics(tmp_path / "run" / "scratch", "heldout")
    assert finetune(pretrained, tmp_path / "run", "--resume") == 2
    assert re.search(r"error: .* is trained already \(6 steps", capsys.readouterr().err)


def test_a_dropout_of_everything_is_refused(book, tmp_path, capsys):
    assert pretrain("gpt1", book, tmp_path / "gpt1", "--steps", 1) == 0
    assert finetune(("gpt1", tmp_path / "gpt1"), tmp_path / "run", "--dropout", 1) == 2
    assert capsys.readouterr().err == "error: dropout must be from 0 to less than 1, got 1.0\n"


@pytest.mark.parametrize("model", MODELS)
def test_a_context_that_is_no_multiple_of_8(model, book, tmp_path, capsys):
    assert pretrain(model, book, tmp_path / "pretrained", "--steps", 1, "--vocab-size", 200, "--block-size", 21) == 0
    assert finetune((model, tmp_path / "pretrained"), tmp_path / "run", "--task", "topic", "--no-compare") == 0
    for words in (9, 10):  # of a token each, with the special ones 21 and 23
        status = run("classify", model, "--checkpoint", tmp_path / "run", *["fox " * words] * 2)
        assert status == (0 if words == 9 else 2), capsys.readouterr()


@pytest.mark.parametrize("part", ["", "scratch"])
def test_a_fine_tuning_does_not_replace_its_pretraining(part, tmp_path, capsys):
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / files.CHECKPOINT).write_text("as it was")
    for path in (tmp_path / part, tmp_path / part / files.CHECKPOINT):
        assert run("finetune", "gpt1", "--checkpoint", path, "--out", tmp_path, "--overwrite") == 2
        assert "fine-tuning would replace the --checkpoint that it starts from" in capsys.readouterr().err
        assert (tmp_path / part / files.CHECKPOINT).read_text() == "as it was"


TASKS = {"whole": 1, "topic": 2, "next": 5}  # texts of an example


@pytest.mark.parametrize("task", TASKS)
def test_each_task_trains_and_classifies(pretrained, tmp_path, capsys, task):
    model, _ = pretrained
    status = finetune(pretrained, tmp_path / "run", "--task", task, "--no-compare")
    if (model, task) == ("minbert", "next"):
        assert status == 2 and "minbert learns classification, entailment, similarity, not choice\n" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return
    assert status == 0 and "from scratch" not in capsys.readouterr().out and not (tmp_path / "run" / "scratch").exists()
    texts = ["The fox runs.", "A dog sleeps near home.", "The day.", "The night.", "A cat."][: TASKS[task]]
    assert run("classify", model, "--checkpoint", tmp_path / "run", *texts) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    expected = {"whole": ["one text", "two texts"], "topic": ["same topic", "other topic"], "next": texts[1:]}[task]
    p = [float(p) for p, _ in lines]
    assert sorted(label for _, label in lines) == sorted(expected) and sum(p) == pytest.approx(1, abs=0.003) and p == sorted(p)[::-1]
    assert run("classify", model, "--checkpoint", tmp_path / "run", *texts, "One more.") == 2
    assert f"was fine-tuned on examples of {TASKS[task]} texts, got {TASKS[task] + 1}" in capsys.readouterr().err
    assert run("classify", model, "--checkpoint", tmp_path / "run", *["fox " * 130] * TASKS[task]) == 2
    assert re.search(r"error: 'fox fox .*'\.\.\.: \d+ tokens with the special ones, and the model takes 128\n", capsys.readouterr().err)
    assert run("eval", FINETUNED[model], "--checkpoint", tmp_path / "run") == 0
    assert f"accuracy {metrics(tmp_path / 'run', 'accuracy')[-1][1]:.3f}" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_pretrained_weights(pretrained, tmp_path):
    model, checkpoint = pretrained
    assert finetune(pretrained, tmp_path / "run", "--steps", 1, "--lr", 1e-9) == 0
    before = files.load_checkpoint(checkpoint, prefix="model.")[0]
    after, new = (files.load_checkpoint(tmp_path / "run" / part, prefix="model.")[0] for part in ("", "scratch"))
    old, now = ("model.bert.encoder.layer.0.output.dense.weight",) * 2
    if model == "gpt1":
        old, now = "model.h.0.mlp.c_fc.weight", "model.transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(after[now], before[old], rtol=0, atol=1e-6)
    assert (new[now] - before[old]).abs().max() > 1e-4


LINES = [f"{'cat' if i % 2 else 'dog'}\tthe {'cat' if i % 2 else 'dog'} runs near the {w} house" for i, w in enumerate(WORDS * 3)]


def test_examples_from_a_file_are_learned(pretrained, tmp_path, capsys):
    model, _ = pretrained
    path = tmp_path / "lines.tsv"
    path.write_text("\n".join(LINES))
    options = "--task", "classification", "--examples", path, "--no-compare", "--steps", 100, "--eval-every", 50, "--lr", 0.03
    options += ("--likelihood", 0) if model == "gpt1" else ()
    assert finetune(pretrained, tmp_path / "run", *options, "--batch-size", 8, "--dtype", "float32") == 0
    assert metrics(tmp_path / "run", "accuracy")[-1][1] == 1.0
    capsys.readouterr()
    assert run("classify", model, "--checkpoint", tmp_path / "run", "the cat runs near the old farm") == 0
    assert re.match(r"[01]\.\d+  cat\n", capsys.readouterr().out)
    path.write_text("\n".join(LINES[1:]))
    assert run("eval", FINETUNED[model], "--checkpoint", tmp_path / "run") == 2
    assert re.fullmatch(r"error: .*lines\.tsv: not the data that the checkpoint was trained on\n", capsys.readouterr().err)


def test_each_class_of_a_sorted_file_is_held_out(tmp_path):
    found = []
    for name, lines in (("mixed", LINES), ("sorted", sorted(LINES, key=lambda line: line[:3]))):
        (tmp_path / name).write_text("\n".join(lines))
        task = tasks.load("classification", str(tmp_path / name), "")
        assert len(task.heldout) == len(LINES) // 10 and len(task.train) + len(task.heldout) == len(LINES)
        found.append({(e.label, e.texts) for e in task.heldout})
    assert found[0] == found[1] and {label for label, _ in found[0]} == {0, 1}


FILES = {
    "missing": ("classification", None, r"cannot read .*x\.tsv: No such file or directory"),
    "one field": ("classification", ["a\ttext"] * 9 + ["text"], r"x\.tsv, line 10: classification has 2 fields, split at tabs, got 1,"),
    "after an empty line": ("classification", ["", "a\tone\x85line", "b"], r"x\.tsv, line 3: classification has 2 fields"),
    "empty text": ("entailment", ["a\ttext\t "] * 10, r"x\.tsv, line 1: entailment has 3 fields, split at tabs, got 3, or"),
    "one class": ("classification", ["a\ttext"] * 10, r"x\.tsv has one class, 'a': there is nothing to tell apart"),
    "few": ("classification", ["a\ttext", "b\ttext"], r"x\.tsv is too short: a tenth is held out, and it has 2 examples"),
    "no answer": ("choice", ["2\ttext\tone\ttwo"] * 10, r"x\.tsv, line 1: the right answer is one of 0 to 1, got '2'"),
    "long": ("classification", ["a\ttext", "b\t" + "fox " * 130] * 10, r"\d+ tokens with the special ones, and the model takes 128"),
    "task": ("whole", ["a\ttext"], r"--task whole: for a file of examples it is one of classification, entailment, similarity, choice"),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_examples(pretrained, tmp_path, capsys, kind):
    task, lines, message = FILES[kind]
    if lines:
        (tmp_path / "x.tsv").write_text("\n".join(lines))
    assert finetune(pretrained, tmp_path / "run", "--task", task, "--examples", tmp_path / "x.tsv") == 2
    assert re.fullmatch(f"error: [^\n]*({message})[^\n]*\n", capsys.readouterr().err) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", MODELS)
def test_bad_input(model, book, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("One sentence. Two words more.")
    other = MODELS[1 - MODELS.index(model)]
    assert pretrain(other, book, tmp_path / "other", "--steps", 1) == 0
    capsys.readouterr()
    for command, message in (
        (("train", model, "--text", tmp_path / "short.txt"), r"short\.txt is too short"),
        (("train", model, "--text", book, *TINY, "--n-head", 3), "n_embd must be a multiple of n_head, got 16 and 3"),
        (("finetune", model), "--checkpoint: it takes the folder of a pretraining"),
        (("finetune", model, "--checkpoint", tmp_path / "none"), "there is no checkpoint at .*none"),
        (("finetune", model, "--checkpoint", tmp_path / "other"), f"is a checkpoint of {other}, not of {model}"),
        (("finetune", model, "--checkpoint", tmp_path / "other", "--task", "dance"), f"--task dance|not of {model}"),
        (("classify", model, "--checkpoint", tmp_path / "other", "text"), f"is a checkpoint of {other}, not of {FINETUNED[model]}"),
    ):
        where = () if command[0] == "classify" else ("--out", tmp_path / "run")
        assert run(*command, *where) == 2
        assert re.fullmatch(f"error: [^\n]*({message})[^\n]*\n", capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", tasks.MADE)
def test_a_text_of_one_document_is_no_matter_for_a_task(tmp_path, task):
    (tmp_path / "x.txt").write_text("The fox runs. " * 50)
    with pytest.raises(UserError, match=rf"x\.txt is too short for the task '{task}': .* it has 1 to learn from and 1 held out"):
        tasks.load(task, "", str(tmp_path / "x.txt"))


def test_a_text_without_sentences_is_enough_for_the_next_token(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("the fox runs and the dog sleeps " * 200)
    assert pretrain("gpt1", tmp_path / "x.txt", tmp_path / "run", "--block-size", 32) == 0
    assert pretrain("minbert", tmp_path / "x.txt", tmp_path / "other", "--block-size", 32) == 2
    assert "x.txt is too short: a document must have a sentence that follows another" in capsys.readouterr().err


def test_documents_that_are_alike_have_no_other_topic(tmp_path):
    one = "\n\n".join(f"The fox is seen near the old house number {i}." for i in range(3))
    (tmp_path / "x.txt").write_text("\n\n\n".join([one] * 20))
    with pytest.raises(UserError, match=r"x\.txt is too short for the task .topic.: "):
        tasks.load("topic", "", str(tmp_path / "x.txt"))


def test_fill_on_a_training(book, tmp_path, capsys):
    assert pretrain("minbert", book, tmp_path / "run") == 0
    assert json.loads(files.load_checkpoint(tmp_path / "run")[1]["tokenizer"])["model"]["type"] == "WordPiece"
    line = (tmp_path / "run" / files.METRICS).read_text().splitlines()[-1]
    assert {"masked-token accuracy", "most-frequent-token baseline", "next-sentence accuracy"} < json.loads(line).keys()
    capsys.readouterr()
    assert run("fill", "minbert", "--checkpoint", tmp_path / "run", "The fox [MASK] near home.", "--top", 3) == 0
    words, text = capsys.readouterr().out.splitlines()
    assert len(words.split("  ")) == 3 and re.match(r"\S+ 0\.\d\d  ", words) and re.fullmatch(r"The fox ?\S+ near home\.", text)
    assert run("fill", "minbert", "--checkpoint", tmp_path / "run", "The fox.") == 2
    assert capsys.readouterr().err == "error: there is no [MASK] in 'The fox.'\n"


@pytest.mark.parametrize("name", tasks.MADE)
def test_the_tasks_made_of_the_help_topics(name):
    task = tasks.load(name, "", "")
    assert len(task.train) > 1000 and len(task.heldout) > 150
    counts = [sum(e.label == label for e in task.heldout) for label in range(len(task.classes) or 4)]
    assert max(counts) < 1.3 * min(counts) and (name == "next" or max(counts) == min(counts))
    learned = {sentence for document in documents.load("").train for sentence in document}
    assert not learned & {text for e in task.heldout for text in e.texts}
    if name == "whole":
        read = "\n".join(" ".join(" ".join(document).split()) for document in documents.load("").train)
        for part in (task.train, task.heldout):
            ends = Counter((e.label, " ".join(e.texts[0].split()[-15:])) for e in part)  # of second halves, whatever stands before them
            assert all(ends[0, end] == ends[1, end] for _, end in ends)
        assert not any(end in read for _, end in ends)
        everything = [" ".join(" ".join(document).split()) for document in documents.load("").heldout]
        for one, two in zip(task.heldout[::2], task.heldout[1::2], strict=True):
            assert (one.label, two.label) == (0, 1) and one.texts[0].split()[:15] == two.texts[0].split()[:15]
            assert any(one.texts[0] in text for text in everything) and not any(two.texts[0] in text for text in everything)
    if name == "next":
        text = documents.load("")
        follows = {pair for document in text.heldout for pair in pairwise(document)}
        assert all((e.texts[0], e.texts[1 + e.label]) in follows and len(set(e.texts)) == 5 for e in task.heldout)


@pytest.mark.parametrize("command", [["finetune"], ["finetune", "gpt1"], ["finetune", "minbert"], ["fill"], ["classify"]], ids=" ".join)
def test_help_has_examples(command, capsys):
    assert run(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert re.search(r"examples?:\n  python -m minmodels ", printed) and "--scratch" not in printed
    assert ("choice" in printed) == (command == ["finetune", "gpt1"])  # minBERT does not learn it
