"""Puts measured and counted tables into the pages that readers see.

    python -m benchmarks.publish results FILE.json [PAGE...]   a run's tables into each page; without one, printed
    python -m benchmarks.publish costs [docs/methods]          the tables of costs below ``<!-- cost: name -->``
    python -m benchmarks.publish estimates [PAGE]              what GPU kernels should take, from benchmarks/estimates
    python -m benchmarks.publish fields [PAGE]                 what becomes of every field of an adapter_config.json

A run has two tables. Each ends at ``<!-- end -->``.

* ``<!-- results: cpu -->`` (or ``gpu``): a line per method, dtype, tokens and layer, or per block where a run measured
  all projections of a model's block. Our time stands beside the best peer's and the target, all over the frozen
  layer's; then the share of the floor, and memory.
* ``<!-- summary: cpu -->``: PEFT's time as it is and accelerated, for the methods of ``SUMMARY``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.estimates import table
from benchmarks.estimates.cases import TOKENS
from spectral_ops.adapters import (
    AdaLoRAConfig,
    AdapterConfig,
    BatConfig,
    BoneConfig,
    DoRAConfig,
    LoRAConfig,
    VeRAConfig,
)
from spectral_ops.bench.counting import CEILINGS, cost
from spectral_ops.bench.methods import BLOCKS
from spectral_ops.bench.results import Layer, Results, read
from spectral_ops.bench.tables import FROZEN, block_ratio
from spectral_ops.cli.cost import cells, joined

# Times over the frozen layer's that the package aims at, where they are set: on two CPU cores, and on an H100.
PLACES = {"cpu": "2048×2048, T=1024", "gpu": "llama3-8b block, T=8192"}
TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "cpu": {
        ("lora", "float32"): 1.06, ("lora", "bfloat16"): 1.10,
        ("dora", "float32"): 1.12, ("dora", "bfloat16"): 1.20,
        ("bone", "float32"): 1.09, ("bone", "bfloat16"): 1.13,
        ("bat", "float32"): 1.70, ("bat", "bfloat16"): 1.70,
        ("rosa", "float32"): 1.30, ("rosa", "bfloat16"): 1.30,
    },
    "gpu": {
        ("lora", "bfloat16"): 1.11, ("dora", "bfloat16"): 1.17, ("bone", "bfloat16"): 1.10,
        ("bat", "bfloat16"): 1.68, ("rosa", "bfloat16"): 1.30,
    },
}  # fmt: skip
SUMMARY = {"dora": "DoRA", "lora": "LoRA", "bone": "MiSS (Bone)", "bat": "Bat"}
SHAPE = (8192, 4096, 4096)  # tokens and [out, in] of the tables of costs
OURS, OURS_IN_PEFT = "spectral_ops", "PEFT accelerated"
HEADER = ("method", "dtype", "adapters", "layer", "PEFT", "best peer", "ours", "target", "% of floor",
          "saved MiB: PEFT, or best / ours", "peak MiB: the same")  # fmt: skip


@dataclass
class Figures:
    """One implementation over every layer of a block, or a single one. ratio, of_floor: None where a layer is red."""

    ratio: float | None
    of_floor: float | None
    saved: str
    peak: str


def _figures(rows: list[Layer], frozen: list[Layer], block: dict[tuple[int, int], int]) -> Figures:
    """The projections' sums, each as often as the block has it; of the peaks the highest."""
    counts = [block[row.out_features, row.in_features] for row in rows]
    ratio = block_ratio([*rows, *frozen], block)
    floor = time = 0.0
    if ratio is not None:
        floor = sum(count * row.floor_seconds for count, row in zip(counts, rows, strict=True))
        time = sum(count * row.seconds for count, row in zip(counts, rows, strict=True))
    saved = sum(count * row.saved_bytes for count, row in zip(counts, rows, strict=True))
    peaks = [row.peak_bytes for row in rows]
    peak = "–" if None in peaks else f"{max(peaks) / 2**20:.2f}"
    return Figures(ratio, floor / time if time else None, f"{saved / 2**20:.2f}", peak)


def _blocks(sizes: set[tuple[int, int]]) -> dict[str, dict[tuple[int, int], int]]:
    """The blocks that these layers make up; where they make up none, each by itself."""
    whole = {f"{name} block": block for name, block in BLOCKS.items() if set(block) <= sizes}
    return whole or {f"{d}×{k}": {(d, k): 1} for d, k in sorted(sizes)}


@dataclass
class Line:
    """One method on one layer, or over a whole block: every implementation's figures."""

    method: str
    dtype: str
    adapters: str
    where: str
    rank: int
    figures: dict[str, Figures]


def lines_of(layers: list[Layer]) -> Iterator[Line]:
    """A line per method, dtypes, tokens and layer or block, in the order of the run."""
    groups: dict[tuple, dict[str, list[Layer]]] = {}
    for row in layers:
        key = (row.method, row.rank, row.dtype, row.adapter_dtype, row.tokens)
        groups.setdefault(key, {}).setdefault(row.implementation, []).append(row)
    for (method, rank, dtype, adapters, tokens), found in groups.items():
        for name, block in _blocks({(row.out_features, row.in_features) for row in found.get(OURS, [])}).items():
            parts = {
                implementation: [row for row in rows if (row.out_features, row.in_features) in block]
                for implementation, rows in found.items()
            }
            frozen = parts.pop(FROZEN, [])
            figures = {implementation: _figures(rows, frozen, block) for implementation, rows in parts.items()}
            yield Line(method, dtype, adapters, f"{name}, T={tokens}", rank, figures)


def _cells(figures: dict[str, Figures], target: float | None) -> list[str]:
    """Ours beside PEFT's and the fastest of the others; the memory is PEFT's where it has the method."""
    ours = figures[OURS]
    others = {name: f for name, f in figures.items() if name not in (OURS, OURS_IN_PEFT) and f.ratio is not None}
    best = min(others, key=lambda name: others[name].ratio, default=None)
    peft = others.get("PEFT")
    peer = others.get(best, Figures(None, None, "–", "–"))
    held = peft or peer
    missed = target is not None and ours.ratio is not None and ours.ratio > target
    return [
        "–" if peft is None else f"{peft.ratio:.3f}",
        "–" if peer.ratio is None else f"{peer.ratio:.3f} ({best})",
        "RED" if ours.ratio is None else f"**{ours.ratio:.3f}**",
        "–" if target is None else f"{target:.2f}" + ", missed" * missed,
        "–" if ours.of_floor is None else f"{100 * ours.of_floor:.0f}",
        f"{held.saved} / {ours.saved}",
        f"{held.peak} / {ours.peak}",
    ]


def place_of(results: Results) -> str:
    """Where the layers of a run were measured, "gpu" or "cpu": the name of README's marker."""
    devices = {row.device for row in results.layers}
    if len(devices) != 1:
        raise ValueError(
            f"publish: got layers on {sorted(devices) or 'no device'}, wanted a run with those of one device"
        )
    return "cpu" if devices == {"cpu"} else "gpu"


def _markdown(lines: list) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _caption(results: Results) -> str:
    meta = results.meta
    return (
        f"{meta.get('device')}, threads: {meta.get('threads')}, torch {meta.get('torch')}, commit {meta.get('commit')},"
        f" {str(meta.get('date'))[:10]}, `{meta.get('command')}`."
    )


def render(results: Results) -> str:
    """The caption and the table of every line."""
    place, rows = place_of(results), [HEADER]
    for line in lines_of(results.layers):
        target = TARGETS[place].get((line.method, line.dtype)) if line.where == PLACES[place] else None
        name = f"{line.method} r{line.rank}"
        rows.append([name, line.dtype, line.adapters, line.where, *_cells(line.figures, target)])
    scale = "Forward and backward over the frozen layer's time (1.000 is no tax), medians over turns."
    return f"{_caption(results)}\n{scale}\n\n{_markdown(rows)}"


def summary(results: Results) -> str:
    """The lines that README shows: PEFT's layer as it is and accelerated, over the frozen one's; float32 adapters."""
    place, found = place_of(results), {}
    for line in lines_of(results.layers):
        if line.adapters == "float32" and line.where == PLACES[place]:
            found[line.method, line.dtype] = [_ratio(line.figures.get(name)) for name in ("PEFT", OURS_IN_PEFT)]
    dtypes = [dtype for dtype in ("bfloat16", "float32") if any(key[1] == dtype for key in found)]
    rows = [["method", *(f"{name}, {dtype}" for dtype in dtypes for name in ("PEFT", "accelerated"))]]
    for method, name in SUMMARY.items():
        rows.append([name, *(cell for dtype in dtypes for cell in found.get((method, dtype), ["–", "–"]))])
    return f"{_markdown(rows)}\n\n{PLACES[place]}; {_caption(results)}"


def _ratio(figures: Figures | None) -> str:
    return "–" if figures is None or figures.ratio is None else f"{figures.ratio:.2f}"


SECTIONS = {"results": render, "summary": summary}


def write(results: Results, path: str | Path) -> list[str]:
    """Put the tables between the markers that ``path`` has; ValueError where it has none. Returns their names."""
    place, path = place_of(results), Path(path)
    text, written = path.read_text(), []
    for name, make in SECTIONS.items():
        text, found = _between(text, f"<!-- {name}: {place} -->", make(results))
        written += [name] * found
    if not written:
        wanted = " or ".join(f"<!-- {name}: {place} -->" for name in SECTIONS)
        raise ValueError(f"{path}: got no section that starts with {wanted} and ends with <!-- end -->, wanted one")
    path.write_text(text)
    return written


def _between(text: str, marker: str, content: str) -> tuple[str, int]:
    """``text`` with ``content`` in each section from ``marker`` on, and how many there are."""
    section = rf"^{re.escape(marker)}\n.*?^<!-- end -->$"
    return re.subn(section, lambda match: f"{marker}\n{content}\n<!-- end -->", text, flags=re.M | re.S)


def _launches(kernels: list[table.Kernel]) -> str:
    """Each kernel once: its name without a stem, then what a reader needs to judge the bound."""
    lines = []
    for k in kernels:
        name = k.kernel.split("<")[0].rpartition(".")[2]
        inside = f"{k.registers} / {k.shared / 1024:.0f} / {k.resident} / {k.under_way / 1024:.0f}"
        what = (
            f"`{name}` {inside}{' ' * bool(k.product)}{k.product}, {k.bound}" if k.registers else f"{name}, {k.bound}"
        )
        lines.append(what)
    counts = Counter(lines)
    return "; ".join(f"{f'{n} × ' if n > 1 else ''}{line}" for line, n in counts.items())


def estimates_table(rows: list[table.Row]) -> str:
    """A line per case of a backend, with every shape of W; kernels as they are for the first."""
    shapes = list(dict.fromkeys((row.d, row.k) for row in rows))
    before = any(row.before for row in rows)
    head = ["operator", *["before"] * before, *(f"{d}×{k}: µs (share)" for d, k in shapes),
            "kernels: registers / KiB shared / blocks / KiB under way, bound"]  # fmt: skip
    lines = [head]
    cases: dict[tuple, list[table.Row]] = {}
    for row in rows:
        cases.setdefault((row.operator, row.label), []).append(row)
    for (operator, label), each in cases.items():
        times = [f"{1e6 * row.seconds:.1f} ({100 * row.share:.0f} %)" for row in each]
        old = [each[0].before or "–"] if before else []
        lines.append([f"`{operator}`{', ' * bool(label)}{label}", *old, *times, _launches(each[0].kernels)])
    return _markdown(lines)


def write_estimates(page: Path, write: bool = True) -> bool:
    """Renew the tables ``<!-- estimates: backend -->`` from the file beside the estimates; whether any changed."""
    rows, text = table.read(), page.read_text()
    new = text
    for backend in sorted({row.backend for row in rows}):
        chosen = [row for row in rows if row.backend == backend and row.tokens == TOKENS[0]]
        new, found = _between(new, f"<!-- estimates: {backend} -->", estimates_table(chosen))
        if not found:
            raise ValueError(
                f"{page}: got no section <!-- estimates: {backend} --> that ends with <!-- end -->, wanted one"
            )
    if write and new != text:
        page.write_text(new)
    return new != text


def write_routes(page: Path, write: bool = True) -> bool:
    """Renew the table ``<!-- routes -->`` of a block's tax by the routes of its products; whether it changed."""
    header, rows = joined()
    text = page.read_text()
    new, found = _between(text, "<!-- routes -->", _markdown([header, *rows]))
    if not found:
        raise ValueError(f"{page}: got no section <!-- routes --> that ends with <!-- end -->, wanted one")
    if write and new != text:
        page.write_text(new)
    return new != text


def costs_table(name: str) -> str:
    """The Markdown table that stands below ``<!-- cost: name -->``."""
    c, frozen = (cost(n, *SHAPE, torch.bfloat16) for n in (name, None))
    heads = ["trained", "forward FLOPs", "backward FLOPs", "MiB moved", "MiB saved for backward",
             "predicted, x frozen (H100)"]  # fmt: skip
    return _markdown([heads, cells(c, frozen, CEILINGS["sm_90"])])


def write_costs(directory: Path, write: bool = True) -> list[str]:
    """Renew the table below every marker in the pages of ``directory``; returns the names of pages that changed."""
    changed = []
    for page in sorted(directory.glob("*.md")):
        text = page.read_text()
        new = re.sub(
            r"^<!-- cost: (\w+) -->\n(?:\n?(?:\|.*\n)+)?",
            lambda match: f"<!-- cost: {match[1]} -->\n\n{costs_table(match[1])}\n",
            text,
            flags=re.M,
        )
        if new != text:
            changed.append(page.name)
            if write:
                page.write_text(new)
    return changed


FIELDS = {"LoRA": LoRAConfig, "DoRA": DoRAConfig, "AdaLoRA": AdaLoRAConfig, "Bone": BoneConfig, "Bat": BatConfig,
          "VeRA": VeRAConfig}  # fmt: skip


def fields_table() -> str:
    """What a config does with every field that it has, or that PEFT's config of the method has."""
    names = {name for config in FIELDS.values() for name in (*config.known_fields(), *config.peft_refused)}
    rows = [
        [f"`{name}`", *(_fate(config, name) for config in FIELDS.values()), _reason(name)] for name in sorted(names)
    ]
    return _markdown([["field", *FIELDS, "why"], *rows])


def _fate(config: type[AdapterConfig], name: str) -> str:
    if name in config.peft_refused:
        return "refused"
    if name in config.peft_idle:
        return "no effect"
    if name in config.known_fields():
        return "ours" if name in config.ours_only else "as PEFT"
    return ""


def _reason(name: str) -> str:
    reasons = {
        text: None
        for config in FIELDS.values()
        for text in (config.peft_refused.get(name), config.peft_idle.get(name), config.ours_only.get(name))
        if text
    }
    return "; ".join(reasons)


def write_fields(page: Path, write: bool = True) -> bool:
    """Renew the table ``<!-- fields -->``; whether it changed."""
    text = page.read_text()
    new, found = _between(text, "<!-- fields -->", fields_table())
    if not found:
        raise ValueError(f"{page}: got no section <!-- fields --> that ends with <!-- end -->, wanted one")
    if write and new != text:
        page.write_text(new)
    return new != text


def main(argv: list[str] | None = None) -> int:
    """Write what was asked for; prints the names of pages that changed, or the table where no page was named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("results", help="a run's tables, between the markers of the pages")
    measured.add_argument("file", type=Path, metavar="FILE.json")
    measured.add_argument("pages", type=Path, nargs="*", metavar="PAGE.md")
    counted = commands.add_parser("costs", help="the tables of costs")
    counted.add_argument("directory", type=Path, nargs="?", default=Path("docs/methods"))
    estimated = commands.add_parser("estimates", help="the tables of what GPU kernels should take")
    estimated.add_argument("page", type=Path, nargs="?", default=Path("docs/PERFORMANCE.md"))
    told = commands.add_parser("fields", help="the table of config fields")
    told.add_argument("page", type=Path, nargs="?", default=Path("docs/files.md"))
    arguments = parser.parse_args(argv)
    if arguments.command == "fields":
        print(f"{arguments.page} changed" if write_fields(arguments.page) else "nothing changed")
        return 0
    if arguments.command == "estimates":
        changed = [write_estimates(arguments.page), write_routes(arguments.page)]
        print(f"{arguments.page} changed" if any(changed) else "nothing changed")
        return 0
    if arguments.command == "costs":
        print("\n".join(write_costs(arguments.directory)) or "nothing changed")
        return 0
    results = read(arguments.file)
    for page in arguments.pages:
        print(f"{', '.join(write(results, page))} of {arguments.file} written to {page}")
    if not arguments.pages:
        print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
