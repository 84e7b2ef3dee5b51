"""README.md's Python, run as it stands, but for what needs other packages or minutes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minkernels

PAGE = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ELSEWHERE = "import torchvision", "AutoModel", "torch.compile"  # test_swap_*.py has these
SNIPPETS = [s for s in re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL) if not any(word in s for word in ELSEWHERE)]


class Model(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x).sum()


def names():
    corner, logits = torch.rand(50, 2), torch.randn(6, 40, requires_grad=True)
    boxes = torch.cat((corner, corner + 0.2), -1)
    class_map = torch.randint(5, (2, 8, 8))
    class_map[0, 0] = 255
    return {
        **dict(torch=torch, nn=nn, F=F, minkernels=minkernels, model=Model(), batch=torch.randn(1, 2, 5, 8)),
        **dict(hidden=torch.randn(2, 3, 16), lm_head=nn.Linear(16, 40), labels=torch.randint(40, (2, 3)), logits=logits),
        **dict(tokens=torch.randint(40, (6,)), weight=torch.rand(5), image_logits=torch.randn(2, 5, 8, 8)),
        **dict(class_map=class_map, anchors=boxes, gts=boxes[:4], pred=boxes.clone().requires_grad_(), boxes=boxes),
        **dict(scores=torch.rand(50), classes=torch.randint(3, (50,)), raw=torch.randn(2, 84, 100)),
        **dict(other=nn.Linear(8, 9), x=torch.randn(3, 8), target=torch.randint(9, (3,))),
    }


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets(number, library, capsys):
    if "minmodels" in SNIPPETS[number]:
        pytest.importorskip("minkernels._host")
    exec(SNIPPETS[number], names())


def test_the_table_names_every_op():
    table = PAGE[PAGE.index("| op | what it takes |") : PAGE.index("## Swap")]
    missing = {name for name in minkernels.__all__ if name.islower() and f"`{name}`" not in table}
    assert missing == {"empty_cache", "info", "swap", "swapped", "unswap"}
