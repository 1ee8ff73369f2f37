"""Every case's estimate as a row, and the file that keeps them for machines without a compiler."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.estimates.cases import CASES, SHAPES, TOKENS, Case, Make
from benchmarks.estimates.model import DRAM, FLOPS, NEXT, RAMP, estimate
from spectral_ops._library import OPERATORS

LIBRARY = 0.8  # of memory's rate, what the library's products with one short side are taken to reach
BEFORE = {  # share of the roofline, and time where the reading gave it: a close reading of the kernels at ddce979
    ("column_norm", "r 16"): "6–10 %, 120–190 µs",
    ("column_norm_cached_", "r 16, unchanged"): "10 µs for the fingerprint",
    ("magnitude_grad", "a column vanishes"): "10 ms",
    ("lowrank_backward", "r 16"): "75 %",
    ("lowrank_backward", "r 16 with y and gdy"): "70 %",
    ("lowrank_backward", "r 64"): "29 %",
    ("lowrank_update_", "r 16"): "80–88 %",
    ("lowrank_update_", "r 64"): "50–65 %",
    ("block_tile_", "r 64"): "75–80 %",
    ("bat_weight_", "r 64"): "60–65 %",
    ("bat_contract_", "r 64"): "60–65 %",
    ("csr_spmm_", "0.6 %"): "8–13 %",
}
FILE = Path(__file__).with_name("h100.json")


@dataclass
class Kernel:
    """One launch: what it takes and what bounds it. under_way: bytes of loads on a multiprocessor; product: the matrix
    instruction, if there is one; seconds: without the operator's ramp."""

    kernel: str
    registers: int
    shared: int
    blocks: int
    threads: int
    resident: int
    waves: float
    under_way: float
    product: str
    bound: str
    seconds: float


@dataclass
class Place:
    """A case at a size, on a backend."""

    backend: str
    operator: str
    label: str
    tokens: int
    d: int
    k: int

    @property
    def key(self) -> tuple:
        return self.backend, self.operator, self.label, self.tokens, self.d, self.k


@dataclass
class Row(Place):
    """An estimate. before: what was estimated for the code that this one replaced, at the most tokens."""

    seconds: float
    floor: float
    kernels: list[Kernel]
    before: str = ""

    @property
    def share(self) -> float:
        return self.floor / self.seconds


def floor(case: Case, args: tuple) -> float:
    """Seconds of the operator's own bound: its registered FLOPs or least bytes."""
    if case.least:
        return case.least(args) / DRAM
    cost = OPERATORS[case.operator].cost(*args)
    return max(cost.flops / FLOPS, cost.bytes / DRAM)


def sizes(case: Case) -> Iterator[tuple[int, int, int]]:
    for d, k in SHAPES:
        for T in TOKENS if case.tokens else TOKENS[:1]:
            yield T, d, k


def compiled(objects: Path) -> Iterator[Row]:
    """A row for each case and size of the CUDA kernels, from the objects of a build."""
    from benchmarks.estimates import launches, sass

    codes = {name: code for file in sorted(objects.glob("*.o")) for name, code in sass.kernels(file).items()}
    for case in CASES:
        operator = OPERATORS[case.operator]
        stem = importlib.import_module(f"benchmarks.estimates.{operator.stem}")
        for T, d, k in sizes(case):
            make = Make(T, d, k)
            args = case.arguments(make)
            found = []
            for launch in launches.recorded(case.operator, args):
                work = stem.work(launch, case, args)
                if launch.product:
                    found.append(Kernel("library", 0, 0, 0, 0, 0, 0.0, 0.0, "", "dram", work.dram / DRAM / LIBRARY))
                    continue
                code = codes[launch.kernel]
                time = estimate(code, work, launch.blocks, launch.threads, launch.dynamic)
                found.append(
                    Kernel(
                        launch.kernel,
                        code.registers,
                        code.shared + launch.dynamic,
                        launch.blocks,
                        launch.threads,
                        time.resident,
                        time.waves,
                        time.under_way,
                        next((name for name in ("HGMMA", "HMMA") if code.has(name)), ""),
                        time.bound,
                        time.seconds,
                    )
                )
            seconds = RAMP + NEXT * (len(found) - 1) + sum(kernel.seconds for kernel in found)
            before = BEFORE.get((case.operator, case.label), "")
            yield Row("cuda", case.operator, case.label, T, d, k, seconds, floor(case, args), found, before)


def compilers() -> dict[str, str]:
    """The versions that the machine code is of."""
    found = {}
    if nvcc := shutil.which("nvcc"):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc"] = re.search(r"V([\d.]+)", text)[1]
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    return found


def write(rows: list[Row], path: Path = FILE) -> None:
    lines = ",\n".join(
        json.dumps(asdict(row), ensure_ascii=False) for row in rows
    )  # a row a line, for whoever compares
    path.write_text(f'{{"compilers": {json.dumps(compilers())}, "rows": [\n{lines}\n]}}\n')


def written_by(path: Path = FILE) -> dict[str, str]:
    return json.loads(path.read_text())["compilers"]


def read(path: Path = FILE) -> list[Row]:
    rows = json.loads(path.read_text())["rows"]
    return [Row(**row | {"kernels": [Kernel(**kernel) for kernel in row["kernels"]]}) for row in rows]
