"""How often the loops of Bat's kernels run, and what they move; T does not enter."""

from __future__ import annotations

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch, plan
from benchmarks.estimates.model import Work

BFLOAT16 = 2  # DType in csrc/kernels.h


def work(launch: Launch, case: Case, args: tuple) -> Work:
    return WORKS[launch.kernel.split("<")[0]](launch, args)


def _weight(launch: Launch, args: tuple) -> Work:
    """An item is 16 rows by 64 columns of W; its unit-matrix products add W and bat themselves."""
    out, weight, bat = args[:3]
    items = weight.numel() / 1024
    read = 2 * weight.numel() + bat.numel() * bat.element_size()
    return Work({"HMMA": items * (88 if out.element_size() == 2 else 128)}, read + out.numel() * out.element_size(),
                in_flight=launch.threads // 32 * 2048, read=read)  # fmt: skip


def _contract(launch: Launch, args: tuple) -> Work:
    """A step of a warp is 16 rows by 64 columns of W and G. Its last sum over the warps takes 1.5 µs."""
    _, weight, G = args
    steps, size = weight.numel() / 1024, G.element_size()
    return Work({"MOVM": steps * (32 if size == 2 else 64)}, weight.numel() * (2 + size),
                in_flight=launch.threads // 32 * (2048 + 1024 * size), l2=_partial(args), tail=1.5e-6)  # fmt: skip


def _partial(args: tuple) -> int:
    (d, k), r = args[1].shape, args[0].shape[1]
    splits = plan("contract_plan", d, k, r, BFLOAT16, 1)[6]
    return 4 * splits * d * r


def _finish(launch: Launch, args: tuple) -> Work:
    return Work({}, 4 * args[0].numel(), in_flight=16 * launch.threads, read=0, l2=_partial(args))


WORKS = {"weight_mma": _weight, "contract_mma": _contract, "contract_finish": _finish}
