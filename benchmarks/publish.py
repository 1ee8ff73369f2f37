"""The table of results in README: ``bench --readme FILE.json [--write README.md]``.

It stands between ``<!-- results: cpu -->`` (or ``gpu``) and ``<!-- end -->`` and holds a line per method, dtype, tokens
and layer, or where a run measured every projection of a model's block, the block: our time beside the best peer's and
the target, all over the frozen layer's; the share of the floor; and memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectral_ops.bench.results import Layer, Results
from spectral_ops.bench.shapes import BLOCKS
from spectral_ops.bench.tables import FROZEN, block_ratio

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


def _lines(place: str, layers: list[Layer]) -> Iterator[list[str]]:
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
            where = f"{name}, T={tokens}"
            target = TARGETS[place].get((method, dtype)) if where == PLACES[place] else None
            yield [f"{method} r{rank}", dtype, adapters, where, *_cells(figures, target)]


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
            f"readme: got layers on {sorted(devices) or 'no device'}, wanted a run with those of one device"
        )
    return "cpu" if devices == {"cpu"} else "gpu"


def render(results: Results) -> str:
    """The caption and the Markdown table."""
    meta = results.meta
    caption = (
        f"{meta.get('device')}, threads: {meta.get('threads')}, torch {meta.get('torch')}, commit {meta.get('commit')},"
        f" {str(meta.get('date'))[:10]}, `{meta.get('command')}`.\n"
        "Forward and backward over the frozen layer's time (1.000 is no tax), medians over turns."
    )
    lines = [HEADER, ["---"] * len(HEADER), *_lines(place_of(results), results.layers)]
    return caption + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(results: Results, path: str | Path) -> None:
    """Put the table between the markers of ``path``; ValueError where it has none."""
    marker, path = f"<!-- results: {place_of(results)} -->", Path(path)
    text = path.read_text()
    new, found = re.subn(
        rf"^{re.escape(marker)}\n.*?^<!-- end -->$",
        lambda match: f"{marker}\n{render(results)}\n<!-- end -->",
        text,
        flags=re.M | re.S,
    )
    if found != 1:
        raise ValueError(f"{path}: got {found} sections from {marker} to <!-- end -->, wanted 1")
    path.write_text(new)
