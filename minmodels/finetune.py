"""Fine-tuning beside the same from nothing, so that one sees what pretraining is worth."""

from pathlib import Path

from minmodels import UserError
from minmodels.options import FINETUNED
from minmodels.train import Trained, evaluate, train


def finetune(model: str, given: dict, *, resume: bool, overwrite: bool, compare: bool) -> tuple[dict[str, dict[str, float]], str]:
    """Fine-tunes into out (default: runs/MODEL-task), and with compare the same model from new weights into out/scratch.

    Returns the scores on held-out examples of each, and a line that says what can be done with the first. Raises UserError.
    """
    name, then, scores, trained = FINETUNED[model], "", {}, []
    out = Path(given.get("out") or f"runs/{name}")
    parts = {"pretrained": {**given, "out": str(out), "scratch": False}}
    if compare:
        parts["from scratch"] = {**given, "out": str(out / "scratch"), "scratch": True}
    for title, options in parts.items():
        again = resume and Path(options["out"]).exists()
        try:
            scores[title], line = train(name, options, resume=again, overwrite=overwrite)
            then = then or line
        except Trained as error:  # by the run that is resumed
            trained.append(error)
            scores[title] = evaluate(name, options["out"])
    if len(trained) == len(parts):
        raise UserError(str(trained[0]))
    return scores, then
