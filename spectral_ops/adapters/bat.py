"""Bat: y = x W'ᵀ + b, W'(o,j) = W(o,j)(I + B_o) + B_o by r x r block (METHODS 1.4, 2; arXiv:2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.functional import bat, bat_weight

ROW = "BAT_ROW"  # peft_type of a row file: PEFT knows no such method, so that it cannot take it for its own


@dataclass
class BatConfig(AdapterConfig):
    """Bat under the field names of PEFT's MissConfig(init_weights="bat"); see :class:`AdapterConfig` for the others.

    r: size of a block; divides in_features and out_features. mode: "col" is PEFT's, with one block of B per r outputs;
    "row" has one per r inputs and needs no W' (PEFT cannot read its files). exact: over a bf16/fp16 base, keep W' - W
    in float32 instead of rounding W' (see :func:`bat_linear`). There is no dropout: PEFT applies none here either.
    """

    r: int = 64
    mode: str = "col"
    exact: bool = False

    peft_type: ClassVar[str] = "MISS"
    peft_flags: ClassVar[dict[str, Any]] = {"init_weights": "bat"}
    peft_idle: ClassVar[dict[str, str]] = {
        **AdapterConfig.peft_idle,
        "miss_dropout": "PEFT applies none to Bat",
        "mini_r": 'only beside init_weights="mini"',
    }
    ours_only: ClassVar[dict[str, str]] = {
        "mode": f'a file of mode "row" is of the type {ROW}',
        "exact": "written where it is on; PEFT leaves it out and rounds W'",
    }
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "MiSS_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("col", "row"):
            self.wrong("mode", self.mode, '"col" or "row"')
        if not isinstance(self.exact, bool):
            self.wrong("exact", self.exact, "True or False")

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        return super().claims(fields) or fields.get("peft_type") == ROW

    def peft_fields(self) -> dict[str, Any]:
        fields = super().peft_fields()
        if self.mode == "row":
            return {**fields, "peft_type": ROW}
        del fields["mode"]
        if not self.exact:
            del fields["exact"]
        return fields


class BatLinear(AdapterLinear):
    """A linear layer with Bat adapters: ``miss_block`` B [d/r, r, r] (mode "row": [k/r, r, r]) per adapter."""

    config_type = BatConfig
    tensor_keys = {"miss_block": "miss_block"}

    @classmethod
    def shapes(cls, config, d, k):
        if d % config.r or k % config.r:
            config.wrong("r", config.r, f"a divisor of out_features ({d}) and in_features ({k})")
        return {"miss_block": ((k if config.mode == "row" else d) // config.r, config.r, config.r)}

    def admit(self, config):
        self.dense_matrix("Bat's W'")

    def reset(self, name):
        nn.init.zeros_(self.miss_block[name])

    def adapted(self, x, name):
        return self.fused(x, self._linear, self._update, name)

    def _linear(self, x, weight, bias, name):
        config = self.settings[name]
        return bat.linear(x, weight, self.parameter("miss_block", name), bias, config.mode == "row", config.exact)

    def _update(self, out, x, name):
        return out + F.linear(x.to(out.dtype), self.change(self.matrix, name).to(out.dtype))

    def change(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """W' - W [d, k] in at least float32, differentiable in both."""
        B, acc = self.miss_block[name], accumulate_dtype(weight.dtype)
        W, B = self._by_block(weight.to(acc), name), B.to(acc)
        return self._by_rows(torch.einsum("nabc,nce->nabe", W, B) + self._spread(B, name), name)

    def _by_block(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """weight [d, k] as [n, ., ., r]: row vectors which block n of B multiplies from the right."""
        (d, k), config = weight.shape, self.settings[name]
        blocks = weight.reshape(d // config.r, config.r, k // config.r, config.r)
        return blocks.permute(2, 0, 1, 3) if config.mode == "row" else blocks

    def _by_rows(self, blocks: torch.Tensor, name: str) -> torch.Tensor:
        """The inverse of :meth:`_by_block`."""
        row = self.settings[name].mode == "row"
        return (blocks.permute(1, 2, 0, 3) if row else blocks).reshape(self.out_features, self.in_features)

    def _spread(self, B: torch.Tensor, name: str) -> torch.Tensor:
        """B [n, r, r] as it is added to [n, ., ., r]."""
        return B.unsqueeze(1 if self.settings[name].mode == "row" else 2)

    def delta(self, name):
        self.dense_matrix("delta_weight")
        return self.change(self.unmerged(), name)

    def merged_weight(self, weight, name):
        return bat_weight(weight, self.miss_block[name].detach(), mode=self.settings[name].mode), ()

    def check_undo(self, name):
        self._invertible(name)

    def unmerged_weight(self, weight, name):
        factor, B = self._invertible(name)
        rest = self._by_block(weight, name) - self._spread(B, name)
        return self._by_rows(torch.linalg.solve(factor, rest.flatten(1, 2), left=False).view_as(rest), name)

    @torch.no_grad()
    def _invertible(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """I + B and B [n, r, r] in at least float32; ValueError where a block has no inverse in that precision."""
        B = self.miss_block[name].detach()
        B = B.to(accumulate_dtype(B.dtype))
        factor = B + torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
        inverse, info = torch.linalg.inv_ex(factor)
        condition = torch.linalg.matrix_norm(factor, 1) * torch.linalg.matrix_norm(inverse, 1)
        limit = 1 / (B.shape[-1] * torch.finfo(B.dtype).eps)
        singular = ((info != 0) | ~(condition < limit)).nonzero().flatten().tolist()  # ~(<): NaN is singular too
        if singular:
            shown = ", ".join(map(str, singular[:3])) + (", …" if len(singular) > 3 else "")
            raise ValueError(
                f"miss_block[{name!r}]: got a singular I + B in block {shown} of {len(B)}, wanted invertible blocks (no"
                " arithmetic unmerges these; merge(keep_base=True) keeps a copy of the weight instead)"
            )
        return factor, B
