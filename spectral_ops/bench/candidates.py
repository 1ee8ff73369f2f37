"""Measures every candidate of every operator: what ``tune`` puts into the tables that :mod:`spectral_ops.tuning` reads.

The candidates of a class take turns with cold caches: a GPU's L2 is overwritten before every call, as is a buffer
larger than a CPU's last cache. Each is first held against the reference in float64; one that is wrong, that raises or
whose second run has other bits takes no part. The default loses to the fastest only by more than ``MARGIN`` of the
median and where the middle halves of the two do not overlap; the others' times include what looking them up costs on
the host, which a small kernel does not hide.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from spectral_ops import _library, backends, tuning
from spectral_ops._library import Operator
from spectral_ops.bench import judge
from spectral_ops.bench.clock import flush, interleave
from spectral_ops.bench.methods import DTYPES
from spectral_ops.bench.results import meta
from spectral_ops.bench.samples import arguments

MARGIN = 0.05
FIRST = ("lowrank", "dora", "bat", "csr", "blocksum")  # stems, in this order before all others


def source(device: torch.device) -> str:
    """Device, versions, date and commit of a measurement made now."""
    of = meta(str(device))
    name = of["device"] if device.type == "cuda" else f"{of['device']}, {of['threads']} threads"
    versions = ", ".join(f"{package} {of[package]}" for package in ("torch", "triton", "spectral_ops") if of[package])
    return f"{name}, {versions}, {str(of['date'])[:10]}, commit {of['commit']}"


def lookup_seconds(repeats: int = 200) -> float:
    """What the overload ``.tuned`` adds to a call, on the host."""
    operator, args = _library.OPERATORS["block_sum"], (torch.zeros(1, 16), 4, None, None, 0.0)
    calls = {"direct": lambda: operator.default(*args), "tuned": lambda: operator.tuned(*args)}
    times = {
        name: statistics.median(t) for name, t in interleave(calls, lambda _: None, repeats, args[0].device).items()
    }
    return max(times["tuned"] - times["direct"], 0.0)


def measure(
    operator: Operator, args: tuple, between: Callable[[str], None], repeats: int, lookup: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every candidate, the default first, and why which of them are left out."""
    device, (dtype, _) = args[0].device, tuning.signature(args)
    exact = judge.outputs(operator, operator.reference, judge.converted(args, torch.float64, str(device)))
    calls, refused = {}, {}
    for choice in backends.candidates(operator, device.type):
        call = backends.implementation(operator, choice)
        try:
            got, again = (judge.outputs(operator, call, judge.converted(args)) for _ in range(2))
        except Exception as error:  # a kernel that does not fit this device: to be told, not to end the run
            refused[choice] = f"raised {type(error).__name__}: {str(error).splitlines()[:1]}"
            continue
        error = judge.largest_error(got, exact)
        if judge.wrong(error, judge.BOUNDS[dtype]):
            refused[choice] = f"RED: relative error {error:.1e}, wanted at most {judge.BOUNDS[dtype]:g}"
        elif not all(map(torch.equal, got, again)):
            refused[choice] = "differs between two runs"
        else:
            calls[choice] = lambda call=call: call(*args)
    del exact
    times = interleave(calls, between, repeats, device)
    default = backends.default(operator, device.type).backend
    return {c: t if c == default else [s + lookup for s in t] for c, t in times.items()}, refused


def winner(times: dict[str, list[float]]) -> str:
    """The fastest choice where it beats the first by more than the noise; else the first."""
    first, best = next(iter(times)), min(times, key=lambda choice: statistics.median(times[choice]))
    if statistics.median(times[best]) >= (1 - MARGIN) * statistics.median(times[first]):
        return first
    least, greatest = (statistics.quantiles(times[c], n=4, method="inclusive")[i] for c, i in ((first, 0), (best, 2)))
    return best if greatest < least else first


def classes(
    names: list[str] | None, dtypes: list[str], sizes: list[tuple[int, int, int, int]], device: str
) -> Iterator[tuple[Operator, str, tuple]]:
    """Operator, dtype and arguments of every class, each once: sizes are (T, d, k, r). First come the commonest
    arguments of every operator, then its other options, so that a short run has something of each."""
    operators = [op for op in _library.OPERATORS.values() if not names or op.name in names]
    operators.sort(key=lambda op: ((*FIRST, op.stem).index(op.stem), op.stem, op.name))
    seen, more = set(), True
    for option in itertools.count():
        if not more:
            return
        more = False
        for operator in operators:
            for dtype in dtypes:
                for T, d, k, r in sizes:
                    samples = arguments(operator.name, T, d, k, r, DTYPES[dtype], device)
                    for args in itertools.islice(samples, option, option + 1):
                        more = True
                        narrowest, key = tuning.signature(args)
                        if (operator, narrowest, key) not in seen:
                            seen.add((operator, narrowest, key))
                            yield operator, str(narrowest).removeprefix("torch."), args


def search(
    names: list[str] | None,
    dtypes: list[str],
    sizes: list[tuple[int, int, int, int]],
    device: torch.device,
    repeats: int,
    deadline: float,
) -> tuple[dict[str, dict[str, list[tuning.Class]]], int]:
    """Every class of every operator, printed as it is measured, and how many candidates were wrong. Ctrl-C, and a
    ``deadline`` on the monotonic clock, end it with what there is."""
    found: dict[str, dict[str, list[tuning.Class]]] = {}
    between, lookup, red = flush(device), lookup_seconds(), 0
    try:
        for operator, dtype, args in classes(names, dtypes, sizes, str(device)):
            if time.monotonic() > deadline:
                print("out of time: what was measured so far follows")
                break
            times, refused = measure(operator, args, between, repeats, lookup)
            for choice, why in refused.items():
                print(f"{operator.name} {dtype}: {choice} {why}", flush=True)
            red += sum(why.startswith("RED") for why in refused.values())
            if backends.default(operator, device.type).backend not in times:
                continue
            medians = {choice: float(f"{1e6 * statistics.median(t):.4g}") for choice, t in times.items()}
            one = tuning.Class(tuning.signature(args)[1], winner(times), medians)
            found.setdefault(operator.name, {}).setdefault(dtype, []).append(one)
            shown = ", ".join(f"{choice} {us:g}" for choice, us in medians.items())
            print(f"{operator.name} {dtype} {one}: {one.choice} (us: {shown})", flush=True)
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        print(f"{type(error).__name__}: what was measured so far follows")
    return found, red


def entries(found: dict[str, dict[str, list[tuning.Class]]], device: torch.device) -> tuning.Table:
    """The table to store: every size measured of an operator and dtype whose default lost at one of them."""
    here, table = source(device), {}
    for name, dtypes in found.items():
        default = backends.default(_library.OPERATORS[name], device.type).backend
        for dtype, measured in dtypes.items():
            if any(one.choice != default for one in measured):
                table.setdefault(name, {})[dtype] = tuning.Entry(here, tuple(measured))
    return table


def merged(old: tuning.Table, found: dict[str, dict[str, list]], new: tuning.Table) -> tuning.Table:
    """``old`` with what was measured anew in place of what it had, dropped where nothing beats the default any more."""
    table = {name: {t: e for t, e in dtypes.items() if t not in found.get(name, {})} for name, dtypes in old.items()}
    for name, dtypes in new.items():
        table.setdefault(name, {}).update(dtypes)
    return {name: dtypes for name, dtypes in table.items() if dtypes}
