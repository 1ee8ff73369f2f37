"""A small training run of every method with the installed package, compiled kernels against the reference.

`deploy/matrix.py` runs it in each environment. It needs torch and spectral_ops alone:

    python -I deploy/train_step.py [--methods lora dora] [--dtypes float32] [--steps 3] [--json]

Each method is attached to a small model of random weights and trained for a few steps of AdamW, once with what the
package chooses and once with its reference. The losses of both must agree within ``BOUNDS`` and must have moved. Exit
status 1 where one does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import math

import torch
from torch import nn

import spectral_ops
from spectral_ops import _loader
from spectral_ops.bench.methods import DTYPES, METHODS

WIDTH, HIDDEN, WORDS, TOKENS = 96, 160, 50, 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3}  # of a loss, relative


class Block(nn.Module):
    """Attention and an MLP, without norms."""

    def __init__(self) -> None:
        super().__init__()
        for name in PROJECTIONS[:4]:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down_proj(nn.functional.silu(self.up_proj(x)))


def configured(name: str) -> spectral_ops.AdapterConfig:
    """The method's usual configuration at this model's size."""
    small = {"r": 16} if "r" in METHODS[name].fields else {"init_r": 16, "target_r": 8}
    small |= {"mini_r": 16} if name == "mini" else {}
    return METHODS[name].build(target_modules=PROJECTIONS, **small)


def train(base: nn.Module, name: str, steps: int) -> list[float]:
    """The loss of every step."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    spectral_ops.attach(model, configured(name), progress=False)
    for layer in spectral_ops.adapter_layers(model).values():
        if isinstance(layer, spectral_ops.RoSALinear):  # which has no sparse part before it has a mask
            mask = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool)
            mask[torch.randperm(len(mask))[: layer.rosa_values["default"].numel()]] = True
            layer.set_mask(mask.view(layer.out_features, layer.in_features))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    words = torch.randint(WORDS, (2, TOKENS + 1))
    losses = []
    for _ in range(steps):
        logits = model(words[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(name: str, dtype: str, steps: int) -> dict:
    """Both runs of a method; ``failed`` says what is wrong, or is None."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.Linear(WIDTH, WORDS)).to(DTYPES[dtype])
    base.requires_grad_(False)
    row = {"method": name, "dtype": dtype, "failed": None}
    try:
        row["chosen"] = train(base, name, steps)
        with spectral_ops.use_backend("reference"):
            row["reference"] = train(base, name, steps)
    except Exception as error:  # one method that fails must not hide the others
        return {**row, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    ours, reference = row["chosen"], row["reference"]
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    row["difference"] = max(apart) if all(map(math.isfinite, apart)) else math.nan  # max would skip a NaN
    if not row["difference"] <= BOUNDS[dtype]:
        row["failed"] = f"loss is {row['difference']:.1e} from the reference's, wanted at most {BOUNDS[dtype]:g}"
    elif ours[-1] == ours[0]:
        row["failed"] = f"loss is {ours[0]:.4f} before and after {steps} steps, wanted it to move"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(name, dtype, options.steps) for dtype in options.dtypes for name in options.methods]
    extensions = {
        each.module.rpartition(".")[2]: {"operators": len(each.operators), "error": each.error}
        for each in _loader.EXTENSIONS.values()
    }
    if options.json:
        found = {"package": spectral_ops.__file__, "torch": torch.__version__, "cuda": torch.version.cuda}
        print(json.dumps({**found, "extensions": extensions, "rows": rows}))
    else:
        for name, each in extensions.items():
            print(f"{name}: {each['error'] or str(each['operators']) + ' operators'}")
        for row in rows:
            told = row["failed"] or f"{row['chosen'][0]:.4f} → {row['chosen'][-1]:.4f}, {row['difference']:.0e} apart"
            print(f"{'RED' if row['failed'] else 'ok ':3} {row['method']:18} {row['dtype']:9} {told}")
    return any(row["failed"] for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
