"""Pictures of a run: ``bench --png DIR`` after measuring, or ``bench --draw FILE --png DIR`` from a results file.

roofline: every operator under the ceilings measured in its run. tax and memory: every method beside its peers. growth:
each operator's time over tokens, features, rank and density beside the line that its cost formula predicts.
The colours are Okabe and Ito's, which are told apart with any kind of colour vision.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from spectral_ops._imports import need
from spectral_ops.bench.results import Layer, Operator, Results

COLORS = {
    "frozen": "#999999",
    "spectral_ops": "#0072B2",
    "PEFT accelerated": "#56B4E9",
    "PEFT": "#E69F00",
    "PEFT compiled": "#D55E00",
}
SPARE = ("#009E73", "#CC79A7", "#F0E442", "#000000")  # of peers that have no colour of their own
BACKENDS = {  # colour and marker
    "cpu": ("#0072B2", "o"),
    "cuda": ("#D55E00", "s"),
    "triton": ("#009E73", "^"),
    "reference": ("#999999", "D"),
    "library": ("#000000", "P"),
    "torch.sparse": ("#CC79A7", "v"),
}
UNITS = {"tokens": "tokens", "features": "features, in and out", "rank": "rank", "density": "density of the pattern"}


def pyplot():
    """matplotlib.pyplot, drawing into files; ImportError with the command that mends it where it is missing."""
    need("matplotlib", "a picture", "'spectral_ops[bench]'").use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 9,
        "figure.dpi": 120,
    }
    plt.rcParams.update(style)
    return plt


def caption(results: Results) -> str:
    """Where and how the figures were taken."""
    meta = results.meta
    versions = f"torch {meta.get('torch')}, commit {meta.get('commit') or 'unknown'}, {str(meta.get('date'))[:10]}"
    return f"{meta.get('device')}, threads: {meta.get('threads')}, {versions}\n{meta.get('command')}"


def _frame(figure, title: str, results: Results, handles: list) -> None:
    """Title and legend above, caption below."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(caption(results), x=0.01, ha="left", fontsize=8, color="#444444")
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)
    return path


def _logarithmic(axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        major_formatter=FuncFormatter(lambda value, _: f"{value:,g}"),
        minor_locator=NullLocator(),
    )


def _colors(names: Iterable[str]) -> dict[str, str]:
    """A colour per name: those of COLORS first and in its order."""
    found = dict.fromkeys(names)
    others = [name for name in found if name not in COLORS]
    known = {name: color for name, color in COLORS.items() if name in found}
    return known | dict(zip(others, itertools.cycle(SPARE), strict=False))


def _label_points(axes, points: list[tuple[float, float, str]]) -> None:
    """A word beside each point, at the nearest place that no point or earlier word takes, with a line where it is far.

    Places are looked for on circles around the point, in pixels.
    """
    figure = axes.figure
    figure.canvas.draw()  # settles the layout, so that pixels are final
    renderer, bounds = figure.canvas.get_renderer(), axes.get_window_extent()
    pixels = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in pixels]
    for (x, y, text), (px, py) in sorted(zip(points, pixels, strict=True), key=lambda item: tuple(item[1])):
        word = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset pixels", fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#777777", "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        extent = word.get_window_extent(renderer)
        width, height = extent.width + 4, 9 * figure.dpi / 72
        for radius in range(8, 400, 6):
            places = [
                (
                    px + radius * math.cos(angle) - (width if math.cos(angle) < -0.1 else 0),
                    py + radius * math.sin(angle),
                )
                for angle in (0.3, -0.3, 2.8, -2.8, 1.1, -1.1, 2.1, -2.1)
            ]
            boxes = [(left, middle - height / 2, left + width, middle + height / 2) for left, middle in places]
            free = [
                b for b in boxes
                if b[0] > bounds.x0 and b[2] < bounds.x1 and b[1] > bounds.y0 and b[3] < bounds.y1
                and not any(b[0] < t[2] and t[0] < b[2] and b[1] < t[3] and t[1] < b[3] for t in taken)
            ]  # fmt: skip
            if free:
                break
        box = free[0] if free else boxes[0]
        taken.append(box)
        word.set_position((box[0] + 2 - px, (box[1] + box[3]) / 2 - py))


def _largest(rows: list[Operator]) -> list[Operator]:
    """Of every operator and backend the row that moves most."""
    best: dict[tuple[str, str], Operator] = {}
    for row in rows:
        key = row.operator, row.backend
        if key not in best or row.bytes > best[key].bytes:
            best[key] = row
    return list(best.values())


def roofline(results: Results, path: Path) -> Path:
    """Rate over intensity, both logarithmic, a row per dtype; what only moves bytes stands left.

    The backends of an operator share its intensity: a line joins them, and its name stands at the fastest.
    """
    plt = pyplot()
    timed = {name: _largest([r for r in results.operators if r.dtype == name and r.times]) for name in results.ceilings}
    timed = {dtype: rows for dtype, rows in timed.items() if rows}
    figure, axes = plt.subplots(
        len(timed), 2, figsize=(14, 7 * len(timed)), width_ratios=[1, 4], squeeze=False, layout="constrained"
    )
    backends = dict.fromkeys(row.backend for rows in timed.values() for row in rows)
    handles = [_point(plt.Line2D([], [], ls="", label=name), name) for name in backends]
    _frame(figure, "Every operator beside the roofline (above the slope: its data came from a cache)", results, handles)
    for (dtype, rows), (left, right) in zip(timed.items(), axes, strict=True):
        memory, products = (rate / 1e9 for rate in dataclasses.astuple(results.ceilings[dtype])[::-1])
        moving, working = ([row for row in rows if bool(row.flops) is works] for works in (False, True))
        left.axhline(memory, color="black", lw=1.2)
        left.set(yscale="log", xlim=(0, 1), xticks=[], ylabel="GB/s", title=f"{dtype}: no arithmetic")
        at = [row.flops / row.bytes for row in working] + [products / memory]
        line = sorted([min(at) / 2, max(at) * 4, products / memory])
        right.plot(line, [min(products, memory * x) for x in line], color="black", lw=1.2)
        right.set(xscale="log", yscale="log", xlim=(line[0], line[-1]), ylabel="GFLOP/s")
        right.set(xlabel="FLOP per byte that must move")
        right.set_title(f"{dtype}: ceilings of this run {products:,.0f} GFLOP/s, {memory:,.1f} GB/s")
        _logarithmic(right.xaxis)
        for axis, shown in ((left, moving), (right, working)):
            by_name: dict[str, list[Operator]] = {}
            for row in shown:
                by_name.setdefault(row.operator, []).append(row)
            names = []
            for i, rows in enumerate(by_name.values()):
                x = rows[0].flops / rows[0].bytes if axis is right else 0.8 * (i + 0.5) / len(by_name)
                names.append(_operator(axis, x, rows))
            axis.grid(alpha=0.25)
            axis.margins(y=0.15)
            _logarithmic(axis.yaxis)
            _label_points(axis, names)
    return _save(figure, path)


def _point(line, backend: str):
    color, marker = BACKENDS.get(backend, ("#E69F00", "X"))
    line.set(color=color, marker=marker, ms=6, mec="white", mew=0.5)
    return line


def _operator(axes, x: float, rows: list[Operator]) -> tuple[float, float, str]:
    """Draw one operator's backends above each other; returns where its name belongs."""
    rates = [(row.flops or row.bytes) / row.seconds / 1e9 for row in rows]
    axes.plot([x] * len(rows), rates, color="#bbbbbb", lw=0.8, zorder=1)
    for row, rate in zip(rows, rates, strict=True):
        _point(axes.plot(x, rate)[0], row.backend)
    return x, max(rates), rows[0].operator


def _panels(rows: list[Layer]) -> dict[str, list[Layer]]:
    """The layers by what one chart has in common: dtype, the parameters' dtype and tokens."""
    panels: dict[str, list[Layer]] = {}
    for row in rows:
        panels.setdefault(f"{row.dtype}, adapters {row.adapter_dtype}, T={row.tokens}", []).append(row)
    return panels


def _bars(axes, rows: list[Layer], value: Callable, spread: Callable, colors: dict, form: str) -> None:
    """A group of bars per method, one per implementation, from zero; RED in the place of a bar that may not stand."""
    groups: dict[str, list[Layer]] = {}
    for row in rows:
        groups.setdefault(f"{row.method}\nr{row.rank}", []).append(row)
    width = 0.86 / max(map(len, groups.values()))
    for at, members in enumerate(groups.values()):
        for i, row in enumerate(sorted(members, key=lambda row: list(colors).index(row.implementation))):
            x, height = at + (i - (len(members) - 1) / 2) * width, value(row)
            if row.red:
                axes.text(x, 0, " RED", rotation=90, ha="center", va="bottom", fontweight="bold")
            elif height is not None:
                color = colors[row.implementation]
                bar = axes.bar(x, height, 0.92 * width, color=color, yerr=spread(row), ecolor="#333333")
                axes.bar_label(bar, [form.format(height)], padding=2, fontsize=7, rotation=90)
    axes.set_xticks(range(len(groups)), groups)
    axes.axhline(0, color="black", lw=0.8)
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.18)


def _bar_charts(results: Results, path: Path, title: str, rows: list[Layer], kinds: list[tuple]) -> Path:
    """A chart per panel of layers and kind of figure: its heading, unit, value, spread and format."""
    plt = pyplot()
    panels, colors = _panels(rows), _colors(row.implementation for row in rows)
    size = max(13.0, 0.17 * max(map(len, panels.values()))), 0.9 + 3.3 * len(panels) * len(kinds)
    figure, axes = plt.subplots(len(panels) * len(kinds), 1, figsize=size, squeeze=False, layout="constrained")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in colors.items()]
    _frame(figure, f"{title}, {rows[0].out_features}x{rows[0].in_features}", results, handles)
    charts = itertools.product(panels.items(), kinds)
    for axis, ((name, members), (heading, unit, value, spread, form)) in zip(axes.flat, charts, strict=True):
        _bars(axis, members, value, spread, colors, form)
        axis.set(title=f"{heading}: {name}", ylabel=unit)
    return _save(figure, path)


def _quartiles(row: Layer):
    if len(row.ratios) < 4:
        return None
    low, middle, high = statistics.quantiles(row.ratios, n=4)
    return [[100 * (middle - low)], [100 * (high - middle)]]


def tax(results: Results, rows: list[Layer], path: Path) -> Path:
    """What each method adds to the frozen layer's time, per cent, with the quartiles over turns."""

    def percent(row: Layer) -> float | None:
        return None if row.ratio is None else 100 * (row.ratio - 1)

    rows = [row for row in rows if row.implementation != "frozen"]
    kinds = [("tax", "% over the frozen layer", percent, _quartiles, "{:.1f}")]
    return _bar_charts(results, path, "Adapter tax of a layer", rows, kinds)


def memory(results: Results, rows: list[Layer], path: Path) -> Path:
    """Bytes saved for backward and the peak of a step, by method."""

    def mib(size: int | None) -> float | None:
        return None if size is None else size / 2**20

    kinds = [
        ("saved", "MiB held for backward", lambda row: mib(row.saved_bytes), lambda row: None, "{:.3g}"),
        ("peak", "MiB at most in a step", lambda row: mib(row.peak_bytes), lambda row: None, "{:.3g}"),
    ]
    return _bar_charts(results, path, "Memory of a layer", rows, kinds)


def growth(results: Results, variable: str, path: Path) -> Path:
    """Measured and predicted time of every operator over one variable, both axes logarithmic."""
    plt = pyplot()
    series: dict[str, list] = {}
    for row in results.growth:
        if row.variable == variable:
            series.setdefault(f"{row.operator} ({row.backend})", []).append(row)
    columns = min(5, len(series))
    lines = math.ceil(len(series) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns + 0.5, 2.4 * lines + 1.2), squeeze=False, layout="constrained"
    )
    dtypes = dict.fromkeys(row.dtype for row in results.growth)
    colors = dict(zip(dtypes, ("#0072B2", "#E69F00", "#009E73"), strict=False))
    for axis in axes.flat[len(series) :]:
        axis.set_axis_off()
    for (name, rows), axis in zip(sorted(series.items()), axes.flat, strict=False):
        for row in rows:
            axis.plot(row.values, [1e6 * s for s in row.predicted], "--", color=colors[row.dtype], lw=1)
            axis.plot(row.values, [1e6 * s for s in row.seconds], "o-", color=colors[row.dtype], ms=3.5, lw=1.3)
        grows = any(row.verdict == "GROWS" for row in rows)
        axis.set_title(f"{name}: GROWS" if grows else name, fontsize=8, fontweight="bold" if grows else None)
        axis.set(xscale="log", yscale="log")
        _logarithmic(axis.yaxis)
        axis.tick_params(labelsize=7)
        axis.set_xticks(rows[0].values, [f"{v:g}" for v in rows[0].values])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25)
    figure.supylabel("microseconds, medians", fontsize=9)
    handles = [plt.Line2D([], [], color=color, marker="o", ms=4, label=dtype) for dtype, color in colors.items()]
    handles.append(plt.Line2D([], [], color="#444444", ls="--", label="predicted"))
    _frame(figure, f"Cost against {UNITS[variable]}", results, handles)
    return _save(figure, path)


def draw(results: Results, directory: str | Path) -> list[Path]:
    """Draw what the results have sections for, as DIR/<date>-<commit>-<picture>.png; returns the files."""
    stem = f"{str(results.meta.get('date'))[:10]}-{results.meta.get('commit') or 'uncommitted'}"

    def path(name: str) -> Path:
        return Path(directory) / f"{stem}-{name}.png"

    files = []
    if results.ceilings and any(row.times and row.dtype in results.ceilings for row in results.operators):
        files.append(roofline(results, path("roofline")))
    shapes: dict[str, list[Layer]] = {}
    for row in results.layers:
        shapes.setdefault(f"{row.out_features}x{row.in_features}", []).append(row)
    for shape, rows in shapes.items():
        files.append(memory(results, rows, path(f"memory-{shape}")))
        if any(row.implementation != "frozen" for row in rows):
            files.append(tax(results, rows, path(f"tax-{shape}")))
    for variable in dict.fromkeys(row.variable for row in results.growth):
        files.append(growth(results, variable, path(f"growth-{variable}")))
    return files
