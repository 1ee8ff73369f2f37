"""Which implementation of an operator runs, how to force one, and how to ask."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spectral_ops import _library, _loader, tuning
from spectral_ops._library import BACKENDS, LayerOperator, Operator
from spectral_ops.triton_kernels import has as has_triton
from spectral_ops.triton_kernels import launcher as launcher  # for _library


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot run here; the message says what is missing and the command that mends it."""


@dataclass(frozen=True)
class Choice:
    """What :func:`explain` returns: the backend that would run, and why."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


def _capability(device: torch.device) -> tuple[int, int] | None:
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def triton_missing() -> str | None:
    """Why Triton cannot be imported here, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'spectral_ops[triton]')"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def unavailable(operator: Operator, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device_type``; None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        pieces = (_library.OPERATORS[name] for name in _pieces(operator))
        if not any(has_triton(one.stem, one.name) for one in (operator, *pieces)):
            return f"{operator.name} has no Triton kernel"
        if missing := triton_missing():
            return missing
        if device_type == "cpu" and not interpreting():
            return "Triton runs on a GPU; on the CPU only its interpreter does (set TRITON_INTERPRET=1 before starting)"
        return None
    if backend != device_type:
        return f"the {backend} backend runs on {backend} tensors, these are on {device_type}"
    module = _loader.EXTENSIONS[backend]
    if module.error:
        return module.error
    if operator.name not in module.operators:
        return f"{operator.name} has no compiled {backend} kernel"
    return None


def _pieces(operator: Operator) -> tuple[str, ...]:
    """The operators that a layer operator is composed of; none for any other."""
    return operator.pieces if isinstance(operator, LayerOperator) else ()


def require(operator: Operator, backend: str, args: tuple) -> None:
    """Raise BackendUnavailable unless ``backend`` can run ``operator`` on the device of its first tensor."""
    device_type = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    if reason := unavailable(operator, backend, device_type):
        raise BackendUnavailable(f"backend {backend!r} was forced, but cannot run {operator.name}: {reason}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator to run on one backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Process-wide, backward threads included: keep the backward pass inside the ``with`` block. An operator that cannot
    run there raises :class:`BackendUnavailable`. ``SPECTRAL_OPS_BACKEND`` in the environment does the same from start.
    """
    previous = _library.forced_backend
    _force(name)
    try:
        yield
    finally:
        _library.forced_backend = previous


def _force(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    _library.forced_backend = name


def default(operator: Operator, device_type: str) -> Choice:
    """What runs ``operator`` on tensors of ``device_type`` where nothing is forced and no table has another choice."""
    if operator.library:
        if device_type == "cuda" and unavailable(operator, "cuda", device_type) is None:
            return Choice(operator.name, "cuda", "by the sizes of each call")
        return Choice(operator.name, "library", "the library's products")
    why_not = []
    for backend in ("cpu",) if device_type == "cpu" else ("cuda", "triton"):
        reason = unavailable(operator, backend, device_type)
        if reason is None and not (backend == "triton" and _pieces(operator)):
            return Choice(operator.name, backend, f"default on {device_type}")
        if backend == "triton" and _pieces(operator):
            pieces = ", ".join(str(default(_library.OPERATORS[name], device_type)) for name in operator.pieces)
            return Choice(operator.name, "triton", f"composed in Python of {pieces}")
        why_not.append(f"{backend}: {reason}")
    return Choice(operator.name, "reference", "; ".join(why_not))


def candidates(operator: Operator, device_type: str) -> list[str]:
    """The choices (see :mod:`spectral_ops.tuning`) that can run ``operator`` on ``device_type``, the default first."""
    first = default(operator, device_type).backend
    rest = [c for c in tuning.choices(operator) if c != first and not _cannot(operator, c, device_type)]
    return [first, *(c for c in rest if device_type != "cpu" or not c.startswith("triton"))]  # not the interpreter


def _cannot(operator: Operator, choice: str, device_type: str) -> str | None:
    return None if choice == "library" else unavailable(operator, choice.partition(":")[0], device_type)


def implementation(operator: Operator, choice: str) -> Callable:
    """The function that a choice stands for."""
    if choice == "library":
        return operator.library
    backend, _, tiles = choice.partition(":")
    if tiles:
        return functools.partial(operator.triton_function(), tiles=tiles)
    return operator.overloads.get(backend, operator.default)


# --- what a table chose ----------------------------------------------------------------------------------------------

tables = tuning.any_table()  # whether there is any: else no call asks for one
_tables: dict[torch.device, tuple[frozenset[str], tuning.Table]] = {}


def _table(device: torch.device) -> tuple[frozenset[str], tuning.Table]:
    """The operators with another choice than the default on ``device``, and its table, read on the first call."""
    found = _tables.get(device)
    if found is None:
        path = tuning.file(device)
        table = tuning.read(path) if path else {}
        names = set()
        for name, dtypes in table.items():
            operator = _library.OPERATORS[name]
            able = {one.choice for entry in dtypes.values() for one in entry.classes}
            able = {c for c in able if not _cannot(operator, c, device.type)}
            if able - {default(operator, device.type).backend}:
                names.add(name)
        names.update(name for name, layer in _library.LAYERS.items() if names.intersection(layer.pieces))
        found = _tables[device] = frozenset(names), table
    return found


def forget_tables() -> None:
    """Look whether there are tables, and read them again on the next call.

    A graph compiled while there were none is compiled again; one compiled beside a table keeps what it looks up.
    """
    global tables
    tables = tuning.any_table()
    _tables.clear()
    _chosen.cache_clear()


def tuned(name: str, device: torch.device) -> bool:
    """Whether the table of ``device`` has another choice than the default for this operator."""
    found = _tables.get(device)
    return name in (_table(device) if found is None else found)[0]


tuned._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result would, which imports the compiler


def chosen(operator: Operator, args: tuple) -> Callable:
    """The implementation that the table has for these arguments; the default where it has none that can run."""
    return _chosen(operator, args[0].device, *tuning.signature(args))


@functools.lru_cache(maxsize=4096)
def _chosen(operator: Operator, device: torch.device, dtype: torch.dtype | None, arguments: tuple) -> Callable:
    return implementation(operator, _look_up(operator, device, dtype, arguments).backend)


def _look_up(operator: Operator, device: torch.device, dtype: torch.dtype | None, arguments: tuple) -> Choice:
    """What runs for these arguments where nothing is forced, and why."""
    name, usual = operator.name, default(operator, device.type)
    path = tuning.file(device)
    if path is None:
        return usual
    dtypes = _table(device)[1].get(name, {})
    short = str(dtype).removeprefix("torch.")
    entry = dtypes.get(short)
    if entry is None:
        reason = f"default: no measurement for {name}{f' in {short}' if dtypes else ''} in {path.name}"
        return Choice(name, usual.backend, f"{reason}; {usual.reason}" if usual.backend == "reference" else reason)
    nearest = tuning.nearest(entry, arguments)
    source = f"{path.name}, {short} class {nearest}: {entry.source}"
    if reason := _cannot(operator, nearest.choice, device.type):
        return Choice(name, usual.backend, f"default: {nearest.choice}, chosen by {source}, cannot run here: {reason}")
    return Choice(name, nearest.choice, source)


def _routed(operator: Operator, choice: Choice, device: torch.device, args: tuple) -> Choice:
    """``choice`` with the route that the compiled operator would take for these arguments, and every route's time."""
    if operator.routes is None or choice.backend != "cuda":
        return choice
    route = operator.routes(args, _capability(device), triton_missing() is None)
    return Choice(choice.operator, "cuda", f"{choice.reason}: {route}") if route else choice


def _product_routes(function: str, tensors: tuple, device: torch.device) -> str:
    """The routes of a public function's products, where they are the compiled ones."""
    products = _library.PRODUCTS.get(function)
    routes = []
    for what, operator, args in products(*tensors) if products else ():
        choice = _routed(operator, _look_up(operator, device, *tuning.signature(args)), device, args)
        if choice.backend == "cuda":
            routes.append(f"{what}: {choice}")
    return "; ".join(["", *routes])


def choose(operator: Operator, device: str | torch.device, tensors: tuple[torch.Tensor, ...] = ()) -> Choice:
    """Which implementation runs ``operator`` on ``device`` at this moment, given its arguments as far as they are
    tensors; without any, a table's choices are told together."""
    device = torch.device(device)
    if _library.forced_backend is not None:
        backend = _library.forced_backend
        reason = unavailable(operator, backend, device.type)
        return Choice(operator.name, backend, f"forced, but it would raise: {reason}" if reason else "forced")
    dtype, arguments = tuning.signature(tensors)
    if _pieces(operator) and operator.name in _table(device)[0]:
        pieces = (choose(_library.OPERATORS[name], device) for name in operator.pieces)
        return Choice(
            operator.name, "composed", f"in Python, as a table has another choice for {', '.join(map(str, pieces))}"
        )
    if _pieces(operator):
        return default(operator, device.type)
    if tensors or operator.name not in _table(device)[0]:
        return _routed(operator, _look_up(operator, device, dtype, arguments), device, tensors)
    entries = _table(device)[1][operator.name]
    backends = dict.fromkeys(one.choice for entry in entries.values() for one in entry.classes)
    return Choice(operator.name, " or ".join(backends), f"by sizes, {tuning.file(device).name}")


def explain(op: str | Operator, *tensors: torch.Tensor) -> Choice:
    """Which implementation would run on ``tensors``, and where that choice came from.

    ``op`` names an operator (``"block_tile_"``), whose arguments ``tensors`` are, or a public function
    (``"dora_linear"``), whose choice lists the backend of every operator it may call besides the library's plain
    products, and of a low-rank layer, given x, weight, A and B, the routes of y and dx. An operator that takes one of
    several routes by predicted times has them told. A layer operator (``"dora_linear_forward"``) is one
    compiled call, or composed in Python of others.
    Raises ValueError for another name.
    """
    operators = _library.OPERATORS | _library.LAYERS
    names = [op.name] if isinstance(op, Operator) else [op] if op in operators else _library.FUNCTIONS.get(op)
    if names is None:
        known = ", ".join(sorted({*operators, *_library.FUNCTIONS}))
        raise ValueError(f"op: got {op!r}, wanted one of {known}")
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor)} or {torch.device("cpu")}
    if len(devices) > 1:
        raise ValueError(f"tensors: got tensors on {', '.join(sorted(map(str, devices)))}, wanted one device")
    device = devices.pop()
    if not isinstance(op, str) or op in operators:
        return choose(operators[names[0]], device, tensors)
    choices = [choose(operators[name], device) for name in names]
    backend = ", ".join(dict.fromkeys(c.backend for c in choices))
    return Choice(op, backend, "; ".join(map(str, choices)) + _product_routes(op, tensors, device))


def activate() -> None:
    """Give every operator without a compiled CUDA kernel its Triton one there, and honour SPECTRAL_OPS_BACKEND."""
    compiled = _loader.EXTENSIONS["cuda"].operators
    if triton_missing() is None:
        for operator in _library.OPERATORS.values():
            if operator.name not in compiled and has_triton(operator.stem, operator.name):
                _library.library.impl(operator.name, operator._run_triton, "CUDA")
    if compiled:
        torch.cuda._lazy_call(check_devices)  # when CUDA starts: asking now would start it, and forbid forking
    if name := os.environ.get("SPECTRAL_OPS_BACKEND"):
        _force(name)


def check_devices() -> None:
    """Withdraw the compiled CUDA kernels where they have no code for one of the GPUs: a launch would fail there."""
    extension = _loader.EXTENSIONS["cuda"]
    build = _loader.cuda_build(extension.info)
    devices = range(torch.cuda.device_count()) if build else ()
    for i in devices:
        capability = torch.cuda.get_device_capability(i)
        if not _loader.has_image(build[1], capability):
            break
    else:
        return
    reason = (
        f"{extension.module} has code for {', '.join(build[1])}, cuda:{i} is sm_{capability[0]}{capability[1]};"
        " Triton and the reference serve (build it with that architecture in TORCH_CUDA_ARCH_LIST)"
    )
    logging.getLogger("spectral_ops").warning("%s", reason)
    known = _library.OPERATORS | _library.LAYERS
    withdrawn, extension.operators, extension.error = extension.operators, frozenset(), reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of a kernel that takes another's place, as it is meant to here
        for operator in (known[name] for name in withdrawn):
            triton = has_triton(operator.stem, operator.name) and triton_missing() is None
            _library.library.impl(operator.name, operator._run_triton if triton else operator._run_default, "CUDA")


_library.backends = sys.modules[__name__]
