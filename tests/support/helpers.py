"""What the tests share: dense float64 oracles written straight from METHODS.md, problems, and error budgets.

Nothing here calls the implementation it judges, except for the dropout mask: that is the operator's own definition
(functional/random.py), tested on its own in test_dropout.py.

Error budget. Every oracle is a polynomial, so evaluating it, and its autograd gradients, on absolute values adds up the
absolute values of all its terms. A result that was rounded ``ROUNDINGS`` times to the working dtype and summed over n
terms in the accumulation dtype is off by at most

    (ROUNDINGS * eps(dtype) / 2 + n * eps(accumulate)) * |path|

per element; and since rounding errors are not correlated, its Frobenius norm is off by at most the same with sqrt(n),
relative to the result itself or to the root of the sum of its squared terms (the oracle on squares), if that is larger.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spectral_ops
from spectral_ops import _library, _loader, backends
from spectral_ops.bench.counting import Unfolding
from spectral_ops.core import autograd, philox

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
# the longest chain of roundings to the working dtype: a float32 parameter cast, h, h', the base product, the added
# update, the scaled factor of dx (g*dy or g*W), the dropped-out factor and the result
ROUNDINGS = 8

# leading dimensions, in_features, out_features, rank
SHAPES = [
    ((7,), 24, 40, 4),
    ((), 16, 24, 3),  # x is a vector
    ((2, 3), 31, 17, 13),  # odd sizes, k % r != 0
    ((2, 1, 5), 33, 64, 16),
    ((1,), 20, 12, 1),  # one token, rank one
    ((0,), 8, 12, 2),  # nothing
    ((2, 0), 9, 5, 4),
    ((131,), 48, 57, 20),  # past a tile of tokens; r no multiple of 16
    ((5,), 16, 24, 16),  # r = k
    ((3,), 130, 259, 64),
]
LARGE = [((2,), 40_000, 12, 3), ((2,), 12, 40_000, 3)]  # features past what 15 or 16 bits count
TYPICAL = ((3, 5), 24, 40, 5)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ids(value) -> str | None:
    """Readable test ids for dtypes and shapes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 4 and isinstance(value[0], tuple):
        lead, k, d, r = value
        return f"{'x'.join(map(str, lead)) or 'vector'}-k{k}-d{d}-r{r}"
    return None


def randn(*shape: int, dtype=torch.float64, device="cpu", fan: int = 1) -> torch.Tensor:
    """Normal numbers of variance 1/fan, rounded to ``dtype``."""
    return (torch.randn(*shape, dtype=torch.float64) / max(fan, 1) ** 0.5).to(dtype).to(device)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t`` in another memory layout (``expanded``: its first row everywhere)."""
    if layout == "contiguous":
        return t
    if layout == "rows":  # rows of a wider, longer buffer
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if layout == "columns":  # every second column: no unit stride
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "transposed":  # leading dimensions (or those of a matrix) swapped in memory
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return t[(slice(0, 1),) * (t.dim() - 1)].expand(t.shape)
    raise ValueError(layout)


# --- oracles: METHODS 1.1 to 1.5 as plain autograd formulas ----------------------------------------------------------
# v: a problem's tensors; c: its constants (scale, mask, norm, minus_one). On absolute values they add up |terms|.


def lora(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    h = dropped @ v["A"].T
    if "core" in v:
        h = h * v["core"] if v["core"].dim() == 1 else h @ v["core"]
    y = v["x"] @ v["weight"].T + c["scale"] * (h @ v["B"].T)
    y = y * v["out_scale"] if "out_scale" in v else y
    return y + v["bias"] if "bias" in v else y


def lora_update(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    h = dropped @ v["A"].T
    if "core" in v:
        h = h * v["core"] if v["core"].dim() == 1 else h @ v["core"]
    y = v["base_out"] + c["scale"] * (h @ v["B"].T)
    if "out_scale" not in v:
        return y
    if "bias" not in v:
        return v["out_scale"] * y
    return v["out_scale"] * (y + c["minus_one"] * v["bias"]) + v["bias"]


def dora(v, c):
    g = v["magnitude"] / c["norm"]
    bias = v.get("bias", 0.0)
    if "mask" not in c:
        return g * (v["x"] @ v["weight"].T + c["scale"] * ((v["x"] @ v["A"].T) @ v["B"].T)) + bias
    dropped = v["x"] * c["mask"]  # PEFT's form
    update = c["scale"] * ((dropped @ v["A"].T) @ v["B"].T)
    return v["x"] @ v["weight"].T + bias + (g + c["minus_one"]) * (dropped @ v["weight"].T) + g * update


def dora_update(v, c):
    g = v["magnitude"] / c["norm"]
    y = v["base_out"] + c["scale"] * ((v["x"] @ v["A"].T) @ v["B"].T)
    if "bias" not in v:
        return g * y
    return g * (y + c["minus_one"] * v["bias"]) + v["bias"]


def shard_of(features: int, count: int, spec) -> list[int]:
    """The shard each feature belongs to, counted out one by one."""
    if spec is None:
        return list(range(features))
    if spec == "cyclic":
        return [i % count for i in range(features)]
    return [shard for shard, size in enumerate(spec) for _ in range(size)]


def shard_delta(D: torch.Tensor, k: int, d: int, in_shards="cyclic", out_shards="cyclic") -> torch.Tensor:
    """ΔW [d, k] of DiSHA, formed: ΔW[o, i] = D[shard(i), shard'(o)]."""
    sigma, tau = shard_of(k, D.shape[0], in_shards), shard_of(d, D.shape[1], out_shards)
    return D[sigma][:, tau].T


def shards(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    k, d = v["x"].shape[-1], c["out_features"]
    base = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    y = base + dropped @ shard_delta(v["D"], k, d, c["in_shards"], c["out_shards"]).T
    return y + v["bias"] if "bias" in v else y


def shard_sums(v, c):
    k = v["x"].shape[-1]
    return torch.stack([v["x"][..., p :: c["r"]].sum(-1) for p in range(min(c["r"], k))], -1)


def siblings(v, c):
    outputs = []
    for i in range(c["siblings"]):
        part = {"x": v["x"], **{n[:-1]: t for n, t in v.items() if n.endswith(str(i))}}
        outputs.append(lora(part, {"scale": c["scale"] * (i + 1)}))
    return torch.cat(outputs, -1)


def bat_changed(weight: torch.Tensor, blocks: torch.Tensor, mode: str) -> torch.Tensor:
    """W' [d, k] of Bat: W(o,j)(I + B) + B with the B of block-row o (col) or of block-column j (row). test_bat.py
    compares it with one block after the other."""
    r = blocks.shape[-1]
    W = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).transpose(1, 2)  # [o, j] of blocks
    B = blocks.unsqueeze(1 if mode == "col" else 0)
    return (W @ (torch.eye(r, dtype=blocks.dtype) + B) + B).transpose(1, 2).reshape(weight.shape)


def bat(v, c):
    y = v["x"] @ bat_changed(v["weight"], v["blocks"], c["mode"]).T
    return y + v["bias"] if "bias" in v else y


def sparse_delta(values: torch.Tensor, row_offsets, columns, shape) -> torch.Tensor:
    """S [d, k] formed from CSR, row by row."""
    rows = [o for o, (a, b) in enumerate(zip(row_offsets, row_offsets[1:], strict=False)) for _ in range(a, b)]
    return torch.zeros(shape, dtype=values.dtype).index_put((torch.tensor(rows), torch.tensor(columns)), values)


def rosa(v, c):
    k, d = v["x"].shape[-1], c["out_features"]
    S = sparse_delta(v["values"], c["row_offsets"], c["columns"], (d, k))
    if "weight" in v:
        y = v["x"] @ v["weight"].T
    else:
        y = v["base_out"] if "base_out" in v else 0.0
    y = y + v["x"] @ S.T
    if "A" in v:
        dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
        y = y + c["scale"] * ((dropped @ v["A"].T) @ v["B"].T)
    return y + v["bias"] if "bias" in v else y


def segments(v, c):
    """One adapter after the other, over the rows that are its own."""
    y = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    for s, scale in enumerate(c["scales"]):
        own = (c["ids"] == s).unsqueeze(-1).to(y.dtype)
        y = y + own * ((c["scale"] * scale) * ((dropped @ v[f"A{s}"].T) @ v[f"B{s}"].T))
    return y + v["bias"] if "bias" in v else y


def weight_norm(weight, A, B, scale) -> torch.Tensor:
    """‖W + scale B A‖ per row, formed, in float64."""
    return (weight.double() + scale * (B.double() @ A.double())).square().sum(1).sqrt()


# --- problems: one call of a public function beside its oracle -------------------------------------------------------


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

    return Problem(function, bat, v, {"mode": mode}, dtype, False, d, saved=lambda T, r, size: 0)


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
    )  # fmt: skip


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
]
SEGMENTS = [
    Family("segments", build_segments),
    Family("segments-update-dropout", build_segments, {"update": True, "p": 0.3}),
    Family("segments-grouped", build_segments, {"route": "grouped"}),
    Family("segments-grouped-update", build_segments, {"route": "grouped", "update": True}),
]
FAMILIES = {family.name: family for family in LOWRANK + DORA + BLOCKSUM + BAT + CSR + SEGMENTS}


# --- judging ---------------------------------------------------------------------------------------------------------


def evaluate(problem: Problem, dy: torch.Tensor, absolute: bool = False, power: int = 1):
    """The oracle's output and gradients in float64 on the CPU; with ``absolute``, the sums of their absolute terms
    to the given power."""

    def size(t):
        return abs(t) ** power if absolute else t

    v = {n: size(t.detach().cpu().double()).requires_grad_(t.requires_grad) for n, t in problem.inputs.items()}
    c = problem.constants
    if absolute:
        c = {n: size(t) if isinstance(t, (float, torch.Tensor)) else t for n, t in c.items()}
    y = problem.oracle(v, c)
    names = problem.trained()
    grads = torch.autograd.grad(y, [v[n] for n in names], size(dy.detach().cpu().double())) if names else []
    return y.detach(), dict(zip(names, grads, strict=True))


def assert_within_budget(name, got, want, path, dtype, length, roundings=ROUNDINGS, squares=None) -> None:
    """``got`` is ``want`` up to the roundings that its dtype and the length of its sums explain (see the top)."""
    got, want, path = (t.detach().cpu().double() for t in (got, want, path))
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, wanted {list(want.shape)}"
    if not want.numel():
        return
    eps, eps_acc = torch.finfo(dtype).eps, torch.finfo(accumulate(dtype)).eps
    floor = length * torch.finfo(dtype).smallest_normal * eps  # what underflow to subnormals may cost
    error = (got - want).abs()
    budget = (roundings * eps / 2 + length * eps_acc) * path.abs() + floor
    worst = (error / budget).nan_to_num(nan=float("inf")).max().item()
    assert worst <= 1, f"{name}: {worst:.3g} times its elementwise budget ({dtype}, sums of {length})"
    norm = want.norm() if squares is None else torch.maximum(want.norm(), squares.cpu().sum().sqrt())
    relative = (error.norm() / (norm + floor * want.numel() ** 0.5)).item()
    limit = roundings * eps / 2 + length**0.5 * eps_acc
    assert relative <= limit, f"{name}: relative error {relative:.3g}, budget {limit:.3g} ({dtype}, sums of {length})"


def cotangent(problem: Problem, y: torch.Tensor, layout: str = "contiguous") -> torch.Tensor:
    dy = randn(*y.shape, dtype=y.dtype, device=y.device)
    return laid_out(dy, layout)


def check(problem: Problem, dy_layout: str = "contiguous") -> None:
    """Output and every gradient against the oracle, their dtypes, and that the inputs are left alone."""
    before = {n: t.detach().clone() for n, t in problem.inputs.items()}
    y = problem.call()
    assert y.dtype == problem.dtype
    dy = cotangent(problem, y, dy_layout)
    dy_before = dy.clone()
    names = problem.trained()
    grads = torch.autograd.grad(y, [problem.inputs[n] for n in names], dy) if names else []
    want, want_grads = evaluate(problem, dy)
    path, path_grads = evaluate(problem, dy, absolute=True)
    length = max(problem.inputs["x"].shape[-1], problem.out_features) + problem.tokens + 64
    squares, square_grads = evaluate(problem, dy, absolute=True, power=2)
    assert_within_budget("y", y, want, path, problem.dtype, length, squares=squares)
    for name, grad in zip(names, grads, strict=True):
        source = problem.inputs[name]
        assert grad.dtype == source.dtype, f"d{name}: {grad.dtype}, wanted its parameter's {source.dtype}"
        assert grad.device == source.device
        assert_within_budget(
            f"d{name}", grad, want_grads[name], path_grads[name], problem.dtype, length, squares=square_grads[name]
        )
    for name, t in problem.inputs.items():
        assert torch.equal(t.detach(), before[name]), f"{name} was overwritten"
    assert torch.equal(dy, dy_before), "dy was overwritten"


def check_batched_gradients(problem: Problem) -> None:
    """A batch of incoming gradients, in either of torch's ways, gives what each gives alone."""
    y, inputs = problem.call(), [problem.inputs[n] for n in problem.trained()]
    dys = randn(3, *y.shape, dtype=y.dtype, device=y.device)
    alone = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)
    for got in (batched, mapped):
        for grads, own in zip(got, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(grads, torch.stack(own))


def storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


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


def fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a new interpreter from the repository root; the caller looks at returncode, stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if k != "SPECTRAL_OPS_BACKEND"} | environment
    env["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [env.get("PYTHONPATH")])]
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def extension_waived() -> str | None:
    """Why the compiled extension may be absent in this run; None when it must be there."""
    for name in ("SPECTRAL_OPS_NO_EXTENSION", "SPECTRAL_OPS_SKIP_BUILD"):
        if os.environ.get(name) == "1":
            return f"{name}=1"
    return None


# --- operators: representative arguments, for every overload and device ---------------------------------------------


def sparse_pattern(d: int, k: int, device="cpu", density: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 row offsets and columns of a [d, k] pattern: the first row empty, the second full, the rest at random."""
    mask = torch.rand(d, k, generator=torch.Generator().manual_seed(d * 1009 + k)) < density
    mask[:1], mask[1:2] = False, True
    offsets = torch.zeros(d + 1, dtype=torch.int32)
    offsets[1:] = mask.sum(1).cumsum(0)
    return offsets.to(device), mask.nonzero()[:, 1].to(device, torch.int32)


def _orthogonal(X: torch.Tensor) -> torch.Tensor:
    """The Cayley transform of X [n, r, r] in float64."""
    X, eye = X.cpu().double(), torch.eye(X.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(eye + (X - X.mT) / 2) * 2 - eye


def operator_samples(dtype=torch.float32, device="cpu", T=6, k=21, d=34, r=5) -> dict[str, list[tuple]]:
    """Arguments for every operator, None options included."""
    acc = accumulate(dtype)

    def make(*shape, dtype=dtype, fan=1):
        return randn(*shape, dtype=dtype, device=device, fan=fan)

    x, dy, y = make(T, k), make(T, d), make(T, d)
    weight, A, B, h = make(d, k, fan=k), make(r, k, fan=k), make(d, r, fan=r), make(T, r)
    A32, B32 = make(r, k, dtype=acc, fan=k), make(d, r, dtype=acc, fan=r)
    u, bias = make(T, r), make(d)
    g, shift = 1 + 0.3 * make(d, dtype=acc), make(d, dtype=acc)
    seed = torch.tensor([0x1234_5678_9ABC], device=device)
    norm = weight_norm(weight, A, B, 0.5).to(acc)
    stamp = torch.zeros(2, dtype=torch.int64, device=device)  # of no A and B: the norm must be computed
    small = g.clone()
    small[::3] *= 2.0**-20
    blocks = torch.tensor([0, 1, 4, 5, 12, k], dtype=torch.int32, device=device)  # uneven shards of k = 21 (r = 5)
    out_blocks = torch.tensor([0, 7, 8, 20, 30, d], dtype=torch.int32, device=device)
    wide = laid_out(x, "rows")

    nd, nk = max(d // max(r, 1), 1), max(k // max(r, 1), 1)  # blocks of Bat, and the sizes they fill
    dr, kr = nd * r, nk * r
    W_bat, G_bat, x_bat, dy_bat = make(dr, kr, fan=kr), make(dr, kr), make(T, kr), make(T, dr)
    col, row, col32 = make(nd, r, r, fan=r), make(nk, r, r, fan=r), make(nd, r, r, dtype=acc, fan=r)
    dB = torch.zeros(nd, r, r, dtype=acc, device=device)

    offsets, columns = sparse_pattern(d, k, device)
    nnz = columns.numel()
    values, values32, order = make(nnz), make(nnz, dtype=acc), torch.randperm(nnz).to(device, torch.int32)
    half = offsets[d // 2 :].clone()  # the offsets of the lower half

    logits, token = 6 * y, torch.arange(T, device=device)
    targets = torch.where(token % 4 == 3, -7, token * 5 % d) if d else token.new_full((T,), -7)  # -7: ignored
    lse, lse_half, dlogp = logits.to(acc).logsumexp(1), (0.5 * logits.to(acc)).logsumexp(1), make(T, dtype=acc)
    As, Bs = make(4, r, k, fan=k), make(4, d, r, fan=r)
    groups = torch.randperm(T).to(device), torch.tensor([T // 7, T // 3, T // 3, T // 2, T - T // 5], device=device)
    alone = groups[0], torch.tensor([0, T, T, T, T], device=device)

    X, dQ = make(min(T, 3), r, r), make(min(T, 3), r, r, dtype=acc)
    Q = _orthogonal(X).to(dQ)
    return {
        "cayley_forward": [(X,), (X.mT,)],
        "cayley_backward": [(Q, dQ), (Q.mT, dQ[:1].expand_as(dQ))],
        "segment_project": [
            (x, As, *groups),
            (x, As, *alone),
            (wide, As.transpose(1, 2).contiguous().transpose(1, 2), *groups),
        ],
        "segment_lift_": [
            (y.clone(), h, Bs, *groups),
            (laid_out(y, "rows"), laid_out(h, "rows"), Bs.transpose(0, 1).contiguous().transpose(0, 1), *alone),
        ],
        "segment_outer": [(u, x, *groups), (laid_out(u, "rows"), wide, *alone)],
        "bat_weight_": [
            (torch.zeros_like(W_bat), W_bat, col, False, False),
            (torch.zeros_like(W_bat), W_bat, row, True, False),
            (torch.zeros(dr, kr, dtype=acc, device=device), laid_out(W_bat, "rows"), col32, False, True),
            (torch.zeros_like(W_bat), laid_out(W_bat, "transposed"), col32, False, False),
        ],
        "bat_matmul": [
            (x_bat, W_bat, col, False),
            (dy_bat, W_bat, col32, True),
            (laid_out(x_bat, "rows"), laid_out(W_bat, "transposed"), col32, False),
        ],
        "bat_contract_": [(dB, W_bat, G_bat), (dB, laid_out(W_bat, "transposed"), G_bat.to(acc))],
        "bat_mix": [(x_bat, row), (laid_out(x_bat, "rows"), row.to(acc))],
        "bat_mix_backward_": [
            (make(T, kr), u, x_bat, row, True, True),
            (make(T, kr), u, x_bat, row.to(acc), True, False),
            (make(T, kr), u, laid_out(x_bat, "rows"), row, False, True),
        ],
        "csr_scatter_": [
            (weight.clone(), values, offsets, columns, True),
            (laid_out(weight, "transposed"), values32, offsets, columns, False),
        ],
        "csr_gather_": [
            (values32.clone(), weight, offsets, columns),
            (values.clone(), laid_out(weight[d // 2 :], "transposed"), half, columns),
        ],
        "csr_spmm_": [
            (y.clone(), x, values, offsets, columns, None),
            (laid_out(y, "rows"), wide, values32, offsets, columns, order),
        ],
        "csr_sddmm": [(dy, x, offsets, columns), (laid_out(dy, "rows"), wide, offsets, columns)],
        "target_logprob": [
            (logits, targets, 1.0, -7),
            (laid_out(logits, "rows"), targets, 0.5, -7),
        ],
        "softmax_gradient_": [
            (logits.clone(), targets, lse, dlogp, 1.0, -7),
            (laid_out(logits, "rows"), targets, lse_half, dlogp, 0.5, -7),
        ],
        "lowrank_matmul": [
            (x, weight, h, B, 0.5, None, None),
            (x, weight, h, B, 0.5, g, bias),
            (wide, laid_out(weight, "transposed"), h, B, -2.0, None, bias),
        ],
        "lowrank_update_": [
            (y, h, B, 0.5, None, None),
            (y, h, B, 0.5, g, None),
            (y, h, B, -1.5, g, shift),
            (laid_out(y, "rows"), h, B, 0.5, None, shift),
        ],
        "lowrank_backward": [
            (dy, h, B, 0.5, None, None, None, True, True, True, False),
            (dy, h, B, 0.5, g, y, bias, True, True, True, True),
            (dy, h, B, 0.5, g, y, None, True, False, False, False),
            (dy, h, B, 0.5, g, None, None, False, True, False, True),
            (laid_out(dy, "rows"), h, B, -0.5, g, laid_out(y, "rows"), bias, True, True, False, True),
            (laid_out(dy, "expanded"), h, B, 0.5, None, None, None, True, True, True, False),
            (dy, h, B, 0.5, None, None, None, False, False, False, False),
        ],
        "column_norm": [
            (weight, A, B, 0.5),
            (weight, A32, B32, 0.5),
            (laid_out(weight, "transposed"), A32, B32, -2.0),
        ],
        "column_norm_cached_": [
            (torch.zeros_like(norm), stamp, weight, A32, B32, 0.5, True),
            (torch.zeros_like(norm), stamp, laid_out(weight, "rows"), A, B, -0.5, False),
        ],
        "magnitude_grad": [
            (shift, dy, x, h, weight, B, 0.5, g, norm, None),
            (shift, dy, x, h, weight, B, 0.5, small, norm, None),
            (shift, dy, x, h, weight, B, 0.5, small, norm, bias),
        ],
        "dropout_project": [(x, A, seed, 0.3), (wide, A, seed, 0.0)],
        "dropout_outer": [(u, x, seed, 0.3), (u, wide, seed, 0.9)],
        "dropout_lift_": [(x.clone(), u, A, seed, 0.3), (laid_out(x, "rows"), u, A, seed, 0.5)],
        "seeded_dropout": [(x, seed, 0.3), (wide, seed, 0.0)],
        "block_sum": [
            (x, r, None, None, 0.0),
            (x, r, None, seed, 0.3),
            (x, 1, None, None, 0.0),
            (x, k, None, None, 0.0),
            (wide, r, blocks, None, 0.0),
            (laid_out(x, "expanded"), 4, None, seed, 0.5),
        ],
        "block_tile_": [
            (x.clone(), h, None, None, 0.0, True),
            (x.clone(), h, None, None, 0.0, False),
            (laid_out(x, "rows"), h, blocks, None, 0.0, True),
            (x.clone(), h, None, seed, 0.3, True),
            (y.clone(), h, out_blocks, seed, 0.3, False),
        ],
    }  # fmt: skip


OPERATOR_NAMES = sorted(operator_samples())


def copied(args: tuple) -> tuple:
    """The arguments with every tensor copied, strides kept."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
        if isinstance(a, torch.Tensor) and not any(s == 0 for s in a.stride())
        else a
        for a in args
    )


def widened(args: tuple, absolute: bool = False) -> tuple:
    """The arguments with floating tensors (and numbers) in float64 on the CPU, optionally as absolute values."""
    wide = []
    for a in args:
        if isinstance(a, torch.Tensor):
            a = a.cpu().double() if a.is_floating_point() else a.cpu()
            a = a.abs() if absolute and a.is_floating_point() else a
        elif isinstance(a, float) and absolute:
            a = abs(a)
        wide.append(a)
    return tuple(wide)


def results(operator: _library.Operator, overload: Callable, args: tuple) -> list[torch.Tensor]:
    """What a call of ``overload`` returns and what it writes (int64 stamps excepted), on copies of ``args``."""
    args = copied(args)
    out = overload(*args)
    written = [
        a for a, s in zip(args, operator.default._schema.arguments, strict=True)
        if s.alias_info is not None and s.alias_info.is_write and a.is_floating_point()
    ]  # fmt: skip
    return [*(t for t in tree_leaves(out) if t is not None), *written]


class Quiet(TorchDispatchMode):
    """A dispatch mode that changes nothing; while it is on, no layer overwrites what it is given."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@functools.cache
def _layer_calls(dtype: torch.dtype, shape: tuple) -> dict[str, list[tuple]]:
    torch.manual_seed(0)
    calls: dict[str, list[tuple]] = {}

    def record(operator, *args):
        calls.setdefault(operator.name, []).append(
            tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in copied(args))
        )
        return call(operator, *args)

    call = _library.LayerOperator.__call__
    _library.LayerOperator.__call__ = record
    try:
        for family in FAMILIES.values():
            for mode in (contextlib.nullcontext(), Quiet())[: 2 if "update" in family.name else 1]:
                for bias in (None, "trained"):
                    problem = family.build(shape, dtype, **({} if family.name == "block-sum" else {"bias": bias}))
                    with mode:
                        y = problem.call()
                    torch.autograd.grad(y, [problem.inputs[n] for n in problem.trained()], cotangent(problem, y))
        weight = randn(12, 16, dtype=dtype)
        csr = spectral_ops.CSR.from_dense(randn(12, 16, dtype=dtype).clamp_min(0))
        for mode, n in (("col", 3), ("row", 4)):
            spectral_ops.bat_weight(weight, randn(n, 4, 4, dtype=dtype).requires_grad_(), mode=mode).sum().backward()
        csr = csr.with_values(csr.values.detach().requires_grad_())
        spectral_ops.csr_add(weight, csr).sum().backward()
    finally:
        _library.LayerOperator.__call__ = call
    return calls


def layer_samples(name: str, dtype: torch.dtype = torch.float32, shape: tuple = TYPICAL) -> list[tuple]:
    """Arguments of a layer operator: those of every family of problems, forward and backward, in place and not."""
    return _layer_calls(dtype, shape)[name]


def _squared(name: str, a):
    if name == "bias":  # already negated where it is subtracted
        return a if a is None else a * a.abs()
    if name == "scale" or (isinstance(a, torch.Tensor) and a.is_floating_point()):
        return a**2
    return a


def _softmax_path(name: str, args: tuple, want: list[torch.Tensor]) -> list[torch.Tensor]:
    """What rounding is relative to where exponentials are taken: the largest exponent of a row, per result."""
    logits, scale = args[0], args[-2]
    size = 1 + (logits * scale).abs().sum(1) if not logits.shape[1] else 1 + (logits * scale).abs().amax(1)
    if name == "target_logprob":
        return [size, size]
    targets, lse, dlogp = args[1:4]
    onehot = torch.nn.functional.one_hot(targets.clamp(min=0), max(logits.shape[1], 1))[:, : logits.shape[1]]
    p = (logits * scale - lse.unsqueeze(1)).exp()
    return [(onehot + p) * (scale * dlogp.abs() * (size + lse.abs())).unsqueeze(1)]


def _cayley_path(name: str, args: tuple, want: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an elimination of I + K and two products sum: entries do not cancel as those of a skew difference do."""
    eye = torch.eye(args[0].shape[-1], dtype=torch.float64)
    if name == "cayley_forward":
        M = (want[0] + eye).abs()
        return [1 + M @ (eye + (args[0] - args[0].mT).abs() / 2) @ M / 2]
    M = (args[0] + eye).abs()
    V = M @ args[1].abs().mT @ M
    return [(V + V.mT) / 4]


def check_operator(operator: _library.Operator, overload: Callable, args: tuple) -> None:
    """One implementation of an operator against its reference in float64, within the error budget."""
    reference = operator.reference
    got = results(operator, overload, args)
    want = results(operator, reference, widened(args))
    absolute = widened(args, absolute=True)
    if operator.name == "lowrank_backward" and absolute[6] is not None:
        absolute = (*absolute[:6], -absolute[6], *absolute[7:])  # Σ dy*(y - bias): the terms' absolute sum
    path = results(operator, reference, absolute)
    if operator.stem == "policy":
        path = _softmax_path(operator.name, widened(args), want)
    if operator.stem == "cayley":
        path = _cayley_path(operator.name, widened(args), want)
    if operator.name.startswith("column_norm"):  # rounding of c is relative to the rows' absolute sums
        path = [p.clamp_min(1e-30) for p in path]
    squares = [None] * len(path)
    if operator.name not in (
        "column_norm",
        "column_norm_cached_",
        "magnitude_grad",
        "target_logprob",
        "softmax_gradient_",
    ):  # polynomials
        names = [a.name for a in operator.default._schema.arguments]
        squares = results(operator, reference, tuple(map(_squared, names, absolute)))
    if operator.stem == "cayley":
        squares = [p.square() for p in path]
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
    if operator.name == "magnitude_grad":
        dtype = args[1].dtype
    length = sum(max(a.shape) for a in args if isinstance(a, torch.Tensor) and a.dim() == 2) + 16
    assert len(got) == len(want)
    for i, (g, w, p, q) in enumerate(zip(got, want, path, squares, strict=True)):
        # float32 accumulators handed out by a half-precision operator are not rounded to half precision
        out_dtype = g.dtype if g.dtype != torch.float64 else dtype
        assert_within_budget(f"{operator.name}[{i}]", g, w, p, out_dtype, length, roundings=3, squares=q)


def overload_or_reason(operator: _library.Operator, backend: str, device_type: str):
    """(overload, None) that runs ``backend`` on this device, or (None, why it cannot)."""
    if reason := backends.unavailable(operator, backend, device_type):
        return None, reason
    return operator.overloads.get(backend, operator.default), None


def extension_loaded(backend: str = "cpu") -> bool:
    return _loader.EXTENSIONS[backend].error is None
