"""The files of a run. The checkpoint is one safetensors file, so that one rename replaces all of it; what is no tensor is JSON
in its header. The metrics are JSON lines. Whatever is written is there whole or not at all.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minmodels import UserError

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "run.json"  # a config.json would make it a folder of Hugging Face
METRICS = "metrics.jsonl"
LOSS = "loss.png"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict):
    """Whenever this is cut off, path is the old file or the new one. Raises UserError."""
    with replacing(path) as part, part.open("wb") as f:
        f.write(save(tensors, {"minmodels": json.dumps(meta)}))
        f.flush()
        os.fsync(f.fileno())
    with writing(path):
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename
        os.close(folder)


def at(path: str | Path) -> Path:
    """The checkpoint file that path, a folder or the file itself, stands for."""
    return Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)


def load_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tensors whose names start with prefix, on the CPU, and the meta that save() got. path may be the folder."""
    path = at(path)
    try:
        with safe_open(path, "pt") as f:
            meta = (f.metadata() or {}).get("minmodels")
            if meta is None:
                raise UserError(f"{path} is a safetensors file, but no checkpoint of minmodels")
            return {name: f.get_tensor(name) for name in f.keys() if name.startswith(prefix)}, dict(json.loads(meta))  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint at {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError) as error:  # the last two: of what is JSON in it
        raise UserError(f"{path} is truncated, damaged, or no checkpoint: {error}") from error


def records(path: Path, upto: float = math.inf) -> list[dict]:
    """The lines of a metrics.jsonl up to that step; one that an interrupt cut off at the end is left out. Raises UserError."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                if record["step"] <= upto:
                    found.append(record)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: no record of a training, delete the line") from error
    return found


class Metrics:
    """JSON lines, a record each. What a run wrote past the step `upto` of its checkpoint is dropped: it will be done again."""

    def __init__(self, path: Path, upto: int):
        self.path, self.pending, self.flushed = path, [], time.perf_counter()
        kept = records(path, upto) if upto and path.exists() else []
        with replacing(path) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def due(self) -> bool:
        return time.perf_counter() - self.flushed > 0.25

    def flush(self) -> list[dict]:
        """Writes the pending steps, reading their losses from the device at once; returns them."""
        losses = torch.stack([record["loss"] for record in self.pending]).tolist()
        records = [{**record, "loss": loss} for record, loss in zip(self.pending, losses, strict=True)]
        self.write(*records)
        self.pending, self.flushed = [], time.perf_counter()
        return records

    def write(self, *records: dict):
        finite = ({key: value if math.isfinite(value) else None for key, value in record.items()} for record in records)  # NaN is no JSON
        lines = memoryview("".join(json.dumps(record) + "\n" for record in finite).encode())
        with writing(self.path), self.path.open("ab", buffering=0) as f:
            end = f.tell()
            try:
                while lines:  # of a full disk, a part may still be written
                    lines = lines[f.write(lines) :]
            except OSError:
                f.truncate(end)
                raise


@contextlib.contextmanager
def claimed(folder: Path):
    """For one run at a time; the system lets go of it when a process ends, however it does. Raises UserError."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path):
    """Where to write what becomes path once it is there whole; it has path's ending. If that fails path is as it was. Raises UserError."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    with writing(path):
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """Turns a failure to write, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
