"""Instruments: what a call allocates, saves, reads and returns, and a fresh interpreter to make it in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tensors import copied, storage
from torch.utils._pytree import tree_leaves

from spectral_ops import _library, _loader, backends
from spectral_ops.bench.counting import Unfolding

ROOT = Path(__file__).resolve().parents[2]


class Recorder(Unfolding):
    """Every operator call that passes the dispatcher, with the tensors it newly allocated. A layer operator is followed
    into what its Python composition calls; what its compiled twin allocates, :func:`allocations` sees."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []
        self.allocated: list[tuple[str, torch.Size, torch.Tensor]] = []

    def enter(self, func, args):
        self.calls.append((str(func), args))

    def call(self, func, args, kwargs):
        out = func(*args, **kwargs)
        known = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.calls.append((str(func), args))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() and storage(t) not in known:
                self.allocated.append((str(func), t.shape, t))
        return out

    def products(self) -> list[tuple]:
        """The arguments of the library's products; inside a layer they are those that torch itself would take apart."""
        kinds = ("aten.mm.", "aten.addmm", "aten.matmul.", "aten.linear.")
        return [args for name, args in self.calls if name.startswith(kinds)]

    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(shape) for _, shape, _ in self.allocated]


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every block of memory that torch's CPU allocator hands out during ``call``, inside operators too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = profiler.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def opchecks(args: tuple) -> tuple[str, ...]:
    """What torch.library.opcheck can hold an operator to on these arguments. Its test of the schema compares them by
    allclose, which float8 does not have."""
    from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS

    narrow = any(isinstance(t, torch.Tensor) and t.is_floating_point() and t.element_size() == 1 for t in args)
    return tuple(name for name in ALL_TEST_UTILS if not (narrow and name == "test_schema"))


@contextlib.contextmanager
def saved_tensors():
    """Collects what autograd keeps for backward."""
    kept: list[torch.Tensor] = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


@contextlib.contextmanager
def poisoned():
    """torch fills every uninitialised buffer with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def fresh_python(code: str, *, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a new interpreter from the repository root; the caller looks at returncode, stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if k != "SPECTRAL_OPS_BACKEND"} | environment
    path = [str(ROOT), str(ROOT / "tests" / "support"), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command, pipes = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, **pipes)


def extension_waived() -> str | None:
    """Why the compiled extension may be absent in this run; None when it must be there."""
    for name in ("SPECTRAL_OPS_NO_EXTENSION", "SPECTRAL_OPS_SKIP_BUILD"):
        if os.environ.get(name) == "1":
            return f"{name}=1"
    return None


def results(operator: _library.Operator, overload: Callable, args: tuple) -> list[torch.Tensor]:
    """What a call of ``overload`` returns and what it writes (int64 stamps excepted), on copies of ``args``."""
    args = copied(args)
    out = overload(*args)
    written = [
        a for a, s in zip(args, operator.default._schema.arguments, strict=True)
        if s.alias_info is not None and s.alias_info.is_write and a.is_floating_point()
    ]  # fmt: skip
    return [*(t for t in tree_leaves(out) if t is not None), *written]


def overload_or_reason(operator: _library.Operator, backend: str, device_type: str):
    """(overload, None) that runs ``backend`` on this device, or (None, why it cannot)."""
    if reason := backends.unavailable(operator, backend, device_type):
        return None, reason
    return operator.overloads.get(backend, operator.default), None


def extension_loaded(backend: str = "cpu") -> bool:
    return _loader.EXTENSIONS[backend].error is None
