"""What a benchmark run holds, and its file: JSON, times in seconds, sizes in bytes, rates per second.

A section that was not asked for is an empty list here and absent from the file. ``times`` has one entry per turn; it is
empty where the numerical check failed (``red``), so that no time can stand beside a wrong result.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spectral_ops import _files, _loader
from spectral_ops._version import __version__

FORMAT = 1


@dataclass
class Ceiling:
    """The rates a device reached in this run: its library's products in one dtype, and a copy beyond the last cache."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(kw_only=True)
class Timed:
    """Something timed and checked. error: the largest relative difference to what it was checked against, or None."""

    times: list[float]
    error: float | None = None
    red: bool = False

    def __post_init__(self) -> None:
        if self.red:
            self.times = []

    @property
    def seconds(self) -> float | None:
        """The median time; None where nothing was timed."""
        return statistics.median(self.times) if self.times else None


@dataclass(kw_only=True)
class Counted(Timed):
    """What was also counted: arithmetic, least bytes, and the least seconds for them under the run's ceilings."""

    flops: int
    bytes: int
    floor_seconds: float

    @property
    def of_floor(self) -> float | None:
        """floor_seconds over the median time: 1 on the roofline."""
        return self.floor_seconds / self.seconds if self.times else None


@dataclass(kw_only=True)
class Layer(Counted):
    """Forward and backward of one layer; ratios: its time over the frozen layer's in the same turn.

    saved_bytes: held for backward beside x and the parameters. peak_bytes: the most held at once beyond what existed
    before the step, None where it was not measured.
    """

    method: str
    implementation: str
    device: str
    dtype: str
    adapter_dtype: str
    tokens: int
    out_features: int
    in_features: int
    rank: int
    ratios: list[float]
    saved_bytes: int
    peak_bytes: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.red:
            self.ratios = []

    @property
    def ratio(self) -> float | None:
        """The median time over the frozen layer's; the tax is one less."""
        return statistics.median(self.ratios) if self.ratios else None


@dataclass(kw_only=True)
class Operator(Counted):
    """One operator of the grid, or a peer's product in its place, on sample arguments."""

    operator: str
    row: str
    backend: str
    device: str
    dtype: str
    tokens: int
    out_features: int
    in_features: int
    rank: int
    density: float | None = None


@dataclass(kw_only=True)
class Overhead:
    """Host time of a layer's forward and backward at a size at which the device has little to do."""

    name: str
    implementation: str
    tokens: int
    times: list[float]


@dataclass(kw_only=True)
class Growth:
    """Measured and predicted seconds of an operator over one variable: tokens, rank, density or features."""

    operator: str
    backend: str
    dtype: str
    variable: str
    values: list[float]
    seconds: list[float]
    predicted: list[float]
    verdict: str


@dataclass(kw_only=True)
class Training(Timed):
    """A training step of a whole model. graphs: that torch.compile made of it; graph_breaks: where it left one."""

    model: str
    method: str
    implementation: str
    compiled: bool
    checkpointing: bool
    dtype: str
    batch: int
    length: int
    blocks: int
    tokens_per_second: float | None
    peak_bytes: int | None
    loss: float | None
    graphs: int = 0
    graph_breaks: int = 0


SECTIONS = {"layers": Layer, "operators": Operator, "overhead": Overhead, "growth": Growth, "training": Training}


@dataclass
class Results:
    """One run: what it ran on, the ceilings by dtype, and its sections."""

    meta: dict[str, object]
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)

    @property
    def red(self) -> bool:
        """Whether a numerical check failed anywhere."""
        return any(row.red for row in (*self.layers, *self.operators, *self.training))


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside a checkout."""
    git = ["git", "-C", os.path.dirname(__file__)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "results.py"], capture_output=True, check=True)  # ours?
        call = [*git, "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name as the system gives it; on Linux platform.processor() does not."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return f"cpu: {(names or [platform.processor() or platform.machine()])[0]}"


def meta(device: str) -> dict[str, object]:
    """What a run on ``device`` ("cpu" or "cuda") says of itself; kernels: the compiled ones, or why there are none."""
    extension = _loader.EXTENSIONS[torch.device(device).type]
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "spectral_ops": __version__,
        "kernels": extension.error or extension.info,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m spectral_ops", *sys.argv[1:]]),
    }


def write(path: str | Path, results: Results) -> None:
    """Write the file, whole or not at all."""
    content = {"format": FORMAT, **{name: value for name, value in dataclasses.asdict(results).items() if value}}
    _files.write(Path(path), lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def _rows(path: str | Path, name: str, kind: type, rows: object) -> list:
    wanted = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(rows, list):
        raise ValueError(f"{path}: {name}: got {type(rows).__name__}, wanted a list of rows")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != wanted:
            got = sorted(set(row) ^ wanted) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}: {name}[{i}]: missing or unknown {got}, wanted the fields {sorted(wanted)}")
    return [kind(**row) for row in rows]


def read(path: str | Path) -> Results:
    """The run that :func:`write` put into ``path``; ValueError where the file is no such run."""
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}), wanted what bench --json writes") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format: got {found!r}, wanted {FORMAT} (what bench --json writes)")
    if unknown := set(content) - {f.name for f in dataclasses.fields(Results)}:
        raise ValueError(f"{path}: sections: got {sorted(unknown)}, wanted some of {', '.join(SECTIONS)}")
    ceilings = _rows(path, "ceilings", Ceiling, list(content.get("ceilings", {}).values()))
    return Results(
        content.get("meta", {}),
        dict(zip(content.get("ceilings", {}), ceilings, strict=True)),
        **{name: _rows(path, name, kind, content.get(name, [])) for name, kind in SECTIONS.items()},
    )
