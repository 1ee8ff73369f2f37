"""The table of results in README: ``bench --readme FILE.json [--write README.md]``.

It stands between ``<!-- results: cpu -->`` (or ``gpu``) and ``<!-- end -->`` and holds one line per method, dtype and
shape: our time beside the best peer's and the target, all over the frozen layer's, the floor, and the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from spectral_ops.cli.results import Layer, Results

# Times over the frozen layer's that the package aims at. CPU: 2 cores, T = 1024, 2048x2048, the usual ranks.
# GPU: an H100, T = 8192, all projections of a Llama-3-8B block together.
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
OURS = ("spectral_ops", "PEFT accelerated")
HEADER = ("method", "dtype", "adapters", "layer", "best peer", "ours", "target", "% of floor", "saved MiB: peer / ours",
          "peak MiB: peer / ours")  # fmt: skip


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.2f}"


def _cells(place: str, layers: Iterable[Layer]) -> list[str]:
    """One line of the table, from every implementation of one method at one dtype and shape."""
    rows = {row.implementation: row for row in layers}
    ours = rows[OURS[0]]
    peers = [row for name, row in rows.items() if name not in (*OURS, "frozen") and row.ratio is not None]
    peer = min(peers, key=lambda row: row.ratio, default=None)
    target = TARGETS[place].get((ours.method, ours.dtype))
    ratio = "RED" if ours.red else "–" if ours.ratio is None else f"**{ours.ratio:.3f}**"
    missed = target is not None and ours.ratio is not None and ours.ratio > target
    return [
        f"{ours.method} r{ours.rank}",
        ours.dtype,
        ours.adapter_dtype,
        f"T={ours.tokens}, {ours.out_features}×{ours.in_features}",
        f"{peer.ratio:.3f} ({peer.implementation})" if peer else "–",
        ratio,
        ("–" if target is None else f"{target:.2f}") + ", missed" * missed,
        "–" if ours.of_floor is None else f"{100 * ours.of_floor:.0f}",
        f"{_mib(peer.saved_bytes if peer else None)} / {_mib(ours.saved_bytes)}",
        f"{_mib(peer.peak_bytes if peer else None)} / {_mib(ours.peak_bytes)}",
    ]


def place_of(results: Results) -> str:
    """ "gpu" or "cpu": where the layers of a run were measured, and the name of README's marker."""
    devices = {row.device for row in results.layers}
    if len(devices) != 1:
        raise ValueError(
            f"readme: got layers on {sorted(devices) or 'no device'}, wanted a run with layers of one device"
        )
    return "cpu" if devices == {"cpu"} else "gpu"


def render(results: Results) -> str:
    """The caption and the Markdown table."""
    place, meta = place_of(results), results.meta
    groups: dict[tuple, list[Layer]] = {}
    for row in results.layers:
        key = (row.method, row.dtype, row.adapter_dtype, row.tokens, row.out_features, row.in_features, row.rank)
        groups.setdefault(key, []).append(row)
    lines = [HEADER, ["---"] * len(HEADER)]
    lines += [_cells(place, rows) for rows in groups.values() if any(row.implementation == OURS[0] for row in rows)]
    caption = (
        f"{meta.get('device')}, {meta.get('threads')} threads, torch {meta.get('torch')}, commit {meta.get('commit')},"
        f" {str(meta.get('date'))[:10]}, `{meta.get('command')}`.\n"
        "Times of one layer's forward and backward over the frozen layer's (1.000 is no tax), medians over turns."
    )
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
