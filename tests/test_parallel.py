"""Losses over classes that are split between processes, against a single one: parallel_worker.py is what each process runs."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from minkernels import cross_entropy, linear_cross_entropy

HERE = Path(__file__).parent


def test_two_processes(library, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "parallel_worker.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env, **pipes) for rank in range(2)]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output


@pytest.mark.parametrize("weight", [None, torch.ones(3)], ids=["plain", "weighted"])
def test_group_must_be_one(weight):
    target = torch.zeros(2, dtype=torch.int64)
    for loss in (cross_entropy, partial(linear_cross_entropy, torch.zeros(2, 4))):
        logits = torch.zeros(2, 3) if loss is cross_entropy else torch.zeros(3, 4)
        with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup, got 2"):
            loss(logits, target, weight=weight, group=2)
