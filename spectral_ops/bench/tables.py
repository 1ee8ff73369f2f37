"""The tables that ``bench`` prints. RED stands where a numerical check failed, in place of every time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

from spectral_ops._table import table
from spectral_ops.bench.methods import BLOCKS
from spectral_ops.bench.peers import FROZEN
from spectral_ops.bench.results import Counted, Growth, Layer, Operator, Overhead, Results, Training
from spectral_ops.bench.training import mode

RATES = ["GFLOP", "MB", "GB/s", "TFLOP/s", "% of floor"]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"


def _error(row: Counted) -> str:
    return "-" if row.error is None else f"{row.error:.1e}"


def _rates(row: Counted) -> list[str]:
    """Arithmetic and least bytes, and the rates at which the time meets them."""
    cells = [f"{row.flops / 1e9:.2f}", f"{row.bytes / 1e6:.1f}"]
    if not row.times:
        return [*cells, "RED", "RED", "RED"]
    seconds = row.seconds
    return [
        *cells,
        f"{row.bytes / seconds / 1e9:.1f}",
        f"{row.flops / seconds / 1e12:.3f}",
        f"{100 * row.of_floor:.0f}",
    ]


def layers_table(rows: Iterable[Layer]) -> str:
    """A line per implementation: step time, over the frozen layer's, rates, memory, and the error."""
    header = ["method", "dtype", "adapters", "T", "layer", "implementation", "ms/step", "x frozen", *RATES, "saved MiB",
              "peak MiB", "error"]  # fmt: skip
    lines = [
        [
            row.method, row.dtype, row.adapter_dtype, row.tokens, f"{row.out_features}x{row.in_features}",
            row.implementation, "RED" if row.red else f"{1e3 * row.seconds:.2f}",
            "RED" if row.red else f"{row.ratio:.3f}", *_rates(row), _mib(row.saved_bytes), _mib(row.peak_bytes),
            _error(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def operators_table(rows: Iterable[Operator]) -> str:
    """A line per operator and backend."""
    header = ["row", "operator", "backend", "dtype", "T", "layer", "us", *RATES, "error"]
    lines = [
        [
            row.row, row.operator, row.backend, row.dtype, row.tokens, f"{row.out_features}x{row.in_features}",
            "RED" if row.red else f"{1e6 * row.seconds:.1f}", *_rates(row), _error(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def overhead_table(rows: Iterable[Overhead]) -> str:
    """A line per layer: microseconds of its forward and backward by token count."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row.name, row.implementation), {})[row.tokens] = statistics.median(row.times)
    counts = sorted({T for times in found.values() for T in times})
    lines = [[*key, *(f"{1e6 * times[T]:.1f}" if T in times else "-" for T in counts)] for key, times in found.items()]
    return table(["method", "implementation", *(f"us at T={T}" for T in counts)], lines)


def growth_table(rows: Iterable[Growth]) -> str:
    """A line per series: its variable, smallest and largest size, times and predictions there, and the verdict."""
    header = ["operator", "backend", "dtype", "over", "values", "us, smallest", "us, largest", "us predicted", "growth"]
    lines = [
        [
            g.operator, g.backend, g.dtype, g.variable, f"{g.values[0]:g} to {g.values[-1]:g}",
            f"{1e6 * g.seconds[0]:.1f}", f"{1e6 * g.seconds[-1]:.1f}", f"{1e6 * g.predicted[-1]:.1f}", g.verdict,
        ]
        for g in rows
    ]  # fmt: skip
    return table(header, lines)


def beside_frozen(rows: list[Training]) -> Iterator[tuple[Training, Training]]:
    """Every row with the frozen model's of the same turns, which comes before it."""
    frozen = None
    for row in rows:
        if row.implementation == FROZEN:
            frozen = row
        yield row, frozen


def training_ratio(row: Training, frozen: Training) -> float | None:
    """The median over turns of the step's time over the frozen model's; None where either is red."""
    if row.red or frozen.red:
        return None
    return statistics.median(a / b for a, b in zip(row.times, frozen.times, strict=True))


def training_table(rows: list[Training]) -> str:
    """A line per implementation; RED stands in place of every figure of one whose loss or gradients are wrong."""
    header = ["method", "dtype", "mode", "implementation", "s/step", "x frozen", "tokens/s", "peak MiB"]
    header += ["beyond frozen", "loss", "error", "compiled"]
    lines = []
    for row, frozen in beside_frozen(rows):
        figures = ["RED"] * 5
        if not row.red:
            over = training_ratio(row, frozen)
            beyond = "-" if frozen.red else f"{(row.peak_bytes - frozen.peak_bytes) / 2**20:.1f}"
            figures = [f"{row.seconds:.4g}", "-" if over is None else f"{over:.3f}", f"{row.tokens_per_second:.0f}",
                       f"{row.peak_bytes / 2**20:.1f}", beyond]  # fmt: skip
        graphs = f"{row.blocks} blocks: {row.graphs} graphs, {row.graph_breaks} breaks" if row.compiled else "-"
        error = "-" if row.error is None else f"{row.error:.1e}"
        how = mode(row.compiled, row.checkpointing)
        lines.append([row.method, row.dtype, how, row.implementation, *figures, f"{row.loss:.4f}", error, graphs])
    return table(header, lines)


def block_ratio(rows: Iterable[Layer], block: dict[tuple[int, int], int]) -> float | None:
    """Time of all projections of a block over the frozen ones', from the rows of one implementation and the frozen.

    Each size of ``block`` ([out, in]: how many) counts with its median ratio, weighted by the frozen layer's time; the
    ratio is taken within turns, so a machine that drifts does not move it. None where a size is missing or red.
    """
    by_size: dict[tuple[int, int], dict[bool, Layer]] = {}
    for row in rows:
        by_size.setdefault((row.out_features, row.in_features), {})[row.implementation == FROZEN] = row
    total = frozen = 0.0
    for size, count in block.items():
        found = by_size.get(size, {})
        if set(found) != {True, False} or not found[False].times:
            return None
        total += count * found[True].seconds * found[False].ratio
        frozen += count * found[True].seconds
    return total / frozen


def blocks_table(rows: Iterable[Layer], names: Iterable[str]) -> str:
    """A line per named block, method and implementation: the tax of the whole block, and what it saves for backward."""
    groups: dict[tuple, dict[str, list[Layer]]] = {}
    for row in rows:
        key = (row.method, row.dtype, row.adapter_dtype, row.tokens)
        groups.setdefault(key, {}).setdefault(row.implementation, []).append(row)
    lines = []
    for name in names:
        block = BLOCKS[name]
        for key, found in groups.items():
            for implementation in (name for name in found if name != FROZEN):
                measured = found[implementation]
                saved = {(row.out_features, row.in_features): row.saved_bytes for row in measured}
                if not set(block) <= set(saved):
                    continue
                ratio = block_ratio([*measured, *found.get(FROZEN, [])], block)
                total = sum(count * saved[size] for size, count in block.items())
                lines.append([name, *key, implementation, "RED" if ratio is None else f"{ratio:.3f}", _mib(total)])
    return table(["block", "method", "dtype", "adapters", "T", "implementation", "x frozen", "saved MiB"], lines)


def report(found: Results, blocks: Iterable[str] = ()) -> str:
    """Every table of what was measured, the ceilings first and the whole blocks last."""
    parts = []
    if found.ceilings:
        reached = (
            f"{name} {c.flops_per_second / 1e12:.3g} TFLOP/s, copies {c.bytes_per_second / 1e9:.3g} GB/s"
            for name, c in found.ceilings.items()
        )
        parts.append("ceilings measured in this run: " + "; ".join(reached))
    if found.operators:
        parts.append(operators_table(found.operators))
    if found.layers:
        parts.append(layers_table(found.layers))
    if above := sum(row.times != [] and row.of_floor > 1.1 for row in (*found.layers, *found.operators)):
        parts.append(
            f"{above} rows lie above 100 % of their floor: their data stayed in a cache, or the machine was busier when"
            " the ceilings were measured"
        )
    if found.training:
        parts.append(training_table(found.training))
    if found.overhead:
        parts.append("host overhead, forward and backward, float32:\n" + overhead_table(found.overhead))
    if found.growth:
        parts.append(growth_table(found.growth))
    if found.layers and (named := [name for name in blocks if name in BLOCKS]):
        parts.append("all projections of a block:\n" + blocks_table(found.layers, named))
    return "\n\n".join(parts)
