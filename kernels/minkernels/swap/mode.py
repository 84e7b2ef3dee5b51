"""A scope in which PyTorch's functions run on our kernels, for one thread."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minkernels.swap import functional

NAMES = "scaled_dot_product_attention", "multi_head_attention_forward", "cross_entropy", "binary_cross_entropy_with_logits", "nms"
UNFLATTEN = Tensor.unflatten


class Functions(TorchFunctionMode):
    """with Functions(names): these functions, whoever calls them. nn's fast paths keep away by themselves: they look for a mode like this.

    May be entered again inside itself, by several threads at once, and copied. torchvision::nms must be there when it is made.
    """

    def __init__(self, names: tuple[str, ...] = NAMES):
        self.names = names
        self.ours = {getattr(F, name): getattr(functional, name) for name in names if name != "nms"}
        self.usual = {func: usual for func, usual in functional.USUAL.items() if func in self.ours}
        # asked of the registry, since torch.ops would keep a namespace that nobody defined
        if "nms" in names and torch._C._jit_get_schemas_for_operator("torchvision::nms"):
            op = torch.ops.torchvision.nms
            self.ours |= {op: functional.nms, op.default: functional.nms}

    def __reduce__(self):
        return Functions, (self.names,)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        usual = self.usual.get(func)
        if usual is not None:
            out = usual(args, kwargs)
            if out is not None:
                return out
        ours = self.ours.get(func)
        if ours is not None:
            out = ours(*args, **kwargs) if kwargs else ours(*args)
            if out is not None:
                return out
        elif func is UNFLATTEN and type(args[0]) in functional.PLAIN:  # torch.compile cannot follow that method's super() here
            func = torch.unflatten
        return func(*args, **kwargs) if kwargs else func(*args)
