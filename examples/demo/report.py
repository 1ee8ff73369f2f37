"""What the demo shows: progress, one table, one picture."""

import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LABELS = {"frozen": "frozen model", "peft": "PEFT", "plain": "plain PyTorch", "spectral_ops": "spectral_ops"}
COLORS = {"frozen": "#9aa5b1", "peft": "#e08e45", "plain": "#e08e45", "spectral_ops": "#1f6fb2"}


@contextmanager
def progress(console: Console, title: str, total: int):
    """Yields `advance(note)`: a live bar on a terminal, plain lines (at most one every 5 s, and the last) elsewhere."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
        return
    done, shown = 0, 0.0

    def advance(note: str) -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown >= 5:
            shown = time.monotonic()
            print(f"  {title:<24} {done:>3}/{total}  {note}", flush=True)

    yield advance


def mib(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"


def peer_in(result: dict) -> str:
    """The variant that spectral_ops was trained beside."""
    return next(name for name in result["losses"] if name != "spectral_ops")


def table(result: dict) -> Table:
    """The one table; `result` is what outputs/demo-<method>.json holds."""
    seconds, saved, peak = result["seconds"], result["saved"], result["peak"]
    frozen, peer = seconds["frozen"], peer_in(result)
    out = Table(title=result["title"], title_justify="left")
    out.add_column("")
    for name in seconds:
        out.add_column(LABELS[name], justify="right")

    def row(label: str, cell) -> None:
        out.add_row(label, *(cell(name) for name in seconds))

    row("seconds per step", lambda v: f"{seconds[v]:.3g}")
    row(f"ratio to {LABELS[peer]}", lambda v: f"{seconds[v] / seconds[peer]:.2f}×")
    row("tax over the frozen model", lambda v: "–" if v == "frozen" else f"{seconds[v] / frozen - 1:+.1%}")
    row("saved for backward", lambda v: mib(saved[v]))
    row("  beyond the frozen model", lambda v: "–" if v == "frozen" else mib(saved[v] - saved["frozen"]))
    row("peak memory", lambda v: mib(peak[v]))
    row("largest loss difference", lambda v: f"{result['loss_difference']:.2g}" if v == "spectral_ops" else "")
    return out


def picture(result: dict, path: Path) -> None:
    """Losses of both runs on top of each other, and bars of time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result["seconds"])
    labels, colors = [LABELS[n] for n in names], [COLORS[n] for n in names]
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13.5, 4.2), width_ratios=[1.5, 1, 1.1], layout="constrained"
    )
    figure.suptitle(result["title"], x=0.01, ha="left", fontweight="bold")

    peer = peer_in(result)
    at = range(1, len(result["losses"][peer]) + 1)
    left.plot(at, result["losses"][peer], color=COLORS[peer], lw=6, alpha=0.55, label=LABELS[peer])
    left.plot(at, result["losses"]["spectral_ops"], color=COLORS["spectral_ops"], lw=1.6, marker="o", ms=3.5)
    left.lines[-1].set_label("spectral_ops")
    left.set(xlabel="step", title=f"training loss (largest difference {result['loss_difference']:.1g})")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    left.grid(axis="y", alpha=0.25)

    frozen = result["seconds"]["frozen"]
    bars = middle.bar(labels, [result["seconds"][n] for n in names], color=colors, width=0.65)
    notes = [
        f"{result['seconds'][n]:.3g} s" + (f"\n{result['seconds'][n] / frozen - 1:+.0%}" * (n != "frozen"))
        for n in names
    ]
    middle.bar_label(bars, notes, padding=3)
    middle.set(title="seconds per step, tax over frozen")
    middle.margins(y=0.18)

    groups = {"saved for\nbackward": result["saved"], "peak": result["peak"]}
    width = 0.26
    for i, name in enumerate(names):
        heights = [values[name] / 2**20 for values in groups.values()]
        bars = right.bar([g + (i - 1) * width for g in range(len(groups))], heights, width * 0.94, color=colors[i])
        right.bar_label(bars, [f"{h:,.0f}" for h in heights], padding=2, fontsize=9)
        bars.set_label(labels[i])
    right.set_xticks(range(len(groups)), groups)
    right.set(title="memory, MiB")
    right.legend(frameon=False, loc="upper left")
    right.margins(y=0.18)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
