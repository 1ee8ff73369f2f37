"""How each operator's time grows with tokens, features, rank and density, beside the growth its cost formula predicts.

The predicted line is the formula's floor under the run's measured ceilings plus a constant, the launch, which is what
the smallest size takes beyond its floor. Growth beyond the formula's is a bug: GROWS. A launch can only flatten a
curve, so the exponent of the bare formula is the most that any launch explains; and a small size that a cache serves
faster than its floor counts as its floor, so that leaving the cache is no growth either.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch.utils._pytree import tree_leaves

from spectral_ops import _library, backends
from spectral_ops.bench import clock
from spectral_ops.bench.results import Ceiling, Growth
from spectral_ops.bench.samples import arguments

MARGIN = 0.3  # exponents that differ by less are equal: caches, tiles and threads make steps
BASE = {"cpu": {"tokens": 512, "features": 512}, "cuda": {"tokens": 4096, "features": 2048}}
VALUES = {
    "cpu": {"tokens": (256, 512, 1024, 2048), "features": (256, 512, 1024, 2048)},
    "cuda": {"tokens": (2048, 4096, 8192, 16384), "features": (1024, 2048, 4096, 8192)},
}
USUAL = {"rank": 16, "density": 0.008}
COMMON = {"rank": (8, 16, 32, 64), "density": (0.004, 0.008, 0.016, 0.032)}


def _sizes(args: tuple) -> list:
    """What of the arguments says how large they are."""
    return [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in tree_leaves(args)]


def floor(operator: _library.Operator, args: tuple, ceiling: Ceiling) -> float:
    """The least seconds of one call."""
    cost = operator.cost(*args)
    return max(cost.flops / ceiling.flops_per_second, cost.bytes / ceiling.bytes_per_second)


def grows(values: Iterable[float], times: list[list[float]], floors: list[float]) -> bool:
    """Whether both of the last two steps grow faster than the floors by MARGIN in the exponent, in 3 of 4 turns.

    times: a list per size, of seconds per turn; turn i of every size was taken together.
    """
    values, excess = list(values), []
    for i in range(len(values) - 1):
        above = [[max(t / f, 1.0) for t in turn] for turn, f in zip(times[i : i + 2], floors[i : i + 2], strict=True)]
        step = math.log(values[i + 1] / values[i])
        exponents = [math.log(large / small) / step for small, large in zip(*above, strict=True)]
        excess.append(statistics.quantiles(exponents, n=4)[0])
    return min(excess[-2:]) > MARGIN


def series(
    operator: _library.Operator,
    backend: str,
    dtype: torch.dtype,
    variable: str,
    samples: dict[float, tuple],
    ceiling: Ceiling,
    device: str,
    repeats: int,
) -> Growth:
    """Time an operator on the arguments of every value of a variable; the sizes take turns."""
    floors = [floor(operator, args, ceiling) for args in samples.values()]
    calls = {str(value): (lambda args=args: operator(*args)) for value, args in samples.items()}
    times = list(clock.interleave(calls, lambda name: None, repeats, torch.device(device)).values())
    seconds = [statistics.median(turns) for turns in times]
    launch = max(seconds[0] - floors[0], 0.0)
    return Growth(
        operator=operator.name,
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        variable=variable,
        values=list(samples),
        seconds=seconds,
        predicted=[launch + f for f in floors],
        verdict="GROWS" if grows(samples, times, floors) else "as predicted",
    )


def measure(
    names: Iterable[str], dtypes: Iterable[torch.dtype], device: str, ceilings: dict[str, Ceiling], repeats: int = 9
) -> Iterator[Growth]:
    """A series per operator, dtype, and variable that its sample arguments have, by what a call takes by itself."""
    base = BASE[device] | USUAL
    for name in names:
        operator = _library.OPERATORS[name]
        for dtype in dtypes:
            ceiling = ceilings[str(dtype).removeprefix("torch.")]
            for variable, values in (VALUES[device] | COMMON).items():
                samples = {}
                for value in values:
                    T, d, r, density = (base | {variable: value}).values()
                    samples[value] = next(arguments(name, T, d, d, r, dtype, device, density=density))
                    if len(samples) == 2 and len({str(_sizes(args)) for args in samples.values()}) == 1:
                        break  # the arguments do not have this variable
                else:
                    backend = backends.choose(operator, device, samples[value]).backend
                    yield series(operator, backend, dtype, variable, samples, ceiling, device, repeats)
