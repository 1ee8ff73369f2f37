"""How many kernels a layer launches on a GPU: the CUDA form of each layer operator, run on the emulator and counted."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch

import spectral_ops
from spectral_ops import _library
from spectral_ops.functional import NormCache

T = K = D = 64
R = 16
LAUNCH = set("copy_ fill_ mul sub sum add add_ div cat index_select mm addmm zero_ where logical_not".split())
NO_LAUNCH = set(
    "empty empty_like empty_strided new_empty new_zeros zeros as_strided reshape view t transpose to _to_copy clone"
    " contiguous detach alias expand select slice narrow split unflatten movedim permute resolve_conj resolve_neg"
    " is_nonzero squeeze unsqueeze _unsafe_view result_type set_".split()
)
MARKS = {"DoRA, norm reused": 2}  # copies of a tensor onto itself, which tell autograd and launch nothing

pytestmark = pytest.mark.slow


def count(library, call) -> tuple[int, object]:
    """Kernels that ``call`` launches: ours and the library's products by the emulator, what else torch does by its
    profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    launches = ctypes.c_int64.in_dll(library, "emulator_launches")
    before = launches.value
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = call()
    names = [e.name.removeprefix("aten::") for e in profiler.events() if e.name.startswith("aten::")]
    unknown = set(names) - LAUNCH - NO_LAUNCH
    assert not unknown, f"whether these launch kernels is not known: {unknown}"
    return launches.value - before + sum(name in LAUNCH for name in names), result


def methods() -> dict[str, tuple]:
    """By name: a layer's call, and what it trains."""
    torch.manual_seed(0)
    x, W, A, B = torch.randn(T, K), torch.randn(D, K), torch.randn(R, K), torch.randn(D, R)
    E, m, bone, mini = torch.randn(R), torch.rand(D) + 0.5, torch.randn(R, D), torch.randn(R, R)
    bat, row = torch.randn(D // R, R, R), torch.randn(K // R, R, R)
    csr = spectral_ops.CSR.from_dense(torch.rand(D, K) < 0.05)
    trained = [x, A, B, E, m, bone, mini, bat, row]
    for t in trained:
        t.requires_grad_()
    values = csr.values.detach().requires_grad_()
    csr = csr.with_values(values)
    cache = NormCache()

    def dora():
        return spectral_ops.dora_linear(x, W, A, B, m, norm=cache.get(W, A, B, 1.0))

    cache.get(W, A, B, 1.0)
    return {
        "LoRA, rsLoRA, PiSSA": (lambda: spectral_ops.lowrank_linear(x, W, A, B), (x, A, B)),
        "AdaLoRA": (lambda: spectral_ops.lowrank_linear(x, W, A, B, core=E), (x, A, B, E)),
        "DoRA, norm reused": (dora, (x, A, B, m)),
        "DoRA, norm computed": (lambda: spectral_ops.dora_linear(x, W, A, B, m), (x, A, B, m)),
        "Bone / MiSS": (lambda: spectral_ops.bone_linear(x, W, bone), (x, bone)),
        "mini": (lambda: spectral_ops.bone_linear(x, W, mini), (x, mini)),
        "Bat": (lambda: spectral_ops.bat_linear(x, W, bat), (x, bat)),
        "RoSA, spmm": (lambda: spectral_ops.rosa_linear(x, W, csr, A, B, route="spmm"), (x, A, B, values)),
        "RoSA, scatter": (lambda: spectral_ops.rosa_linear(x, W, csr, A, B, route="scatter"), (x, A, B, values)),
    }


@pytest.fixture
def on_the_emulator(emulated, monkeypatch):
    """Every operator call runs its CUDA form on the emulator."""

    def run(self, *args):
        return getattr(emulated, self.name)(*args)

    monkeypatch.setattr(_library.Operator, "__call__", run)
    monkeypatch.setattr(_library.LayerOperator, "__call__", run)
    return emulated.plans


def counts(library) -> dict[str, tuple[int, int]]:
    found = {}
    for name, (call, trained) in methods().items():
        forward, y = count(library, call)
        dy = torch.randn(T, D)
        backward, _ = count(library, lambda y=y, trained=trained, dy=dy: torch.autograd.grad(y, trained, dy))
        found[name] = forward - MARKS.get(name, 0), backward
    return found


def table(text: str) -> dict[str, tuple[int, int]]:
    """The rows of docs/PERFORMANCE.md between its markers."""
    part = text.split("<!-- launches -->")[1].split("<!-- end -->")[0]
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \| (\d+) \|$", part, re.MULTILINE)
    return {name: (int(forward), int(backward)) for name, forward, backward in rows}


def test_the_table_of_launches(on_the_emulator):
    found = counts(on_the_emulator)
    assert found["LoRA, rsLoRA, PiSSA"][0] <= 3 and found["LoRA, rsLoRA, PiSSA"][1] <= 5
    text = (Path(__file__).resolve().parents[2] / "docs" / "PERFORMANCE.md").read_text()
    assert table(text) == found, "docs/PERFORMANCE.md: the table should read\n" + "\n".join(
        f"| {name} | {forward} | {backward} |" for name, (forward, backward) in found.items()
    )
