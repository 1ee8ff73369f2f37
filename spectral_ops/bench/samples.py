"""Sample arguments for every operator: what ``check`` runs and what tests and benchmarks build on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from spectral_ops._library import accumulate_dtype

P = 0.25  # dropout probability of the samples


def arguments(
    name: str,
    T: int,
    d: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    density: float = 0.006,
) -> Iterator[tuple]:
    """Argument tuples that exercise operator ``name`` for x [T, k], W [d, k], rank r; optional arguments on and off.

    density: of the sparse operators' pattern.
    """
    generator = torch.Generator(device).manual_seed(seed)
    on = {"generator": generator, "device": device}

    def randn(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64, **on)).to(to)

    acc = accumulate_dtype(dtype)
    x, W, dy, y = randn(T, k), randn(d, k, scale=k**-0.5), randn(T, d), randn(T, d)
    A, B, h = randn(r, k, scale=k**-0.5), randn(d, r, scale=0.3), randn(T, r)
    g, bias = 1 + randn(d, scale=0.1, to=acc), randn(d)
    key = torch.randint(0, 2**62, (1,), **on)
    offsets = torch.tensor([0, *range(2, r + 1), k], dtype=torch.int32, device=device)  # uneven blocks
    norm = W.to(acc).square().sum(1).sqrt()
    vanishing = g.clone()
    vanishing[: d // 2 : 3] = 0

    d_bat, k_bat = max(d // r, 1) * r, max(k // r, 1) * r  # Bat's blocks divide both
    W_bat, x_bat, bat = randn(d_bat, k_bat, scale=k**-0.5), randn(T, k_bat), randn(d_bat // r, r, r, scale=0.1, to=acc)
    row_bat = randn(k_bat // r, r, r, scale=0.1, to=acc)
    same = torch.Generator(device).manual_seed(seed)  # for every T and r
    mask = torch.rand(d, k, generator=same, device=device) < density
    columns = mask.nonzero()[:, 1].to(torch.int32)
    row_offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    values = randn(columns.numel(), to=acc)
    order = torch.randperm(columns.numel(), **on).to(torch.int32)

    targets = torch.where(torch.arange(T) % 5 == 4, -100, torch.arange(T) * 7 % d).to(device)

    samples: dict[str, Callable[[], list[tuple]]] = {
        "block_sum": lambda: [(x, r, None, None, 0.0), (x, r, offsets, None, 0.0), (x, r, None, key, P)],
        "block_tile_": lambda: [
            (randn(T, k), h, None, None, 0.0, False),
            (randn(T, k), h, None, key, P, True),
            (randn(T, k), h, offsets, None, 0.0, True),
        ],
        "dropout_project": lambda: [(x, A, key, P)],
        "dropout_outer": lambda: [(h, x, key, P)],
        "dropout_lift_": lambda: [(randn(T, k), h, A, key, P)],
        "seeded_dropout": lambda: [(x, key, P)],
        "lowrank_matmul": lambda: [(x, W, h, B, 0.5, None, bias), (x, W, h, B, 0.5, g, None)],
        "lowrank_update_": lambda: [(randn(T, d), h, B, 0.5, g, bias.to(acc)), (randn(T, d), h, B, 0.5, None, None)],
        "lowrank_backward": lambda: [
            (dy, h, B, 0.5, None, None, None, True, True, False, False),
            (dy, h, B, 0.5, g, y, bias, True, True, True, True),
        ],
        "column_norm": lambda: [(W, A, B, 0.5), (W, A.to(acc), B.to(acc), 0.5)],
        "column_norm_cached_": lambda: [
            (torch.empty_like(norm), torch.zeros(2, dtype=torch.int64, device=device), W, A, B, 0.5, True)
        ],
        "magnitude_grad": lambda: [
            (randn(d, to=acc), dy, x, h, W, B, 0.5, magnitude, norm, None) for magnitude in (g, vanishing)
        ],
    }
    samples |= {
        "bat_weight_": lambda: [(torch.empty_like(W_bat), W_bat, bat, False, False)],
        "bat_matmul": lambda: [(x_bat[: max(r - 1, 1)], W_bat, bat, False)],
        "bat_contract_": lambda: [(torch.empty_like(bat), W_bat, randn(d_bat, k_bat))],
        "bat_mix": lambda: [(x_bat, row_bat)],
        "bat_mix_backward_": lambda: [(randn(T, k_bat), h, x_bat, row_bat, True, True)],
        "csr_scatter_": lambda: [(randn(d, k), values, row_offsets, columns, True)],
        "csr_gather_": lambda: [(torch.empty_like(values), W, row_offsets, columns)],
        "csr_spmm_": lambda: [
            (randn(T, d), x, values, row_offsets, columns, None),
            (randn(T, d), x, values, row_offsets, columns, order),
        ],
        "csr_sddmm": lambda: [(dy, x, row_offsets, columns)],
        "target_logprob": lambda: [(4 * dy, targets, 1.0, -100), (4 * dy, targets, 0.5, -100)],
        "softmax_gradient_": lambda: [(4 * dy, targets, (2 * dy.to(acc)).logsumexp(1), randn(T, to=acc), 0.5, -100)],
    }
    adapters = randn(3, r, k, scale=k**-0.5), randn(3, d, r, scale=0.3)
    places = torch.randperm(T, **on)  # a few rows of no adapter, then those of each
    groups = places, torch.tensor([T // 8, T // 3, T // 2, T], device=device)
    samples |= {
        "segment_project": lambda: [(x, adapters[0], *groups)],
        "segment_lift_": lambda: [(randn(T, d), h, adapters[1], *groups)],
        "segment_outer": lambda: [(h, x, *groups)],
    }
    layers = [randn(*size) for _ in range(2) for size in ((r, k), (d, r), (r, 1))]  # AdaLoRA: A, B and E, and gradients
    state = [torch.rand(r * (k + d + 1), dtype=torch.float64, **on).to(acc) for _ in range(2)]
    X, G = randn(2, r, r), randn(2, r, r, to=acc)
    samples |= {
        "cayley_forward": lambda: [(X,)],
        "cayley_backward": lambda: [(torch.linalg.qr(G.double())[0].to(acc), G)],
        "importance_update_": lambda: [
            (*state, layers[:3], layers[3:], [], 0.85, 0.8, True),
            (*state, layers[:3], layers[3:], [], 0.85, 0.8, False),
        ],
        "importance_prune_": lambda: [(state[0], [layers[2].flatten()], [0], min(r, 2))],
    }
    yield from samples[name]()
