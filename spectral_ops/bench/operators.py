"""Every operator of the grid by itself, on the sample arguments that tests use, beside other libraries' products.

What is timed is what a call takes by itself: the default, or what the tuner chose for the sizes. Its result is compared
with the reference in float64 on the same arguments, at the size that is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from spectral_ops import _library, backends
from spectral_ops.bench import judge, results
from spectral_ops.bench.clock import flush, interleave
from spectral_ops.bench.judge import BOUNDS, converted, largest_error
from spectral_ops.bench.methods import DENSITY
from spectral_ops.bench.peers import missing
from spectral_ops.bench.samples import arguments

NAMES = sorted(_library.OPERATORS, key=lambda name: (_library.OPERATORS[name].stem, name))
SLACK = 4  # times check's bounds, which are for sums of a hundred numbers
SPARSE = ("csr_spmm_", "csr_sddmm", "csr_scatter_", "csr_gather_")

Call = Callable[[], torch.Tensor]


def _torch_sparse(name: str, args: tuple) -> Call:
    if name == "csr_spmm_":
        out, x, values, offsets, columns, _ = args
        S = torch.sparse_csr_tensor(offsets, columns, values.to(x.dtype), (out.shape[1], x.shape[1]))
        return lambda: (S @ x.t()).t()
    dy, x, offsets, columns = args
    S = torch.sparse_csr_tensor(offsets, columns, x.new_zeros(columns.numel()), (dy.shape[1], x.shape[1]))
    return lambda: torch.sparse.sampled_addmm(S, dy.t(), x, beta=0.0).values()


def _spops(name: str, args: tuple) -> Call:
    """spops takes its dense matrices transposed, and rows in the order of their length; both are made beforehand."""
    import spops

    x, offsets, columns = args[1], args[-3 if name == "csr_spmm_" else -2], args[-2 if name == "csr_spmm_" else -1]
    order = torch.argsort(offsets.diff(), descending=True).to(torch.int16)
    across, columns = x.t().contiguous(), columns.to(torch.int16)
    if name == "csr_spmm_":
        values, d = args[2].to(x.dtype), args[0].shape[1]
        return lambda: spops.spmm(values, offsets, order, columns, across, d).t()
    dy = args[0].t().contiguous()
    return lambda: spops.sddmm(offsets, order, columns, dy, across)


def _liger(name: str, args: tuple) -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    logits, targets, _, ignored = args
    return lambda: -liger_cross_entropy(logits, targets, ignore_index=ignored, reduction="none")


PEERS: dict[str, tuple[Callable[[str, tuple], Call], tuple[str, ...]]] = {
    "torch.sparse": (_torch_sparse, ("csr_spmm_", "csr_sddmm")),
    "spops": (_spops, ("csr_spmm_", "csr_sddmm")),
    "Liger": (_liger, ("target_logprob",)),
}


def _expected(operator: _library.Operator, args: tuple) -> list[torch.Tensor]:
    """What a peer of the operator is to compute, in float64; products that ours adds to something start from zero."""
    args = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    if operator.name == "csr_spmm_":
        args = (torch.zeros_like(args[0]), *args[1:])
        operator.reference(*args)
        return [args[0]]
    found = operator.reference(*args)
    return [found[0] if isinstance(found, tuple) else found]


def measure(
    name: str,
    T: int,
    d: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
    ceiling: results.Ceiling,
    *,
    repeats: int = 20,
    peers: bool = True,
    note: Callable[[str], None] = print,
) -> list[results.Operator]:
    """Operator ``name`` on its first sample arguments for x [T, k], W [d, k] and rank, and with ``peers`` its peers."""
    operator = _library.OPERATORS[name]
    args = next(arguments(name, T, d, k, rank, dtype, device, density=DENSITY))
    backend, bound = backends.choose(operator, args[0].device, args).backend, SLACK * BOUNDS[dtype]
    calls: dict[str, Callable[[], object]] = {backend: lambda: operator(*args)}
    errors = {backend: judge.relative_error(operator, args)}
    absent = missing()
    for peer, (build, names) in PEERS.items():
        if not peers or name not in names or peer in absent or (peer == "Liger" and device == "cpu"):
            continue
        try:
            call = build(name, converted(args))
            errors[peer] = largest_error([call()], _expected(operator, args))
            calls[peer] = call
        except Exception as error:  # other people's code, which may refuse this device or dtype
            note(f"{peer} left out of {name} {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
    cost = operator.cost(*args)
    floor = max(cost.flops / ceiling.flops_per_second, cost.bytes / ceiling.bytes_per_second)
    where = torch.device(device)
    times = interleave(calls, flush(where), repeats, where)
    return [
        results.Operator(
            operator=name,
            row=operator.stem,
            backend=label,
            device=where.type,
            dtype=str(dtype).removeprefix("torch."),
            tokens=T,
            out_features=d,
            in_features=k,
            rank=rank,
            density=DENSITY if name in SPARSE else None,
            times=times[label],
            flops=cost.flops,
            bytes=cost.bytes,
            floor_seconds=floor,
            error=errors[label],
            red=judge.wrong(errors[label], bound),
        )  # fmt: skip
        for label in calls
    ]
