"""Fine-tuning beside the same from nothing, so that one sees what pretraining is worth."""

from pathlib import Path
from shlex import quote

from minmodels import Interrupted, UserError, files
from minmodels.options import FINETUNED
from minmodels.train import Trained, train


def finetune(model: str, given: dict, *, resume: bool, overwrite: bool, compare: bool) -> tuple[dict[str, dict[str, float]], str]:
    """Fine-tunes into out (default: runs/MODEL-task), and with compare the same model from new weights into out/scratch.

    Returns the scores on held-out examples of each, and a line that says what can be done with the first. Raises UserError.
    """
    name, scores, trained = FINETUNED[model], {}, []
    out = Path(given.get("out") or f"runs/{name}")
    parts = {"pretrained": {"out": str(out), "scratch": False}}
    if compare:
        parts["from scratch"] = {"out": str(out / "scratch"), "scratch": True}
    replaced = [Path(own["out"], files.CHECKPOINT).resolve() for own in parts.values()]
    if "checkpoint" in given and files.at(given["checkpoint"]).resolve() in replaced:
        raise UserError(f"--out {out}: fine-tuning would replace the --checkpoint that it starts from; give another folder")
    for title, own in parts.items():
        again = resume and (own["out"] == str(out) or Path(own["out"], files.CHECKPOINT).exists())
        meta = None
        if resume and not again:  # it had not begun: as the first part was asked for, and this command
            meta = files.load_checkpoint(out, prefix="-")[1]
            given = {**meta["options"], **({"minutes": 0.0} if "steps" in given else {}), **given}
        try:
            scores[title] = train(name, {**given, **own}, resume=again, overwrite=overwrite, meta=meta)[0]
        except Trained as error:  # by the run that is resumed
            trained.append(error)
            scores[title] = error.scores
        except Interrupted as error:
            again = f"python -m minmodels finetune {model} --out {quote(str(out))} --resume{'' if compare else ' --no-compare'}"
            raise Interrupted(error.message, error.signal, again) from error
    if len(trained) == len(parts):
        raise UserError(str(trained[0]))
    texts = " ".join(f'"TEXT {i + 1}"' for i in range(files.load_checkpoint(out, prefix="-")[1]["task"]["texts"]))
    return scores, f"to use it: python -m minmodels classify {model} --checkpoint {quote(str(out))} {texts}"
