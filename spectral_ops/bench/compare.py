"""What changed between two runs, and what is noise: ``bench --compare A.json B.json``.

Rows are matched by everything but what was measured. A layer's or a model's figure is its time over the frozen one's in
the same turn; an operator's is its time or, where device or threads differ, its time over the floor that its own run's
ceilings give. The interval is the one that inverts the rank-sum test (Hodges and Lehmann, 1963): of all quotients of a
figure of B and one of A, those that are left when the test's critical number is taken off both ends. It supposes no
distribution, only turns that do not depend on each other. All rows of a comparison share FALSE_RATE: of a hundred
comparisons of a program with itself at most one shows any difference. Below MINIMUM a difference counts as none,
because no interval within a run knows what changes from run to run.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from spectral_ops._table import table
from spectral_ops.bench.results import SECTIONS, Counted, Layer, Results, Training

FALSE_RATE = 0.01  # of a comparison, all its rows together
MINIMUM = 0.02  # the smallest relative difference that counts
MEASURED = {"times", "ratios", "flops", "bytes", "floor_seconds", "saved_bytes", "peak_bytes", "error", "red",
            "seconds", "predicted", "values", "verdict", "tokens_per_second", "loss", "graphs",
            "graph_breaks"}  # fmt: skip
FORMATS = {"tokens": "T={}", "out_features": "out {}", "in_features": "in {}", "rank": "r{}",
           "density": "density {:g}", "adapter_dtype": "adapters {}", "batch": "batch {}", "length": "length {}",
           "blocks": "{} blocks"}  # fmt: skip


@dataclass
class Change:
    """One row of both runs. ratio: B's figure over A's; bounds: its interval, None where the turns are too few."""

    name: str
    before: str
    after: str
    verdict: str
    ratio: float | None = None
    bounds: tuple[float, float] | None = None
    regression: bool = False


def ratio_and_bounds(a: list[float], b: list[float], false_rate: float) -> tuple[float, tuple[float, float] | None]:
    """How many times as large b's values are as a's, and the bounds that this leaves with probability ``false_rate``.

    The bounds are None where so few values cannot tell anything at that rate.
    """
    n, m = len(a), len(b)
    quotients = sorted(y / x for x in a for y in b)
    deviation = math.sqrt(n * m * (n + m + 1) / 12)
    k = math.floor(n * m / 2 + statistics.NormalDist().inv_cdf(false_rate / 2) * deviation)
    return statistics.median(quotients), (quotients[k - 1], quotients[-k]) if k >= 1 else None


def turns_wanted(false_rate: float) -> int:
    """The fewest turns, in both runs, that give bounds at this rate."""
    return next(n for n in range(2, 1000) if ratio_and_bounds([1.0] * n, [1.0] * n, false_rate)[1])


def identity(row: object) -> tuple:
    """What a row is of, whatever was measured."""
    fields = (f.name for f in dataclasses.fields(row))
    return (type(row), *((name, getattr(row, name)) for name in fields if name not in MEASURED))


def label(row: object) -> str:
    words = []
    for name, value in identity(row)[1:]:
        if isinstance(value, bool):
            words += [name] * value
        elif value is not None:
            words.append(FORMATS.get(name, "{}").format(value))
    return " ".join(words)


def same_machine(a: Results, b: Results) -> bool:
    return all(a.meta.get(key) == b.meta.get(key) for key in ("device", "threads"))


def _rows(results: Results) -> dict[tuple, object]:
    return {identity(row): row for section in SECTIONS for row in getattr(results, section)}


def _figures(row: object, rows: dict[tuple, object], times_count: bool) -> tuple[list[float], str]:
    """The values to compare and their unit; no values where none of this row mean anything on another machine."""
    if isinstance(row, Layer):
        return row.ratios, "x frozen"
    if isinstance(row, Training):
        frozen = rows.get(identity(dataclasses.replace(row, implementation="frozen")))
        if frozen is not None and len(frozen.times) == len(row.times):
            return [t / f for t, f in zip(row.times, frozen.times, strict=True)], "x frozen"
    times = getattr(row, "times", [])
    if times_count:
        return [1e3 * t for t in times], "ms"
    if isinstance(row, Counted):
        return [t / row.floor_seconds for t in times], "x floor"
    return [], ""


def _flag(row: object) -> str:
    """The word for a row that is wrong whatever its time: RED, GROWS, or none."""
    return "RED" if getattr(row, "red", False) else "GROWS" if getattr(row, "verdict", "") == "GROWS" else ""


def changes(a: Results, b: Results) -> Iterator[Change]:
    """Every row of both runs that has something to compare, in B's order."""
    before, after = _rows(a), _rows(b)
    times_count = same_machine(a, b)
    pairs = []
    for key, row in after.items():
        old = before.get(key)
        if old is None or getattr(row, "implementation", "") == "frozen":
            continue
        name = label(row)
        if _flag(old) or _flag(row):
            verdict = f"{_flag(row)}" + " in both" * bool(_flag(old)) if _flag(row) else f"no longer {_flag(old)}"
            yield Change(name, _flag(old), _flag(row), verdict, regression=not _flag(old))
            continue
        if isinstance(row, Layer) and row.saved_bytes > (1 + MINIMUM) * old.saved_bytes:
            sizes = (f"{r.saved_bytes / 2**20:.2f} MiB" for r in (old, row))
            yield Change(f"{name}: saved", *sizes, "saves more", regression=True)
        (first, unit), (second, other) = _figures(old, before, times_count), _figures(row, after, times_count)
        if first and second and unit == other:
            pairs.append((name, first, second, unit))
    for name, first, second, unit in pairs:
        ratio, bounds = ratio_and_bounds(first, second, FALSE_RATE / len(pairs))
        if bounds is None:
            verdict = "too few turns"
        elif bounds[0] > 1 and ratio >= 1 + MINIMUM:
            verdict = "slower"
        elif bounds[1] < 1 and ratio <= 1 / (1 + MINIMUM):
            verdict = "faster"
        else:
            verdict = "no difference"
        figures = (f"{statistics.median(values):.4g} {unit}" for values in (first, second))
        yield Change(name, *figures, verdict, ratio, bounds, verdict == "slower")


def _heading(a: Results, b: Results) -> Iterator[str]:
    for side, results in (("A", a), ("B", b)):
        keys = ("device", "threads", "torch", "commit", "date", "command")
        yield f"{side}: " + ", ".join(f"{key} {results.meta[key]}" for key in keys if key in results.meta)
    if not same_machine(a, b):
        yield (
            "\nTHE MACHINES DIFFER in device or threads: no times are compared, only ratios"
            " (layers and models: to the frozen one; operators: to the floor under their own run's ceilings)."
        )
    for dtype in a.ceilings.keys() & b.ceilings.keys():
        x, y = a.ceilings[dtype], b.ceilings[dtype]
        flops, moved = y.flops_per_second / x.flops_per_second, y.bytes_per_second / x.bytes_per_second
        yield f"ceilings of {dtype}, B over A: products {flops:.3f}, memory {moved:.3f}"


def report(a: Results, b: Results) -> tuple[str, bool]:
    """What ``bench --compare`` prints, and whether anything became worse."""
    found = list(changes(a, b))
    rows = []
    for c in found:
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        bounds = "" if c.bounds is None else f"{c.bounds[0]:.3f} to {c.bounds[1]:.3f}"
        rows.append([c.name, c.before, c.after, ratio, bounds, c.verdict])
    lines = [*_heading(a, b), "", table(["row", "A", "B", "B/A", "interval", "verdict"], rows), ""]
    before, after = _rows(a), _rows(b)
    for side, mine, others in (("A", before, after), ("B", after, before)):
        if only := [label(row) for key, row in mine.items() if key not in others]:
            lines += [f"only in {side}: {len(only)}", *(f"  {name}" for name in only)]
    timed = sum(c.ratio is not None for c in found)
    if any(c.verdict == "too few turns" for c in found):
        lines.append(
            f"for {timed} rows at this rate both runs need {turns_wanted(FALSE_RATE / timed)} turns (--repeats)"
        )
    worse = [c for c in found if c.regression]
    lines.append(
        f"{timed} rows timed in both, {len(worse)} regressions"
        f" (all rows together: {FALSE_RATE:.0%} false alarms; smallest difference that counts: {MINIMUM:.0%})"
    )
    return "\n".join(lines), bool(worse)
