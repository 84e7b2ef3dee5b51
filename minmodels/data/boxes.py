"""Boxes to be scored, as columns: from the arrays of each image, or from COCO files. All is checked before anything is computed."""

import itertools
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minmodels import UserError


class CocoFileError(UserError, ValueError):
    """A COCO file that cannot be scored: names the file, the entry and the reason."""


@dataclass(frozen=True)
class Columns:
    """N boxes, ordered by image where they come from arrays, as in the file where they come from one."""

    box: np.ndarray  # (N, 4) float64
    image: np.ndarray  # (N,) int32, 0 .. images - 1
    category: np.ndarray  # (N,) int32, 0 .. len(classes) - 1
    score: np.ndarray | None = None  # (N,) float64: of detections
    area: np.ndarray | None = None  # (N,) float64: of ground truths, where given
    flag: np.ndarray | None = None  # (N,) uint8: of ground truths, 1 is a crowd or difficult


@dataclass(frozen=True)
class Scene:
    gts: Columns
    dets: Columns
    images: int
    classes: tuple  # ids, ascending
    names: tuple[str, ...]


def from_arrays(gts: Sequence[Mapping], dets: Sequence[Mapping], flag: str, *more: str) -> Scene:
    """flag: the name of the ground truths' optional 0/1 column; more: "area" or nothing. Raises ValueError or TypeError naming the image
    and the column."""
    for name, items in (("gts", gts), ("dets", dets)):
        if isinstance(items, str | Path | Mapping) or not isinstance(items, Sequence):
            raise TypeError(f"{name} must be a list with a dict for each image, or both gts and dets a path, got {type(items).__name__}")
    if len(gts) != len(dets):
        raise ValueError(f"gts and dets must have an entry for each image, got {len(gts)} and {len(dets)}")
    truth = _Images(gts, "gts", {"boxes", "classes"}, {flag, *more})
    found = _Images(dets, "dets", {"boxes", "classes", "scores"}, set())
    ids = [images.column("classes", "iu", np.int64) for images in (truth, found)]
    classes, category = np.unique(np.concatenate(ids), return_inverse=True)
    category = np.split(category.astype(np.int32), [len(ids[0])])
    flags = truth.optional(flag, "bui", np.int64)
    classes = tuple(classes.tolist())
    return Scene(
        Columns(truth.boxes(), truth.image(), category[0], area=truth.optional("area", "fiu", np.float64), flag=flags),
        Columns(found.boxes(), found.image(), category[1], score=found.column("scores", "fiu", np.float64)),
        len(gts),
        classes,
        tuple(map(str, classes)),
    )


class _Images:
    """A list of dicts of arrays, a dict for each image."""

    def __init__(self, items: Sequence[Mapping], name: str, needed: set[str], optional: set[str]):
        self.items, self.name = items, name
        for i, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise TypeError(f"{name}[{i}] must be a dict, got {type(item).__name__}")
            if not needed <= item.keys() <= needed | optional:
                known = ", ".join(sorted(needed)) + (f" and may have {', '.join(sorted(optional))}" if optional else "")
                raise ValueError(f"{name}[{i}] must have {known}; got {', '.join(map(str, item))}")
        self.arrays = [{key: self._array(i, key, x) for key, x in item.items()} for i, item in enumerate(items)]
        for i, arrays in enumerate(self.arrays):
            if arrays["boxes"].ndim == 0:
                raise ValueError(f"{name}[{i}]['boxes'] must have shape (N, 4), got ()")
        self.counts = [len(arrays["boxes"]) for arrays in self.arrays]

    def _array(self, i: int, key: str, x) -> np.ndarray:
        try:
            return _array(x)
        except (TypeError, ValueError) as error:  # of ragged rows, say
            raise ValueError(f"{self.name}[{i}][{key!r}] is no array: {error}") from error

    def image(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.items), dtype=np.int32), self.counts)

    def boxes(self) -> np.ndarray:
        return self.column("boxes", "fiu", np.float64, (4,)).reshape(-1, 4)

    def optional(self, key: str, kinds: str, dtype) -> np.ndarray | None:
        having = [key in item for item in self.items]
        if not any(having):
            return None
        if not all(having):
            raise ValueError(f"{key!r} must be in all {self.name} or in none: {self.name}[{having.index(False)}] lacks it")
        column = self.column(key, kinds, dtype)
        if dtype is not np.int64:
            return column
        wrong = (column < 0) | (column > 1)  # a flag
        if wrong.any():
            self._fail(int(np.argmax(wrong)), key, "must be 0 or 1")
        return column.astype(np.uint8)

    def column(self, key: str, kinds: str, dtype, shape: tuple = ()) -> np.ndarray:
        """One column of all images, dtype; kinds: the letters of the dtypes that may become it."""
        arrays = [arrays[key] for arrays in self.arrays]
        for i, (array, count) in enumerate(zip(arrays, self.counts, strict=True)):
            if array.shape != (count, *shape) and (count or array.size):  # without boxes, [] will do
                raise ValueError(f"{self.name}[{i}][{key!r}] must have shape {(count, *shape)}, got {array.shape}")
            if array.dtype.kind not in kinds and array.size:
                raise TypeError(f"{self.name}[{i}][{key!r}] must hold {'whole ' * ('f' not in kinds)}numbers, got {array.dtype}")
            if dtype is np.int64 and array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
                raise ValueError(f"{self.name}[{i}][{key!r}] must hold numbers below 2**63, got {array.max()}")
        parts = [array.reshape(count, *shape) for array, count in zip(arrays, self.counts, strict=True)]
        column = np.concatenate([np.empty((0, *shape), dtype), *parts], dtype=dtype, casting="unsafe")
        if dtype is np.float64 and not np.isfinite(column).all():
            self._fail(int(np.argmin(np.isfinite(column).reshape(len(column), -1).all(1))), key, "must be finite")
        return column

    def _fail(self, row: int, key: str, reason: str):
        image = int(np.searchsorted(np.cumsum(self.counts), row, "right"))
        row -= sum(self.counts[:image])
        raise ValueError(f"{self.name}[{image}][{key!r}] {reason}, got {self.arrays[image][key][row]} in row {row}")


def _array(x) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype is torch.bfloat16 else x  # which NumPy does not have
    return np.asarray(x)


def from_coco_files(gts: Path, dets: Path) -> Scene:
    """An annotation file and a result file of boxes. Raises CocoFileError."""
    data = _load(gts)
    keys = "images", "categories", "annotations"
    if not isinstance(data, dict):
        raise CocoFileError(f"{gts}: an object with {', '.join(keys)} was expected, got {type(data).__name__}")
    for key in keys:
        if not isinstance(data.get(key), list):
            what = f"{key} is {reprlib.repr(data[key])}, not a list" if key in data else f"it has no {key}"
            raise CocoFileError(f"{gts}: {what}")
    found = _load(dets)
    if not isinstance(found, list):
        raise CocoFileError(f"{dets}: a list of detections was expected, got {type(found).__name__}")
    images, categories, annotations = (_Entries(gts, key, data[key]) for key in keys)
    results = _Entries(dets, "detections", found)
    image_of, category_of = images.ids(), categories.ids()
    annotations.ids()
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in categories.entries}
    where = [(e, e.lookup("image_id", image_of, gts), e.lookup("category_id", category_of, gts)) for e in (annotations, results)]
    truth, found = (Columns(e.boxes(), image, category) for e, image, category in where)
    area, crowd, score = annotations.numbers("area"), annotations.numbers("iscrowd"), results.numbers("score")
    for i in np.flatnonzero((crowd != 0) & (crowd != 1)):
        annotations.fail(i, f"iscrowd is {annotations.entries[i]['iscrowd']!r}, neither 0 nor 1")
    truth = Columns(truth.box, truth.image, truth.category, area=area, flag=crowd.astype(np.uint8))
    found = Columns(found.box, found.image, found.category, score=score)
    return Scene(truth, found, len(image_of), tuple(category_of), tuple(names[id] for id in category_of))


def _load(path: Path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as error:
        raise CocoFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
        raise CocoFileError(f"{path} is not JSON, or cut off: {error}") from error


class _Entries:
    """A list of a COCO file. Whole columns are checked at once, since files hold millions of entries; the entry is looked for only
    where one is bad."""

    def __init__(self, path: Path, name: str, entries: list):
        self.path, self.name, self.entries = path, name, entries

    def fail(self, i: int, reason: str):
        raise CocoFileError(f"{self.path}: {self.name}[{i}]: {reason}")

    def column(self, key: str) -> list:
        try:
            return [entry[key] for entry in self.entries]
        except (KeyError, TypeError):
            for i, entry in enumerate(self.entries):
                if not isinstance(entry, dict):
                    self.fail(i, f"it is {reprlib.repr(entry)}, not an object")
                if key not in entry:
                    self.fail(i, f"it has no {key}")
            raise

    def numbers(self, key: str) -> np.ndarray:
        values = self.column(key)
        numbers = _numbers(values)
        if numbers is None:
            i = next(i for i, value in enumerate(values) if _numbers([value]) is None)
            self.fail(i, f"{key} is {reprlib.repr(values[i])}, not a finite number")
        return numbers

    def boxes(self) -> np.ndarray:
        values = self.column("bbox")
        if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
            numbers = _numbers(list(itertools.chain.from_iterable(values)))
            if numbers is not None:
                return numbers.reshape(-1, 4)
        i = next(i for i, v in enumerate(values) if type(v) is not list or len(v) != 4 or _numbers(v) is None)
        self.fail(i, f"bbox is {reprlib.repr(values[i])}, not four finite numbers")

    def ids(self) -> dict:
        """{id: its place in ascending order}"""
        values = self._keys("id")
        if len(set(values)) < len(values):
            first = {}
            i = next(i for i, value in enumerate(values) if first.setdefault(value, i) != i)
            self.fail(i, f"its id {values[i]!r} is that of {self.name}[{first[values[i]]}] too")
        try:
            return {value: i for i, value in enumerate(sorted(values))}
        except TypeError:
            i = next(i for i, value in enumerate(values) if isinstance(value, str) != isinstance(values[0], str))
            self.fail(i, f"its id is {values[i]!r} where that of {self.name}[0] is {values[0]!r}: numbers and text do not mix")

    def lookup(self, key: str, index: dict, path: Path) -> np.ndarray:
        values = self._keys(key)
        try:
            return np.array([index[value] for value in values], np.int32)
        except KeyError:
            i = next(i for i, value in enumerate(values) if value not in index)
            self.fail(i, f"{key} {values[i]!r} is not in {path}")

    def _keys(self, key: str) -> list:
        values = self.column(key)
        if not set(map(type, values)) <= {int, float, str}:
            i = next(i for i, value in enumerate(values) if type(value) not in (int, float, str))
            self.fail(i, f"{key} is {reprlib.repr(values[i])}, neither a number nor text")
        return values


def _numbers(values: list) -> np.ndarray | None:
    """None where one is no finite number."""
    if set(map(type, values)) <= {int, float}:  # no bool, and no text, which NumPy would convert
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:
            return None
        if np.isfinite(numbers).all():
            return numbers
    return None
