"""Parameters, gradients and state of AdaLoRA's layers, and arguments for its operators, which take lists of tensors."""

import torch
from tensors import accumulate, laid_out

OPS = ["importance_update_", "importance_prune_"]
# rank, in_features, out_features: odd sizes, rank one, a rank past the lanes, past what is folded, past a tile of sums
SIZES = [(5, 21, 34), (1, 7, 3), (12, 64, 40), (16, 33, 19), (70, 40, 90), (1030, 3, 5)]


def make(dtype=torch.float32, sizes=SIZES, layout="contiguous"):
    """Parameters and gradients of some layers, and a state past its start."""

    def triple(r, k, d):
        A, B, E = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((r, k), (d, r), (r, 1)))
        return laid_out(A, layout), laid_out(B, layout), E

    params, grads = ([triple(*size) for size in sizes] for _ in range(2))
    n = sum(p.numel() for layer in params for p in layer)
    wide = accumulate(dtype)
    return params, grads, torch.rand(n).to(wide), torch.rand(n).to(wide)


def samples(dtype=torch.float32):
    params, grads, *state = make(dtype, SIZES[:3])
    flat, given = ([t for layer in layers for t in layer] for layers in (params, grads))
    scores = torch.rand(sum(size[0] for size in SIZES[:3])).to(state[0])
    return {
        "importance_update_": [(*state, flat, given, [], 0.85, 0.7, True), (*state, flat, given, [], 0.85, 0.7, False)],
        "importance_prune_": [(scores, flat[2::3], [0, 5, 6], 4), (scores, flat[2::3], [0, 5, 6], 0)],
    }
