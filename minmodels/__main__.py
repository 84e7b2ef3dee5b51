"""The command line: python -m minmodels COMMAND. torch is imported only once the arguments are read."""

import argparse
import contextlib
import functools
import math
import os
import sys
from dataclasses import fields

from minmodels import UserError
from minmodels.options import FINETUNED, KERNELS, MODELS

EXAMPLES = """examples:
  python -m minmodels train gpt --minutes 1
  python -m minmodels train gpt --text book.txt --steps 2000 --out runs/book
  python -m minmodels train gpt --help
  python -m minmodels generate gpt --checkpoint runs/book --prompt "Once upon"
  python -m minmodels train unet --dtype bfloat16
  python -m minmodels segment cells.png --checkpoint runs/unet --out masks
  python -m minmodels detect photos --checkpoint runs/yolo --out found
  python -m minmodels showcase"""
GENERATE_EXAMPLES = """examples:
  python -m minmodels generate gpt --checkpoint runs/book --prompt "Once upon" --tokens 500
  python -m minmodels generate gpt --checkpoint runs/book --temperature 0
  python -m minmodels generate gpt --checkpoint FOLDER_OF_GPT2 --prompt "Once upon" --top-k 50 --top-p 0.9
  python -m minmodels generate adder --checkpoint runs/adder --prompt 12+34
  python -m minmodels generate transformer --checkpoint runs/transformer --prompt hello"""
SEGMENT_EXAMPLES = """examples:
  python -m minmodels segment cells.png more.tif --checkpoint runs/unet --out masks
  python -m minmodels segment folder --checkpoint runs/unet --out masks --skip-corrupt"""
DETECT_EXAMPLES = """examples:
  python -m minmodels detect scene.png --checkpoint runs/yolo --out found
  python -m minmodels detect folder --checkpoint runs/yolo --out found --score 0.5 --skip-corrupt"""
FINETUNE_EXAMPLES = """examples:
  python -m minmodels finetune gpt1 --checkpoint runs/gpt1
  python -m minmodels finetune minbert --checkpoint runs/minbert --task topic --out runs/minbert-topic"""
FILL_EXAMPLES = """examples:
  python -m minmodels fill minbert --checkpoint runs/minbert "The [MASK] statement returns a value."
  python -m minmodels fill minbert --checkpoint ~/bert-base-uncased "Paris is the [MASK] of France." --top 3"""
CLASSIFY_EXAMPLES = """examples:
  python -m minmodels classify minbert --checkpoint runs/minbert-topic "The first text." "The second text."
  python -m minmodels classify gpt1 --checkpoint runs/gpt1-task "$(cat passage.txt)"
"""
SHOWCASE_EXAMPLES = """example:
  python -m minmodels showcase --text book.txt --minutes 2 --out runs/book"""

NO_MEMORY = "can't allocate memory", "out of memory", "Storage size calculation overflowed"  # PyTorch's RuntimeErrors of it


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for what the user can mend, 128 + n where signal n ended it."""
    args = vars(_parser().parse_args(argv))
    run = args.pop("run")
    try:
        run(**args)
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # whoever read what is printed has had enough
        _drop_output()
        return 128 + 13
    except OSError as error:
        _drop_output()
        print(f"error: {error.filename or 'what it prints cannot be written'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        said = str(error).partition("\n")[0]
        if said.startswith("MINKERNELS_"):  # an environment variable
            print(f"error: {said}", file=sys.stderr)
            return 2
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        print("error: not enough memory, ask for smaller sizes or batches.", said, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "numpy", "PIL", "rich", "safetensors", "tokenizers"):
            raise
        print(f"error: {error.name} is not installed: pip install 'minkernels[models]'", file=sys.stderr)
        return 2
    return 0


def _drop_output():
    """Else Python would try once more to write it as it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: there is none
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(model, resume, overwrite, **given):
    from minmodels.train import told, train

    scores, then = train(model, given, resume=resume, overwrite=overwrite)
    print(told(scores))
    if then:
        print(then)


def _eval(model, checkpoint, **given):
    from minmodels.train import evaluate, told

    print(told(evaluate(model, checkpoint, **given)))


def _finetune(model, resume, overwrite, compare=True, **given):
    from minmodels.finetune import finetune
    from minmodels.train import told

    scores, then = finetune(model, given, resume=resume, overwrite=overwrite, compare=compare)
    for title, found in scores.items():
        print(f"{title}: {told(found)}")
    if then:
        print(then)


def _fill(model, checkpoint, text, top, device):
    from minmodels.understand import fill

    filled, masks = fill(checkpoint, text, top=top, device=device)
    for words in masks:
        print("  ".join(f"{word} {p:.2f}" for word, p in words))
    print(filled)


def _classify(model, checkpoint, texts, device):
    from minmodels.understand import classify

    for label, p in classify(model, checkpoint, tuple(texts), device=device):
        print(f"{p:.3f}  {label}")


def _generate(model, **args):
    from minmodels.generate import generate

    sampling = [f"--{key.replace('_', '-')}" for key in ("tokens", "temperature", "top_k", "top_p", "seed") if key in args]
    if sampling and model in ("adder", "transformer"):
        raise UserError(f"{' '.join(sampling)}: {model} gives the likeliest answer to the prompt, without options of sampling")
    print(generate(model=model, **args))


def _segment(images, **args):
    from minmodels.segment import segment

    for path in segment(images, **args):
        print(path)


def _detect(images, **args):
    from minmodels.detect import detect

    for name, found in detect(images, **args).items():
        print(f"{name}:", ", ".join(f"{one['name']} {one['score']:.2f}" for one in found) or "nothing")


def _showcase(**args):
    from minmodels.showcase import showcase

    showcase(**args)


def _using(run):
    """The command `run`, with --kernels besides its other arguments."""

    def command(kernels, **args):
        from minmodels.kernels import using

        with using(kernels):
            run(**args)

    return command


def _parser() -> argparse.ArgumentParser:
    new = functools.partial(argparse.ArgumentParser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = new(prog="python -m minmodels", description="Small models on the kernels of minkernels.", epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=new)

    about = "Train a model. Ctrl-C saves a checkpoint and stops."
    examples = "examples:\n" + "\n".join(model.examples.splitlines()[0] for model in MODELS.values())
    train = commands.add_parser("train", help="train a model", description=about, epilog=examples)
    models = train.add_subparsers(required=True, metavar="MODEL", dest="model", parser_class=new)
    for name in (name for name in MODELS if name not in FINETUNED.values()):
        model = MODELS[name]
        about = f"Train {model.about}. Ctrl-C saves a checkpoint and stops."
        _add_options(models.add_parser(name, help=model.about, description=about, epilog="examples:\n" + model.examples), model.options)
    train.set_defaults(run=_train)

    about = "Fine-tune a pretrained model on a task, and the same model from new weights beside it; both scores are printed."
    finetune = commands.add_parser("finetune", help="fine-tune a pretrained model", description=about, epilog=FINETUNE_EXAMPLES)
    models = finetune.add_subparsers(required=True, metavar="MODEL", dest="model", parser_class=new)
    for name, full in FINETUNED.items():
        model = MODELS[full]
        tuned = models.add_parser(name, help=model.about, description=about, epilog="examples:\n" + model.examples)
        _add_options(tuned, model.options, hidden=("scratch",))
        help = "train the same model from new weights too, in DIR/scratch (default: yes)"
        tuned.add_argument("--compare", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
    finetune.set_defaults(run=_finetune)

    about = "Judge a trained model on its held-out data."
    examples = "example:\n  python -m minmodels eval gpt --checkpoint runs/book"
    evaluate = commands.add_parser("eval", help="judge a trained model", description=about, epilog=examples)
    evaluate.add_argument("model", choices=MODELS)
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a training, or its checkpoint file")
    data = {o.name: o.metadata["metavar"] for model in MODELS.values() for o in fields(model.options) if o.metadata.get("data")}
    for name in sorted(data.keys() - {"checkpoint"}):
        evaluate.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=data[name], help="as of train, if it lies elsewhere now")
    _add_where(evaluate)
    evaluate.set_defaults(run=_eval)

    about = "Guess the words that [MASK] stands for: the likeliest of each, and the text with them."
    fill = commands.add_parser("fill", help="guess masked words", description=about, epilog=FILL_EXAMPLES)
    fill.add_argument("model", choices=["minbert"])
    fill.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a training, or of a Hugging Face BERT")
    fill.add_argument("text", type=_text, metavar="TEXT", help="with at least one [MASK]")
    fill.add_argument("--top", type=_whole(1), default=5, metavar="N", help="words to print for each (default: 5)")
    _add_where(fill)
    fill.set_defaults(run=_using(_fill))

    about = "Tell the class of a text, or of a pair of texts, with a fine-tuned model: the probability of each."
    classify = commands.add_parser("classify", help="tell the class of a text", description=about, epilog=CLASSIFY_EXAMPLES)
    classify.add_argument("model", choices=FINETUNED)
    classify.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a fine-tuning, or its checkpoint file")
    classify.add_argument("texts", type=_text, nargs="+", metavar="TEXT", help="as many as an example of its task has")
    _add_where(classify)
    classify.set_defaults(run=_using(_classify))

    about = "Write text with a trained model: the prompt, and what follows it."
    generate = commands.add_parser("generate", help="write text with it", description=about, epilog=GENERATE_EXAMPLES)
    generate.add_argument("model", choices=["gpt", "bigram", "adder", "transformer"], help="gpt: minGPT; the last two answer the prompt")
    from_where = "folder of a training, or its checkpoint file; for gpt also a Hugging Face folder with a GPT-2"
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help=from_where)
    generate.add_argument("--prompt", type=_text, default="", metavar="TEXT", help="text to continue (default: empty, the start of a line)")
    sampling = functools.partial(generate.add_argument, default=argparse.SUPPRESS)
    sampling("--tokens", type=_whole(0), metavar="N", help="tokens to add (default: 500)")
    sampling("--temperature", type=_not_negative, metavar="T", help="0 takes the likeliest token (default: 0.8)")
    sampling("--top-k", type=_whole(0), metavar="K", help="only the K likeliest tokens (default: 0, all)")
    top_p = "only the likeliest tokens that together reach this probability (default: 1, all)"
    sampling("--top-p", type=_share, metavar="P", help=top_p)
    sampling("--seed", type=_whole(0), metavar="S", help="the same seed, the same text (default: 0)")
    _add_where(generate)
    generate.set_defaults(run=_using(_generate))

    about = "Find the class of each pixel with a trained minUNet: masks, and overlays."
    segment = _on_images(commands, "segment", about, SEGMENT_EXAMPLES)
    segment.set_defaults(run=_using(_segment))
    about = "Find objects with a trained minYOLO: pictures with boxes, and detections.json."
    detect = _on_images(commands, "detect", about, DETECT_EXAMPLES)
    detect.add_argument("--score", type=_part, default=0.25, metavar="X", help="least score of a detection (default: 0.25)")
    detect.add_argument("--iou", type=_part, default=0.5, metavar="X", help="largest IoU of two boxes of a class (default: 0.5)")
    detect.set_defaults(run=_using(_detect))

    about = "Train each model for a little, time each op against PyTorch, and show it all on one page, DIR/index.html."
    showcase = commands.add_parser("showcase", help="see all of it in minutes", description=about, epilog=SHOWCASE_EXAMPLES)
    showcase.add_argument("--text", default="", metavar="FILE", help=_help("text"))
    showcase.add_argument("--out", default="runs/showcase", metavar="DIR", help="folder of the page (default: runs/showcase)")
    minutes = "minutes that minGPT learns, the others less in proportion (default: 1)"
    showcase.add_argument("--minutes", type=_positive, default=1.0, metavar="M", help=minutes)
    showcase.set_defaults(run=_showcase)
    return parser


def _add_where(parser):
    parser.add_argument("--device", default="", metavar="NAME", help=_help("device"))
    parser.add_argument("--kernels", default="fused", choices=KERNELS, help=_help("kernels") + " (default: fused)")


def _on_images(commands, name, about, examples):
    parser = commands.add_parser(name, help=about[0].lower() + about[1:].split(":")[0], description=about, epilog=examples)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or folder of images")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a training, or its checkpoint file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out files that are damaged, and name them")
    _add_where(parser)
    return parser


def _add_options(parser, options, hidden=()):
    length, start = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the checkpoint in --out, with its options")
    start.add_argument("--overwrite", action="store_true", help="start anew although --out holds a checkpoint")
    for option in fields(options):
        if option.name in hidden:
            continue
        name, kind = "--" + option.name.replace("_", "-"), option.metadata
        shared = dict(default=argparse.SUPPRESS, help=kind["help"])  # a resumed run takes what is not given from its checkpoint
        if option.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **shared)
            continue
        shared["help"] += f" (default: {option.default})" if option.default or kind.get("zero") else ""
        types = {str: str, int: _whole(kind.get("least", 1)), float: _not_negative if kind.get("zero") else _positive}
        group = length if option.name in ("steps", "minutes") else parser
        group.add_argument(name, type=types[option.type], metavar=kind["metavar"], choices=kind.get("choices"), **shared)


def _help(option: str) -> str:
    return MODELS["gpt"].options.__dataclass_fields__[option].metadata["help"]


def _whole(least: int):
    def convert(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        if int(text) >= 2**63:
            raise argparse.ArgumentTypeError(f"must be less than 2**63, got {text!r}")
        return int(text)

    return convert


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of bytes that are not UTF-8, Python makes lone surrogates
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, got {text!r}") from error
    return text


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def _part(text: str) -> float:
    if _not_negative(text) > 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return float(text)


def _positive(text: str) -> float:
    if not _not_negative(text):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return float(text)


def _share(text: str) -> float:
    if not 0 < _not_negative(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1, got {text!r}")
    return float(text)


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # models write what a terminal may not be able to show
    sys.exit(main())
