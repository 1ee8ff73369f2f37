"""Which implementation measurement chose, by operator, dtype and sizes.

``python -m spectral_ops tune --write`` measures and writes ``tuned/<architecture>.json`` (``cpu-avx512_bf16``,
``sm_90``) beside this file; ``SPECTRAL_OPS_TUNED`` names another folder, and is empty for none. A file
holds, for every operator and dtype where something other than the default won somewhere, what was chosen in each class
that was measured, the default where that won, and with which device, versions, date and commit. A class is the
arguments of one call: shapes of tensors, integers, flags. Sizes nobody measured take the class nearest to them in the
logarithm of every size, and one with the same flags before any other.

A choice is a backend (``reference``, ``cpu``, ``triton``, ``cuda``), ``triton:<name>`` for a launcher's other tiles,
or, where an operator has it, ``library``: the same result from the library's products, which is its default.

No table comes with the package yet. Where the folder has none when the package is imported, no call asks for one. The
file of an architecture is read once, when an operator first runs there. An operator it does not list is called as if
there were no file, after one look-up of its name. One that it lists goes through its overload ``.tuned``, which looks
the sizes up when the call runs: a compiled graph holds that overload, with no guard on any size. A forced backend
(``use_backend``) goes before any table. Nothing here measures.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_ops import _library, _loader
from spectral_ops._library import BACKENDS, Operator
from spectral_ops.triton_kernels import tiles as triton_tiles

VERSION = 1
MEND = "delete the file, and `python -m spectral_ops tune --write` makes another"
READABLE = "wanted a folder of tables that can be read (SPECTRAL_OPS_TUNED names another, and is empty for none)"
OTHER = 64.0  # how far apart two flags are, or two numbers of dimensions: farther than any two sizes
FOLDER = os.environ.get("SPECTRAL_OPS_TUNED", str(Path(__file__).parent / "tuned"))


@dataclass(frozen=True)
class Class:
    """One measured class: its arguments as :func:`signature` gives them, what won there, and every choice's median."""

    arguments: tuple
    choice: str
    microseconds: dict[str, float]

    def __str__(self) -> str:
        words = {"None": "-", "True": "yes", "False": "no"}
        parts = ("x".join(map(str, a)) if isinstance(a, tuple) else str(a) for a in self.arguments)
        return " ".join(words.get(part, part) for part in parts)


@dataclass(frozen=True)
class Entry:
    """What was measured of one operator in one dtype, and by whom."""

    source: str
    classes: tuple[Class, ...]


Table = dict[str, dict[str, Entry]]  # operator -> dtype -> entry


def architecture(device: torch.device) -> str | None:
    """The name of a device's table; None for devices that have none: the CPU without compiled kernels, meta, others."""
    if device.type == "cpu":
        isa = _loader.EXTENSIONS["cpu"].isa
        return f"cpu-{isa}" if isa else None
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def file(device: torch.device) -> Path | None:
    """Where the table of ``device`` is, or would be; None where it can have none."""
    name = architecture(device)
    return Path(FOLDER) / f"{name}.json" if name and FOLDER else None


def any_table() -> bool:
    """Whether the folder holds a table, of whatever architecture. Raises ValueError for one that cannot be read."""
    try:
        return bool(FOLDER) and any(name.endswith(".json") for name in os.listdir(FOLDER))
    except FileNotFoundError:
        return False  # `tune --write` makes it
    except OSError as error:
        raise ValueError(f"{FOLDER}: {error.strerror}; {READABLE}") from None


def choices(operator: Operator) -> list[str]:
    """Every choice there is for an operator, on whatever device."""
    tiles = [f"triton:{name}" for name in triton_tiles(operator.stem, operator.name)]
    return [*BACKENDS, *tiles, *(["library"] if operator.library else [])]


def _refuse(path: Path, what: str, got: Any, wanted: str) -> None:
    raise ValueError(f"{path}: {what}: got {got!r}, wanted {wanted}; {MEND}")


def read(path: Path) -> Table:
    """The table in a file, checked; empty where there is no file. Raises ValueError that names the file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {READABLE}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {MEND}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        _refuse(path, "version", version, f"{VERSION}, which this package reads")
    operators = data.get("operators")
    if not isinstance(operators, dict) or not all(isinstance(dtypes, dict) for dtypes in operators.values()):
        _refuse(path, "operators", operators, "entries by operator and dtype")
    table: Table = {}
    for name, dtypes in operators.items():
        operator = _library.OPERATORS.get(name)
        if operator is None:
            _refuse(path, "operator", name, "one of this package's")
        table[name] = {}
        for dtype, entry in dtypes.items():
            try:
                classes = tuple(
                    Class(_tuples(c["arguments"]), c["choice"], c["microseconds"]) for c in entry["classes"]
                )
                table[name][dtype] = Entry(entry["source"], classes)
                if not classes:
                    _refuse(path, f"{name}, {dtype}, classes", [], "one at least")
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: {name}, {dtype}: not an entry of version {VERSION} ({error!r}); {MEND}"
                ) from None
            for one in classes:
                if len(one.arguments) != len(operator.default._schema.arguments):
                    _refuse(path, f"{name}, {dtype}, arguments", one.arguments, f"those of {operator.schema}")
                if one.choice not in choices(operator):
                    _refuse(path, f"{name}, {dtype}, choice", one.choice, "one of " + ", ".join(choices(operator)))
    return table


def _tuples(arguments: Iterable) -> tuple:
    return tuple(tuple(a) if isinstance(a, list) else a for a in arguments)


def text(table: Table) -> str:
    """A table as its file holds it, one class to a line."""
    operators = []
    for name, dtypes in sorted(table.items()):
        entries = []
        for dtype, entry in sorted(dtypes.items()):
            lines = ",\n".join("      " + json.dumps(vars(one)) for one in entry.classes)
            source = json.dumps(entry.source)
            entries.append(f'    {json.dumps(dtype)}: {{"source": {source}, "classes": [\n{lines}\n    ]}}')
        operators.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(entries) + "\n  }")
    return f'{{"version": {VERSION}, "operators": {{\n' + ",\n".join(operators) + "\n}}\n"


def signature(args: Sequence) -> tuple[torch.dtype | None, tuple]:
    """The narrowest floating dtype among a call's tensors (and the first of each list of them), of 16 bits and more
    since FP8 is not computed in, and what tells classes apart: shapes, integers, flags, lengths of lists, and what is
    None; numbers that are no sizes become None."""
    dtype, found = None, []
    for a in args:
        tensor = a
        if isinstance(a, torch.Tensor):
            found.append(a.shape)
        elif isinstance(a, (list, tuple)):
            found.append(len(a))
            tensor = a[0] if a else None
        else:
            found.append(None if isinstance(a, float) else a)
            continue
        narrower = getattr(tensor, "dtype", dtype)
        if narrower is not dtype and narrower.is_floating_point and narrower.itemsize > 1:
            if dtype is None or narrower.itemsize < dtype.itemsize:
                dtype = narrower
    return dtype, tuple(found)


def distance(a: Sequence, b: Sequence) -> float:
    """Sum over the arguments of two calls of squared differences of log2(1 + size); over those that both give."""
    total = 0.0
    for p, q in zip(a, b, strict=False):
        if isinstance(p, tuple) and isinstance(q, tuple) and len(p) == len(q):
            total += distance(p, q)
        elif type(p) is int and type(q) is int:
            total += math.log2((max(p, 0) + 1) / (max(q, 0) + 1)) ** 2
        elif p != q:
            total += OTHER**2
    return total


def nearest(entry: Entry, arguments: Sequence) -> Class:
    """The class of an entry nearest to a call's arguments; the first of several."""
    return min(entry.classes, key=lambda one: distance(one.arguments, arguments))
