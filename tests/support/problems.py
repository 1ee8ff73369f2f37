"""Problems: one call of a public function beside its oracle. ``FAMILIES`` holds every function in each of its forms.

A dropout mask comes from the operator's own generator (core/philox.py), which test_dropout.py judges on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from oracles import (
    bat,
    dora,
    dora_update,
    experts,
    hadamard,
    kron,
    lora,
    lora_update,
    randlora,
    rosa,
    segments,
    shard_sums,
    shards,
    siblings,
    svft,
    vera,
    weight_norm,
)
from tensors import TYPICAL, accumulate, laid_out, randn, sparse_pattern

import spectral_ops
from spectral_ops.core import autograd, philox
from spectral_ops.functional.experts import linear as expert_linear
from spectral_ops.functional.routing import combine, sort_by_expert


@dataclass
class Problem:
    """``function`` on ``inputs`` computes what ``oracle`` does on float64 copies of them."""

    function: Callable
    oracle: Callable
    inputs: dict[str, torch.Tensor]
    constants: dict
    dtype: torch.dtype
    dropout: bool = False
    out_features: int = 0
    saved: Callable | None = None  # (T, r, element size) -> bytes kept for backward beyond parameters and x
    indices: int = 0  # of its saved vectors, beyond those of d elements
    scaled: str = ""  # a parameter that is multiplied by the scale, in a copy
    x_sized: str = ""  # trained tensors whose gradients are made of a tensor of x's size
    seed: int = 1234

    def call(self) -> torch.Tensor:
        if self.dropout:
            torch.manual_seed(self.seed)
        return self.function(self.inputs)

    def trained(self) -> list[str]:
        return [name for name, t in self.inputs.items() if t.requires_grad]

    def freeze(self, *names: str) -> Problem:
        for name in names:
            self.inputs[name] = self.inputs[name].detach()
        return self

    def lay_out(self, **layouts: str) -> Problem:
        for name, layout in layouts.items():
            t = self.inputs[name]
            self.inputs[name] = laid_out(t.detach(), layout).requires_grad_(t.requires_grad)
        return self

    @property
    def tokens(self) -> int:
        return self.inputs["x"].numel() // max(self.inputs["x"].shape[-1], 1)


@dataclass
class Family:
    """A public function in one of its forms; ``build`` makes its problem for a shape and dtypes."""

    name: str
    builder: Callable
    options: dict = field(default_factory=dict)

    def build(self, shape=TYPICAL, dtype=torch.float64, adapter_dtype=None, device="cpu", **options) -> Problem:
        lead, k, d, r = shape
        return self.builder(lead, k, d, r, dtype, adapter_dtype or dtype, device, **(self.options | options))

    def __str__(self) -> str:
        return self.name


def _trained(*tensors: torch.Tensor) -> None:
    for t in tensors:
        t.requires_grad_()


def _common(lead, k, d, dtype, device, bias):
    v = {"x": randn(*lead, k, dtype=dtype, device=device), "weight": randn(d, k, dtype=dtype, device=device, fan=k)}
    _trained(v["x"])
    if bias:
        v["bias"] = randn(d, dtype=dtype, device=device).requires_grad_(bias == "trained")
    return v


def _mask(v, p: float, seed: int) -> dict:
    """{"mask": what drop multiplies x by} for the seed that a call after manual_seed(seed) draws."""
    if not p:
        return {}
    x = v["x"]
    torch.manual_seed(seed)
    drawn = autograd.draw_seed(x, p, True)
    keep = philox.keep_mask(x.numel() // x.shape[-1], x.shape[-1], drawn, p)
    return {"mask": (keep.double() / (1 - p)).reshape(x.shape).cpu()}


def build_lora(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", core=None, out_scale=False, p=0.0,
               update=False, scale=0.75):  # fmt: skip
    v = _common(lead, k, d, dtype, device, bias)
    v["A"] = randn(r, k, dtype=adapter_dtype, device=device, fan=k)
    v["B"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
    _trained(v["A"], v["B"])
    if core:
        shape, fan = ((r,), 1) if core == "diagonal" else ((r, r), r)
        v["core"] = randn(*shape, dtype=adapter_dtype, device=device, fan=fan)
        _trained(v["core"])
    if out_scale:
        v["out_scale"] = 1 + 0.3 * randn(d, dtype=accumulate(dtype), device=device)
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device)
        _trained(v["base_out"])
        del v["weight"]
        if not out_scale:
            v.pop("bias", None)

    def function(v):
        extras = {"core": v.get("core"), "out_scale": v.get("out_scale"), "dropout_p": p, "training": True}
        if update:
            out = v["base_out"].clone()
            return spectral_ops.lowrank_update(out, v["x"], v["A"], v["B"], scale=scale, bias=v.get("bias"), **extras)
        return spectral_ops.lowrank_linear(v["x"], v["weight"], v["A"], v["B"], v.get("bias"), scale=scale, **extras)

    constants = {"scale": scale, "minus_one": -1.0, **_mask(v, p, 1234)}
    return Problem(
        function, lora_update if update else lora, v, constants, dtype, bool(p), d,
        saved=lambda T, r, size: T * r * size,
    )  # fmt: skip


def build_dora(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, update=False, recompute=False,
               given_norm=False, scale=0.75):  # fmt: skip
    v = _common(lead, k, d, dtype, device, bias)
    v["A"] = randn(r, k, dtype=adapter_dtype, device=device, fan=k)
    v["B"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
    norm = weight_norm(v["weight"], v["A"], v["B"], scale)
    v["magnitude"] = (norm * (1 + 0.2 * randn(d, device=device))).to(adapter_dtype)
    _trained(v["A"], v["B"], v["magnitude"])
    narrow = norm.to(accumulate(dtype))
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device)
        _trained(v["base_out"])
        del v["weight"]

    def function(v):
        low_rank = v["A"], v["B"], v["magnitude"]
        if update:
            out = v["base_out"].clone()
            return spectral_ops.dora_update(out, v["x"], *low_rank, narrow, v.get("bias"), scale=scale)
        extras = {"dropout_p": p, "training": True, "norm": narrow if given_norm else None, "recompute": recompute}
        return spectral_ops.dora_linear(v["x"], v["weight"], *low_rank, v.get("bias"), scale=scale, **extras)

    constants = {"scale": scale, "minus_one": -1.0, "norm": norm.cpu(), **_mask(v, p, 1234)}
    return Problem(
        function, dora_update if update else dora, v, constants, dtype, bool(p), d,
        saved=lambda T, r, size: T * r * size + (0 if recompute else T * d * size),
    )  # fmt: skip


def build_shards(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, kind="bone", update=False):
    v = _common(lead, k, d, dtype, device, bias)
    in_shards, out_shards, columns = "cyclic", None, d
    if kind == "mini":
        columns = next(q for q in range(d // 2, 0, -1) if d % q == 0)
        out_shards = "cyclic"
    elif kind == "disha even":  # contiguous blocks of one size (as far as k allows) in, cyclic out
        in_shards, out_shards, columns = [k // r + (i < k % r) for i in range(r)], "cyclic", max(1, d // 3)
    elif kind == "disha uneven":
        in_shards = [1] * (r - 1) + [k - r + 1]
        columns = min(3, d)
        out_shards = [1] * (columns - 1) + [d - columns + 1]
    elif kind == "disha cyclic":
        out_shards, columns = "cyclic", max(1, d - 1)
    v["D"] = randn(r, columns, dtype=adapter_dtype, device=device, fan=k)
    _trained(v["D"])
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device)
        _trained(v["base_out"])
        del v["weight"]
        v.pop("bias", None)

    def function(v):
        if update:
            return spectral_ops.bone_update(v["base_out"].clone(), v["x"], v["D"], dropout_p=p, training=True)
        if kind.startswith("disha"):
            return spectral_ops.disha_linear(v["x"], v["weight"], v["D"], in_shards, out_shards, v.get("bias"))
        return spectral_ops.bone_linear(v["x"], v["weight"], v["D"], v.get("bias"), dropout_p=p, training=True)

    constants = {"in_shards": in_shards, "out_shards": out_shards, "out_features": d, **_mask(v, p, 1234)}
    return Problem(
        function, shards, v, constants, dtype, bool(p), d, saved=lambda T, r, size: T * r * size
    )  # fmt: skip


def build_block_sum(lead, k, d, r, dtype, adapter_dtype, device):
    v = {"x": randn(*lead, k, dtype=dtype, device=device).requires_grad_()}
    return Problem(
        lambda v: spectral_ops.block_sum(v["x"], r), shard_sums, v, {"r": r}, dtype, False, r,
        saved=lambda T, r, size: 0,
    )  # fmt: skip


def build_group(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", scale=0.5):
    v = {"x": randn(*lead, k, dtype=dtype, device=device).requires_grad_()}
    widths, ranks = [d, max(1, d // 2), d + 1], [r, r + 1, r]
    for i, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        v[f"weight{i}"] = randn(width, k, dtype=dtype, device=device, fan=k)
        v[f"A{i}"] = randn(rank, k, dtype=adapter_dtype, device=device, fan=k).requires_grad_()
        v[f"B{i}"] = randn(width, rank, dtype=adapter_dtype, device=device, fan=rank).requires_grad_()
        if bias and i != 1:
            v[f"bias{i}"] = randn(width, dtype=dtype, device=device).requires_grad_()

    def function(v):
        layers = [(v[f"weight{i}"], v[f"A{i}"], v[f"B{i}"], v.get(f"bias{i}"), scale * (i + 1)) for i in range(3)]
        return torch.cat(spectral_ops.lowrank_linear_group(v["x"], layers), -1)

    return Problem(
        function, siblings, v, {"scale": float(scale), "siblings": 3}, dtype, False, sum(widths),
        saved=lambda T, r, size: T * (3 * r + 1) * size,
    )  # fmt: skip


def build_bat(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", mode="col", exact=False, few=False):
    """k and d are rounded up to whole blocks; ``few``: blocks larger than the number of tokens."""
    r = max(r, math.prod(lead) + 1) if few else r
    k, d = -(-k // r) * r, -(-d // r) * r
    v = _common(lead, k, d, dtype, device, bias)
    v["blocks"] = randn((d if mode == "col" else k) // r, r, r, dtype=adapter_dtype, device=device, fan=4 * r)
    _trained(v["blocks"])

    def function(v):
        return spectral_ops.bat_linear(v["x"], v["weight"], v["blocks"], v.get("bias"), mode=mode, exact=exact)

    return Problem(
        function, bat, v, {"mode": mode}, dtype, False, d, saved=lambda T, r, size: 0,
        x_sized="blocks" if mode == "row" else "",  # dC is made of g = dy W [T, k]
    )  # fmt: skip


def build_rosa(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, low_rank=True, kind="linear",
               route="auto", gradient_route="auto", scale=0.75):  # fmt: skip
    """kind: "linear" (rosa_linear), "update" (rosa_update) or "spmm" (csr_spmm)."""
    v = _common(lead, k, d, dtype, device, bias)
    if kind != "linear":
        del v["weight"]
        v.pop("bias", None)
        low_rank = False
    if low_rank:
        v["A"] = randn(r, k, dtype=adapter_dtype, device=device, fan=k)
        v["B"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
        _trained(v["A"], v["B"])
    if kind == "update":
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device).requires_grad_()
    row_offsets, columns = sparse_pattern(d, k, device)
    v["values"] = randn(columns.numel(), dtype=adapter_dtype, device=device, fan=k).requires_grad_()
    checked = spectral_ops.CSR(v["values"].detach(), row_offsets, columns, (d, k)).validate()

    def function(v):
        csr, options = checked.with_values(v["values"]), {"gradient_route": gradient_route}
        if kind == "spmm":
            return spectral_ops.csr_spmm(v["x"], csr, **options)
        if kind == "update":
            return spectral_ops.rosa_update(v["base_out"].clone(), v["x"], csr, **options)
        low_rank = v.get("A"), v.get("B"), v.get("bias")
        options |= {"route": route, "scale": scale, "dropout_p": p, "training": True}
        return spectral_ops.rosa_linear(v["x"], v["weight"], csr, *low_rank, **options)

    constants = {"out_features": d, "row_offsets": row_offsets.tolist(), "columns": columns.tolist()}
    if low_rank:
        constants |= {"scale": scale, **_mask(v, p, 1234)}
    return Problem(
        function, rosa, v, constants, dtype, bool(p), d,
        saved=lambda T, r, size: T * r * size if low_rank else 0,
        x_sized="values" if gradient_route == "compact" else "",  # selects all columns of x
    )  # fmt: skip


def _over_a_result(v, lead, d, dtype, device):
    """The base's result in place of its weight and bias."""
    v["base_out"] = randn(*lead, d, dtype=dtype, device=device).requires_grad_()
    del v["weight"]
    v.pop("bias", None)


def build_hadamard(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", kind="loha", route="auto",
                   exact=False, scale=0.75):  # fmt: skip
    """kind: "hira", "loha" or "update" (loha_update)."""
    v = _common(lead, k, d, dtype, device, bias)
    for name in ("w1", "w2")[: 1 if kind == "hira" else 2]:
        v[f"{name}_a"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
        v[f"{name}_b"] = randn(r, k, dtype=adapter_dtype, device=device, fan=1 if name == "w1" else k)
        _trained(v[f"{name}_a"], v[f"{name}_b"])
    if kind == "update":
        _over_a_result(v, lead, d, dtype, device)

    def function(v):
        if kind == "hira":
            return spectral_ops.hira_linear(v["x"], v["weight"], v["w1_b"], v["w1_a"], v.get("bias"), exact=exact)
        factors, options = [v[f"w{i}_{s}"] for i in (1, 2) for s in "ab"], {"scale": scale, "route": route}
        if kind == "update":
            return spectral_ops.loha_update(v["base_out"], v["x"], *factors, **options)
        return spectral_ops.loha_linear(v["x"], v["weight"], *factors, v.get("bias"), **options)

    constants = {"scale": 1.0 if kind == "hira" else scale}
    return Problem(function, hadamard, v, constants, dtype, False, d, saved=lambda T, r, size: 0)


def _sides(n: int) -> tuple[int, int]:
    """The two factors of n that are nearest to each other."""
    small = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
    return small, n // small


def build_kron(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", decomposed="w2", update=False,
               scale=0.75):  # fmt: skip
    v = _common(lead, k, d, dtype, device, bias)
    for name, rows, columns in zip(("w1", "w2"), _sides(d), _sides(k), strict=True):
        fan = 1 if name == "w1" else k
        if name in decomposed:
            v[name] = randn(rows, r, dtype=adapter_dtype, device=device, fan=r).requires_grad_()
            v[f"{name}_b"] = randn(r, columns, dtype=adapter_dtype, device=device, fan=fan).requires_grad_()
        else:
            v[name] = randn(rows, columns, dtype=adapter_dtype, device=device, fan=fan).requires_grad_()
    if update:
        _over_a_result(v, lead, d, dtype, device)

    def function(v):
        options = {"w1_b": v.get("w1_b"), "w2_b": v.get("w2_b"), "scale": scale}
        if update:
            return spectral_ops.kron_update(v["base_out"], v["x"], v["w1"], v["w2"], **options)
        return spectral_ops.kron_linear(v["x"], v["weight"], v["w1"], v["w2"], v.get("bias"), **options)

    return Problem(
        function, kron, v, {"scale": scale}, dtype, False, d, saved=lambda T, r, size: 0,
        x_sized="" if "w2_b" in v else "w1 w2",  # x laid out for w1
    )  # fmt: skip


def build_svft(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", gradient_route="auto"):
    v = _common(lead, k, d, dtype, device, bias)
    v["U"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
    v["Vh"] = randn(r, k, dtype=adapter_dtype, device=device, fan=k)
    row_offsets, columns = sparse_pattern(r, r, device)
    v["values"] = randn(columns.numel(), dtype=adapter_dtype, device=device).requires_grad_()
    checked = spectral_ops.CSR(v["values"].detach(), row_offsets, columns, (r, r)).validate()

    def function(v):
        csr = checked.with_values(v["values"])
        return spectral_ops.svft_linear(
            v["x"], v["weight"], v["U"], v["Vh"], csr, v.get("bias"), gradient_route=gradient_route
        )

    constants = {"row_offsets": row_offsets.tolist(), "columns": columns.tolist()}
    return Problem(function, svft, v, constants, dtype, False, d, saved=lambda T, r, size: T * r * size)


def build_segments(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, update=False, scale=0.75,
                   ranks=None, ids=None, route="auto"):  # fmt: skip
    """Three adapters of different ranks, rows in no order, some without an adapter."""
    v = _common(lead, k, d, dtype, device, bias)
    ranks = ranks or [r, r + 1, max(r - 1, 1)]
    scales = [2.0, 1.0, -0.5, 1.5, 0.25, 1.0, 3.0, 0.5][: len(ranks)]
    for s, rank in enumerate(ranks):
        v[f"A{s}"] = randn(rank, k, dtype=adapter_dtype, device=device, fan=k).requires_grad_()
        v[f"B{s}"] = randn(d, rank, dtype=adapter_dtype, device=device, fan=rank).requires_grad_()
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device).requires_grad_()
        del v["weight"]
        v.pop("bias", None)
    if ids is None:
        ids = torch.randint(-1, len(ranks), lead, generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    on_device = ids.to(device)

    def function(v):
        As, Bs = ([v[f"{name}{s}"] for s in range(len(ranks))] for name in "AB")
        options = {"scales": [scale * own for own in scales], "dropout_p": p, "training": True, "route": route}
        if update:
            return spectral_ops.segmented_lowrank_update(v["base_out"].clone(), v["x"], As, Bs, on_device, **options)
        return spectral_ops.segmented_lowrank_linear(v["x"], v["weight"], As, Bs, on_device, v.get("bias"), **options)

    full = ids.reshape(tuple(ids.shape) + (1,) * (len(lead) - ids.dim())).expand(lead)
    constants = {"scale": scale, "scales": torch.tensor(scales).double(), "ids": full, **_mask(v, p, 1234)}
    return Problem(
        function, segments, v, constants, dtype, bool(p), d,
        saved=lambda T, r, size: T * max(ranks) * size,
    )  # fmt: skip


def build_experts(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, kind="sorted", scale=0.75):
    """Four experts. kind: "sorted", rows in the order of their experts, the second without any, the last rows of nobody
    here; or "routed", each token to three of five experts, one of them another rank's, and weighted."""
    E, T = 4, math.prod(lead)
    v = {"x": randn(*lead, k, dtype=dtype, device=device), "weight0": randn(E, d, k, dtype=dtype, device=device, fan=k)}
    v["A0"] = randn(E, r, k, dtype=adapter_dtype, device=device, fan=k)
    v["B0"] = randn(E, d, r, dtype=adapter_dtype, device=device, fan=r)
    _trained(v["x"], v["A0"], v["B0"])
    if bias:
        v["bias"] = randn(E, d, dtype=dtype, device=device).requires_grad_(bias == "trained")
    if kind == "sorted":
        ends = torch.tensor([T - T // 2, T - T // 2, T - T // 3, T - T // 6])
        own = torch.arange(T).view(T, 1) < ends
        own = own & ~torch.cat([own.new_zeros(T, 1), own[:, :-1]], 1)
        indices = None
    else:
        drawn = torch.rand(T, E + 1, generator=torch.Generator().manual_seed(7)).argsort(1)
        indices, ends = drawn[:, :3], None
        own = F.one_hot(indices, E + 1)[..., :E]
        v["routing"] = (0.5 + randn(T, 3).square()).to(device, dtype)

    offsets = None if ends is None else ends.to(device, torch.int32)
    indices = None if indices is None else indices.to(device)

    def function(v):
        x = v["x"].reshape(T, k)
        options = {"scale": scale, "dropout_p": p, "training": True}
        if kind == "sorted":
            y = spectral_ops.experts_lowrank(x, v["weight0"], offsets, v["A0"], v["B0"], v.get("bias"), **options)
        else:
            order, places, begins = sort_by_expert(indices, E)
            lora = v["A0"], v["B0"], scale
            x, weight, bias = autograd.autocast_arguments(x, v["weight0"], v.get("bias"))
            y = expert_linear(x, weight, bias, lora, order, places, begins, p, False)
            y = combine(y, v["routing"], places, begins)
        return y.reshape(*lead, d)

    constants = {"scale": scale, "own": own.double(), **_mask({"x": v["x"].reshape(T, k)}, p, 1234)}
    return Problem(
        function, experts, v, constants, dtype, bool(p), d,
        saved=lambda T, r, size: T * r * size if kind == "sorted" else 3 * T * (r * size + 8),  # h, places
        indices=0 if kind == "sorted" else 3 * T, scaled="B0", x_sized="A0" if p else "",  # drop(x)
    )  # fmt: skip


def build_vera(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", p=0.0, update=False):
    v = _common(lead, k, d, dtype, device, bias)
    v["random_A"] = randn(r, k, dtype=adapter_dtype, device=device, fan=k)
    v["random_B"] = randn(d, r, dtype=adapter_dtype, device=device, fan=r)
    v["lambda_d"] = 1 + 0.5 * randn(r, dtype=adapter_dtype, device=device)
    v["lambda_b"] = 1 + 0.5 * randn(d, dtype=adapter_dtype, device=device)
    _trained(v["lambda_d"], v["lambda_b"])
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device).requires_grad_()
        del v["weight"]
        v.pop("bias", None)

    def function(v):
        factors, options = (
            (v["random_A"], v["random_B"], v["lambda_d"], v["lambda_b"]),
            {"dropout_p": p, "training": True},
        )
        if update:
            return spectral_ops.vera_update(v["base_out"], v["x"], *factors, **options)
        return spectral_ops.vera_linear(v["x"], v["weight"], *factors, v.get("bias"), **options)

    return Problem(
        function, vera, v, _mask(v, p, 1234), dtype, bool(p), d, saved=lambda T, r, size: T * r * size
    )  # fmt: skip


def build_randlora(lead, k, d, r, dtype, adapter_dtype, device, *, bias="trained", update=False, scale=0.75):
    """Three bases, so that r n is another number than either side."""
    v, n, m, M = _common(lead, k, d, dtype, device, bias), 3, min(d, k), max(d, k)
    v["random_A"] = randn(r, m, dtype=adapter_dtype, device=device, fan=m)
    v["random_B"] = randn(M, r * n, dtype=adapter_dtype, device=device, fan=r * n)
    v["lambda_"] = 1 + 0.5 * randn(r, n, dtype=adapter_dtype, device=device)
    v["gamma"] = 1 + 0.5 * randn(n, m, dtype=adapter_dtype, device=device)
    _trained(v["lambda_"], v["gamma"])
    if update:
        v["base_out"] = randn(*lead, d, dtype=dtype, device=device).requires_grad_()
        del v["weight"]
        v.pop("bias", None)

    def function(v):
        bases = v["random_A"], v["random_B"], v["lambda_"], v["gamma"]
        if update:
            return spectral_ops.randlora_update(v["base_out"], v["x"], *bases, scale=scale)
        return spectral_ops.randlora_linear(v["x"], v["weight"], *bases, v.get("bias"), scale=scale)

    return Problem(
        function, randlora, v, {"scale": scale}, dtype, False, d,
        saved=lambda T, r, size: T * r * n * size if k > d else 0,
    )  # fmt: skip


LOWRANK = [
    Family("lora", build_lora),
    Family("lora-dropout", build_lora, {"p": 0.3}),
    Family("lora-diagonal", build_lora, {"core": "diagonal"}),
    Family("lora-core-scaled-dropout", build_lora, {"core": "full", "out_scale": True, "p": 0.3}),
    Family("lora-update", build_lora, {"update": True}),
    Family("lora-update-everything", build_lora, {"update": True, "core": "full", "out_scale": True, "p": 0.3}),
    Family("group", build_group),
]
DORA = [
    Family("dora", build_dora),
    Family("dora-recompute", build_dora, {"recompute": True}),
    Family("dora-given-norm", build_dora, {"given_norm": True, "bias": None}),
    Family("dora-dropout", build_dora, {"p": 0.3}),
    Family("dora-update", build_dora, {"update": True, "bias": None}),
    Family("dora-update-bias", build_dora, {"update": True}),
]
BLOCKSUM = [
    Family("bone", build_shards),
    Family("bone-dropout", build_shards, {"p": 0.3}),
    Family("mini", build_shards, {"kind": "mini"}),
    Family("mini-dropout", build_shards, {"kind": "mini", "p": 0.3}),
    Family("disha-even", build_shards, {"kind": "disha even"}),
    Family("disha-uneven", build_shards, {"kind": "disha uneven"}),
    Family("disha-cyclic", build_shards, {"kind": "disha cyclic"}),
    Family("bone-update", build_shards, {"update": True, "p": 0.3}),
    Family("block-sum", build_block_sum),
]
BAT = [
    Family("bat", build_bat),
    Family("bat-few-tokens", build_bat, {"few": True}),
    Family("bat-exact", build_bat, {"exact": True}),
    Family("bat-row", build_bat, {"mode": "row"}),
]
CSR = [  # the resident route, which writes into W, has its own tests
    Family("rosa", build_rosa),
    Family("rosa-spmm-dropout", build_rosa, {"route": "spmm", "gradient_route": "sampled", "p": 0.3}),
    Family("rosa-scatter", build_rosa, {"route": "scatter", "gradient_route": "dense"}),
    Family("rosa-sparse-only", build_rosa, {"low_rank": False, "route": "spmm", "gradient_route": "compact"}),
    Family("rosa-update", build_rosa, {"kind": "update", "gradient_route": "sampled"}),
    Family("csr-spmm", build_rosa, {"kind": "spmm", "gradient_route": "dense"}),
    Family("svft", build_svft),
]
SEGMENTS = [
    Family("segments", build_segments),
    Family("segments-update-dropout", build_segments, {"update": True, "p": 0.3}),
    Family("segments-grouped", build_segments, {"route": "grouped"}),
    Family("segments-grouped-update", build_segments, {"route": "grouped", "update": True}),
]
EXPERTS = [
    Family("experts", build_experts),
    Family("experts-dropout", build_experts, {"p": 0.3}),
    Family("experts-routed", build_experts, {"kind": "routed"}),
    Family("experts-routed-dropout", build_experts, {"kind": "routed", "p": 0.3}),
]
VERA = [
    Family("vera", build_vera),
    Family("vera-dropout", build_vera, {"p": 0.3}),
    Family("vera-update", build_vera, {"update": True}),
]
RANDLORA = [
    Family("randlora", build_randlora),
    Family("randlora-update", build_randlora, {"update": True}),
]
HADAMARD = [
    Family("hira", build_hadamard, {"kind": "hira"}),
    Family("hira-exact", build_hadamard, {"kind": "hira", "exact": True}),
    Family("loha", build_hadamard, {"route": "factors"}),
    Family("loha-tiles", build_hadamard, {"route": "tiles"}),
    Family("loha-update", build_hadamard, {"kind": "update"}),
]
KRON = [
    Family("kron", build_kron),
    Family("kron-whole", build_kron, {"decomposed": ""}),
    Family("kron-both", build_kron, {"decomposed": "w1 w2"}),
    Family("kron-update", build_kron, {"update": True}),
]
FAMILIES = {
    family.name: family
    for family in LOWRANK + DORA + BLOCKSUM + BAT + CSR + SEGMENTS + EXPERTS + VERA + RANDLORA + HADAMARD + KRON
}


def cotangent(problem: Problem, y: torch.Tensor, layout: str = "contiguous") -> torch.Tensor:
    """A random incoming gradient of ``y``."""
    dy = randn(*y.shape, dtype=y.dtype, device=y.device)
    return laid_out(dy, layout)
