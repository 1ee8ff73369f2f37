"""What is estimated and measured: operators at a layer's real sizes, T tokens, W [d, k], bfloat16, usual ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

TOKENS = (8192, 2048, 512)
SHAPES = ((4096, 4096), (14336, 4096))  # W [d, k]
DENSITY = 0.006
ADAPTERS = 32  # of a segmented batch, with as many rows each
EXPERTS = 128  # of a mixture like Qwen3-30B-A3B, eight of them for each of T / 2 tokens, as many rows each


@dataclass
class Make:
    """Tensors of a size on a device: normal numbers, or whatever memory holds where nothing reads them."""

    T: int
    d: int
    k: int
    device: str = "cpu"
    filled: bool = False
    made: dict = field(default_factory=dict)

    def __call__(self, *sizes: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        if not self.filled:
            return torch.empty(*sizes, dtype=dtype, device=self.device)
        return (scale * torch.randn(*sizes, device=self.device)).to(dtype)

    def wide(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        return self(*sizes, dtype=torch.float32, scale=scale)

    def integers(self, n: int, end: int) -> torch.Tensor:
        return torch.randint(0, end, (n,), device=self.device)

    def about_one(self, n: int) -> torch.Tensor:
        """A float32 vector, some ten per cent about 1."""
        return 1 + 0.1 * torch.randn(n, device=self.device)

    def pattern(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 row offsets and columns of a random pattern of RoSA's usual density, each row with as many entries."""
        each = max(1, round(DENSITY * self.k))
        generator = None if self.device == "meta" else torch.Generator(self.device).manual_seed(0)
        places = torch.rand(self.d, self.k, device=self.device, generator=generator)
        columns = places.topk(each, dim=1).indices.sort(1).values
        offsets = torch.arange(0, self.d * each + 1, each, device=self.device)
        return offsets.to(torch.int32), columns.flatten().to(torch.int32)


@dataclass(frozen=True)
class Case:
    """An operator on one kind of arguments. label: which; tokens: whether they depend on T; least: the least bytes
    where the values decide what is to be moved, else they are the operator's."""

    operator: str
    label: str
    arguments: Callable[[Make], tuple]
    tokens: bool = True
    least: Callable[[tuple], int] | None = None

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.label}" if self.label else self.operator


def _backward(r: int, dora: bool = False) -> Callable[[Make], tuple]:
    def arguments(m: Make) -> tuple:
        g, y = (m.about_one(m.d), m(m.T, m.d)) if dora else (None, None)
        return m(m.T, m.d), m(m.T, r), m(m.d, r, scale=0.3), 1.0, g, y, None, True, True, False, dora

    return arguments


def _norm(r: int) -> Callable[[Make], tuple]:
    return lambda m: (m(m.d, m.k, scale=m.k**-0.5), m.wide(r, m.k, scale=m.k**-0.5), m.wide(m.d, r, scale=0.3), 1.0)


def _cached(m: Make) -> tuple:
    norm, stamp = m.wide(m.d), torch.zeros(2, dtype=torch.int64, device=m.device)
    return norm, stamp, *_norm(16)(m), False


def _magnitude(vanishing: int) -> Callable[[Make], tuple]:
    def arguments(m: Make) -> tuple:
        W, B, g = m(m.d, m.k, scale=m.k**-0.5), m(m.d, 16, scale=0.3), m.about_one(m.d)
        g[:vanishing] = 0
        return m.wide(m.d), m(m.T, m.d), m(m.T, m.k), m(m.T, 16), W, B, 1.0, g, m.about_one(m.d), None

    return arguments


def _spmm(m: Make) -> tuple:
    offsets, columns = m.pattern()
    return m(m.T, m.d), m(m.T, m.k), m.wide(len(columns)), offsets, columns, None


def _sddmm(m: Make) -> tuple:
    return m(m.T, m.d), m(m.T, m.k), *m.pattern()


CASES = (
    Case("column_norm", "r 16", _norm(16), tokens=False),
    Case("column_norm", "r 64", _norm(64), tokens=False),
    Case("column_norm_cached_", "r 16, unchanged", _cached, tokens=False,
         least=lambda args: sum(4 * t.numel() for t in args[3:5])),
    Case("magnitude_grad", "none vanishes", _magnitude(0)),
    Case("magnitude_grad", "a column vanishes", _magnitude(1),
         least=lambda args: args[2].numel() * 2 + args[1].shape[0] * 32),
    Case("lowrank_backward", "r 16", _backward(16)),
    Case("lowrank_backward", "r 16 with y and gdy", _backward(16, dora=True)),
    Case("lowrank_backward", "r 64", _backward(64)),
    Case("lowrank_backward", "r 128", _backward(128)),
    Case("lowrank_backward", "r 64 with y and gdy", _backward(64, dora=True)),
    Case("lowrank_update_", "r 16", lambda m: (m(m.T, m.d), m(m.T, 16), m(m.d, 16, scale=0.3), 1.0, None, None)),
    Case("lowrank_update_", "r 64", lambda m: (m(m.T, m.d), m(m.T, 64), m(m.d, 64, scale=0.3), 1.0, None, None)),
    Case("block_sum", "r 64", lambda m: (m(m.T, m.d), 64, None, None, 0.0)),
    Case("block_tile_", "r 64", lambda m: (m(m.T, m.d), m(m.T, 64), None, None, 0.0, True)),
    Case("bat_weight_", "r 64", lambda m: (m(m.d, m.k), m(m.d, m.k, scale=m.k**-0.5),
                                           m.wide(m.d // 64, 64, 64, scale=0.01), False, False), tokens=False),
    Case("bat_contract_", "r 64", lambda m: (m.wide(m.d // 64, 64, 64), m(m.d, m.k, scale=m.k**-0.5), m.wide(m.d, m.k)),
         tokens=False),
    Case("csr_spmm_", "0.6 %", _spmm),
    Case("csr_sddmm", "0.6 %", _sddmm),
)  # fmt: skip


def _segments(m: Make) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the rows, and where each adapter's begin."""
    ends = torch.arange(ADAPTERS + 1, device=m.device) * m.T // ADAPTERS
    return torch.arange(m.T, device=m.device), ends


def _experts(operator: str, sixteenths: int) -> Case:
    """Over rows sorted by expert, of so many sixteenths of k; lora_B is packed as PEFT packs it."""

    def arguments(m: Make) -> tuple:
        S, width = 4 * m.T, m.k * sixteenths // 16
        offsets = (torch.arange(EXPERTS + 1, device=m.device) * S // EXPERTS).to(torch.int32)
        rows, u, B = m(S, width), m(S, 16), m(width, 16, EXPERTS).permute(2, 0, 1)
        return {"segment_project": (rows, m(EXPERTS, 16, width), None, offsets),
                "segment_lift_": (rows, u, B, None, offsets),
                "segment_outer": (u, rows, None, offsets)}[operator]  # fmt: skip

    return Case(operator, f"r 16, {EXPERTS} experts, {256 * sixteenths} wide", arguments, tokens=False)


def _routing(m: Make) -> tuple:
    """y, weights, places and offsets of T / 2 tokens with eight experts each."""
    T, width = m.T // 2, m.k // 2
    offsets = torch.tensor([0, 8 * T], dtype=torch.int32, device=m.device)
    return m(8 * T, width), m.wide(T, 8), torch.randperm(8 * T, device=m.device).view(T, 8), offsets


def _dropout(operator: str, r: int) -> Case:
    def arguments(m: Make) -> tuple:
        x, A, u, seed = m(m.T, m.d), m(r, m.d), m(m.T, r), m.integers(1, 2**62)
        return {"dropout_project": (x, A, seed, 0.1), "dropout_outer": (u, x, seed, 0.1),
                "dropout_lift_": (x, u, A, seed, 0.1)}[operator]  # fmt: skip

    return Case(operator, f"r {r}", arguments)


def _matmul(r: int) -> Case:
    return Case("lowrank_matmul", f"r {r}", lambda m: (m(m.T, m.k), m(m.d, m.k), m(m.T, r), m(m.d, r), 1.0, None, None))


def _matmuls() -> tuple[Case, ...]:
    """A layer's products with their updates: LoRA's y and dx, whose factors are transposed views; DoRA's, Bone's y."""
    name = "lowrank_matmul"
    return (
        _matmul(16),
        _matmul(64),
        Case(name, "r 16, dx", lambda m: (m(m.T, m.d), m(m.d, m.k).t(), m(m.T, 16), m(16, m.k).t(), 1.0, None, None)),
        Case(name, "r 16, g and bias", lambda m: (m(m.T, m.k), m(m.d, m.k), m(m.T, 16), m(m.d, 16), 0.5,
                                                  m.about_one(m.d), m(m.d))),
        Case(name, "r 64, D", lambda m: (m(m.T, m.k), m(m.d, m.k), m(m.T, 64), m(64, m.d).t(), 1.0, None, None)),
    )  # fmt: skip


def _csr(operator: str) -> Case:
    def arguments(m: Make) -> tuple:
        offsets, columns = m.pattern()
        W, values = m(m.d, m.k), m.wide(len(columns))
        return {"csr_scatter_": (W, values, offsets, columns, True),
                "csr_gather_": (values, W, offsets, columns)}[operator]  # fmt: skip

    return Case(operator, "0.6 %", arguments, tokens=False)


def _layers(m: Make) -> tuple:
    params = [t for _ in range(16) for t in (m(16, m.k), m(m.d, 16), m(16, 1))]
    n = sum(t.numel() for t in params)
    return m.wide(n), m.wide(n), params, params, [], 0.85, 0.85, True


# what only Triton has a kernel of, or what the estimates of the CUDA kernels leave out
MORE = (
    *_matmuls(),
    *(_dropout(f"dropout_{name}", r) for name in ("project", "outer", "lift_") for r in (16, 64)),
    Case("seeded_dropout", "", lambda m: (m(m.T, m.d), m.integers(1, 2**62), 0.1)),
    Case("block_sum", "r 64, dropout", lambda m: (m(m.T, m.d), 64, None, m.integers(1, 2**62), 0.1)),
    Case("block_tile_", "r 64, dropout",
         lambda m: (m(m.T, m.d), m(m.T, 64), None, m.integers(1, 2**62), 0.1, True)),
    Case("bat_matmul", "r 64", lambda m: (m(32, m.k), m(m.d, m.k), m.wide(m.d // 64, 64, 64), False), tokens=False),
    Case("bat_mix", "r 64", lambda m: (m(m.T, m.k), m(m.k // 64, 64, 64))),
    Case("bat_mix_backward_", "r 64",
         lambda m: (m(m.T, m.k), m(m.T, 64), m(m.T, m.k), m(m.k // 64, 64, 64), True, True)),
    Case("segment_project", "r 16", lambda m: (m(m.T, m.k), m(ADAPTERS, 16, m.k), *_segments(m))),
    Case("segment_lift_", "r 16", lambda m: (m(m.T, m.d), m(m.T, 16), m(ADAPTERS, m.d, 16), *_segments(m))),
    Case("segment_outer", "r 16", lambda m: (m(m.T, 16), m(m.T, m.k), *_segments(m))),
    *(_experts(f"segment_{name}", wide) for wide in (8, 3) for name in ("project", "lift_", "outer")),
    Case("routing_combine", "8 experts a token, 2048 wide", _routing, tokens=False),
    Case("routing_combine_backward", "8 experts a token, 2048 wide",
         lambda m: (m(m.T // 2, m.k // 2), *_routing(m), True), tokens=False),
    _csr("csr_scatter_"),
    _csr("csr_gather_"),
    Case("target_logprob", "128256 logits",
         lambda m: (m(1024, 128_256), m.integers(1024, 128_256), 1.0, -100), tokens=False),
    Case("softmax_gradient_", "128256 logits",
         lambda m: (m(1024, 128_256), m.integers(1024, 128_256), m.wide(1024), m.wide(1024), 1.0, -100), tokens=False),
    Case("cayley_forward", "r 16", lambda m: (m.wide(64 * m.d // 4096, 16, 16),), tokens=False),
    Case("cayley_backward", "r 16", lambda m: (m.wide(64 * m.d // 4096, 16, 16),) * 2, tokens=False),
    Case("importance_update_", "16 layers, r 16", _layers, tokens=False),
)  # fmt: skip
