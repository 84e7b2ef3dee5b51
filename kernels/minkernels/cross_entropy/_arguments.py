"""What the arguments of cross_entropy, and of what is built on it, must be."""

from minkernels._checks import FLOATS, as_int, check_constant, check_floats, check_number, check_tensor
from minkernels.cross_entropy._options import LABELS, Options

EMPTY = "nan", "zero"


def options(ignore_index, label_smoothing, z_loss, softcap, logit_scale) -> Options:
    """Checked, and as the operators take them."""
    ignore_index = as_int("ignore_index", ignore_index)
    for name, number in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("logit_scale", logit_scale)):
        check_number(name, number)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, got {softcap}")
    return Options(ignore_index, float(label_smoothing), float(z_loss), 0.0 if softcap is None else float(softcap), float(logit_scale))


def check_target(target, rows, probs, x, *inputs):
    """rows: the shape that labels have; probs: that of probabilities, or None where there may be none; inputs: what it must fit."""
    check_tensor("target", target)
    labels, expected = target.dtype in LABELS, rows
    if not labels:
        if probs is None or target.dtype not in FLOATS:
            more = "" if probs is None else ", or probabilities of a float dtype"
            raise TypeError(f"target must be int64, int32 or uint8 labels{more}, got {target.dtype}")
        if x.ignore_index >= 0:
            raise ValueError(f"ignore_index is for labels, and target is {target.dtype} probabilities: got ignore_index={x.ignore_index}")
        expected = probs
    if target.shape != expected:
        fit = " and ".join(f"{name} {tuple(t.shape)}" for name, t in zip(("input", "linear_weight"), inputs, strict=False))
        kind = "labels" if labels else "probabilities"
        raise ValueError(f"target must be {tuple(expected)} {kind} to fit {fit}, got {tuple(target.shape)}")
    if target.device != inputs[0].device:
        raise TypeError(f"target is on {target.device}, but input is on {inputs[0].device}")


def check_empty(empty):
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {', '.join(EMPTY)}, got {empty!r}")


def check_weight(weight, input, V, group):
    """Where there is a group, split() of _parallel.py finds out how many classes there are."""
    check_floats("weight", weight, converted=True)
    if weight.dim() != 1 if group is not None else weight.shape != (V,):
        raise ValueError(f"weight must be ({'V,' if group is not None else f'V={V},'}), got {tuple(weight.shape)}")
    check_constant("weight", weight, "input", input)


def check_group(group):
    if group is not None:
        from torch import distributed

        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {group!r}")
