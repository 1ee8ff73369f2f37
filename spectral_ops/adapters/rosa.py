"""RoSA: y = x (W + S)ᵀ + γ drop(x) Aᵀ Bᵀ + b, S sparse (METHODS 1.5, 2; arXiv:2401.04679).

S takes no part until it has a mask, which :class:`~spectral_ops.adapters.rosa_schedule.RoSASchedule` finds from
gradients, or :meth:`RoSALinear.set_mask` is given. Its values exist from the start, so that an optimizer has them.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters import lowrank
from spectral_ops.adapters.config import check_pattern, match_pattern
from spectral_ops.adapters.frozen import why_not_dense
from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.core import checks, steps
from spectral_ops.core.autograd import autocast_arguments
from spectral_ops.functional import CSR, csr_add, residents, rosa, rosa_routes, rosa_update

RESIDENT = "_spectral_ops_resident"  # of a base layer whose weight may hold W + S: what a compiler can see of it
ACCUMULATION = ("mean_squared", "mean")
SCHEDULES = '"default", "wlN" (N steps of LoRA alone first), "spa_only" or "lora_only"'


@dataclass
class RoSAConfig(LoRAConfig):
    """RoSA under the field names of its authors' RosaConfig; see :class:`LoRAConfig` for those of its low-rank part.

    d: density, the share of a weight that S holds: int(d * out_features * in_features) entries. density_pattern:
    another d for the layers whose path ends with a match of the key. schedule: "default" (the mask first, then S and
    LoRA together), "wlN" (N optimizer steps of LoRA alone before it), "spa_only" (no LoRA), "lora_only" (no S).
    spa_num_grads: how many batches the mask is chosen from. grad_acc_mode: by the mean of their squared gradients
    ("mean_squared") or the size of their mean ("mean"). mask_save_path, mask_load_path: a safetensors file the mask is
    written to, or read from instead. terminate_after_mask_generation: end the process once the mask is saved, to start
    again with mask_load_path. route: how S takes part, see ``rosa_linear``; "auto" may also choose "resident" where
    nothing but the layer reads its weight: an unshared parameter of an attached model in one process, not compiled.
    """

    d: float = 0.003
    density_pattern: dict[str, float] = field(default_factory=dict)
    schedule: str = "default"
    spa_num_grads: int = 1
    grad_acc_mode: str = "mean_squared"
    mask_load_path: str | None = None
    mask_save_path: str | None = None
    terminate_after_mask_generation: bool = False
    route: str = "auto"

    peft_type: ClassVar[str] = "ROSA"
    peft_flags: ClassVar[dict[str, Any]] = {}
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "rosa_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.changes_base:
            self.wrong("init_lora_weights", self.init_lora_weights, 'True, False or "gaussian" (S belongs to all of W)')
        check_pattern(self, "density_pattern")
        for key, density in {"": self.d, **self.density_pattern}.items():
            name = f"{self._field('density_pattern')}[{key!r}]" if key else self._field("d")
            checks.number(name, density)
            if not 0 <= density <= 1:
                raise ValueError(f"{name}: got {density!r}, wanted a density in [0, 1]")
        if not isinstance(self.schedule, str) or (
            self.schedule not in ("default", "spa_only", "lora_only") and not re.fullmatch(r"wl\d+", self.schedule)
        ):
            self.wrong("schedule", self.schedule, SCHEDULES)
        if self.grad_acc_mode not in ACCUMULATION:
            self.wrong("grad_acc_mode", self.grad_acc_mode, f"one of {', '.join(map(repr, ACCUMULATION))}")
        if self.route not in ("auto", *rosa_routes.ROUTES):
            self.wrong("route", self.route, f"one of {', '.join(map(repr, ('auto', *rosa_routes.ROUTES)))}")
        checks.integer(self._field("spa_num_grads"), self.spa_num_grads, 1, None, "batches")
        if self.mask_load_path and (self.mask_save_path or self.terminate_after_mask_generation):
            self.wrong("mask_load_path", self.mask_load_path, "None where a mask is to be generated")
        if self.terminate_after_mask_generation and not self.mask_save_path:
            self.wrong("mask_save_path", None, "a file, as terminate_after_mask_generation leaves nothing else")

    @property
    def low_rank(self) -> bool:
        """Whether there is a low-rank part."""
        return self.schedule != "spa_only"

    @property
    def sparse(self) -> bool:
        """Whether there is a sparse part."""
        return self.schedule != "lora_only"

    @property
    def warmup(self) -> int:
        """Optimizer steps before the gradients of the mask are collected."""
        return int(self.schedule[2:]) if self.schedule.startswith("wl") else 0

    def nnz(self, d: int, k: int) -> int:
        """How many entries S has on a layer [d, k]."""
        return int(self.d * d * k)

    def for_layer(self, path: str) -> RoSAConfig:
        config, density = super().for_layer(path), match_pattern(self.density_pattern, path, self.d)
        return config if density == self.d else dataclasses.replace(config, d=density)

    def for_file(self, plain: bool) -> RoSAConfig:
        """The file holds the mask: where it came from says nothing more."""
        off = {"mask_load_path": None, "mask_save_path": None, "terminate_after_mask_generation": False}
        return dataclasses.replace(self, **off)


class RoSALinear(LoRALinear):
    """A linear layer with RoSA adapters: LoRA's ``lora_A`` [r, k] and ``lora_B`` [d, r], and S [d, k] in CSR.

    ``rosa_values`` [nnz] trains. ``rosa_row_offsets`` [d + 1] and ``rosa_col_indices`` [nnz] are int32 buffers, all
    zero while there is no mask.

    Under route "resident" the base weight may hold W + S between calls. :meth:`release` puts W back. ``weight``,
    ``matrix``, state_dict(), .to(), copies, pickles, saving, merging, disabling, switching adapters and detaching call
    it. ``base_layer.weight`` does not. Compiled code takes another route. Before you compile a layer that ran eagerly,
    call :meth:`release`: else putting W back breaks the first graph, and checkpointed blocks stay eager.
    """

    config_type = RoSAConfig
    tensor_keys = {**LoRALinear.tensor_keys, "rosa_values": "rosa_values"}
    index_keys = {"rosa_row_offsets": "rosa_row_offsets", "rosa_col_indices": "rosa_col_indices"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.sharing: list[str] | None = None  # who else holds the weight; None: nobody has looked
        self.collectors: dict[str, Any] = {}  # adapter -> what is told of dy and x while a mask is looked for
        self._csr: dict[str, tuple[torch.Tensor, int, CSR | None]] = {}
        self._chosen: tuple[int, str] | None = None  # optimizer step, and the route "auto" took in it

    # tensors

    @classmethod
    def shapes(cls, config, d, k):
        shapes = super().shapes(config, d, k) if config.low_rank else {}
        return shapes | ({"rosa_values": (config.nnz(d, k),)} if config.sparse else {})

    @classmethod
    def index_shapes(cls, config, d, k):
        return {"rosa_row_offsets": (d + 1,), "rosa_col_indices": (config.nnz(d, k),)} if config.sparse else {}

    @classmethod
    def check_tensors(cls, config, d, k, tensors):
        if config.sparse:
            _sparse(*(tensors[key] for key in ("rosa_values", "rosa_row_offsets", "rosa_col_indices")), (d, k))

    def placed(self, name, sharing):
        self.sharing = sharing
        if sharing and self.settings[name].route == "resident":
            raise ValueError(
                f'route: got "resident" on a weight that {", ".join(map(repr, sharing))} also reads, wanted a weight of'
                ' its own ("auto", "scatter" and "spmm" leave it alone)'
            )

    def reset(self, name):
        if self.settings[name].low_rank:
            super().reset(name)
        if self.settings[name].sparse:
            nn.init.zeros_(self.rosa_values[name])

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self._csr.pop(name, None)
        self.collectors.pop(name, None)

    def csr(self, adapter_name: str | None = None) -> CSR | None:
        """S of an adapter (default: the active one) over its parameter; None while it has no mask."""
        return self._checked_csr(self._known(adapter_name))

    def _checked_csr(self, name: str) -> CSR | None:
        if name not in self.rosa_values:
            return None
        values, offsets = self.rosa_values[name], self.rosa_row_offsets[name]
        known = self._csr.get(name)
        if known is None or known[0] is not offsets or not (_compiling() or known[1] == offsets._version):
            index = (offsets, self.rosa_col_indices[name])
            csr = _sparse(values, *index, (self.out_features, self.in_features))
            known = self._csr[name] = (offsets, offsets._version, csr)
        csr = known[2]
        return csr if csr is None or csr.values is values else csr.with_values(values)  # a parameter FSDP put in place

    @torch.no_grad()
    def set_mask(self, mask, adapter_name: str | None = None) -> None:
        """Let S of an adapter (default: the active one) take part at the places of ``mask``, its values at zero.

        mask: bool [d, k], or the pattern (row_offsets int32 [d + 1], col_indices int32 [nnz]); with as many entries as
        the density gives. Raises TypeError/ValueError/IndexError and changes nothing otherwise.
        """
        name = self._known(adapter_name)
        if name not in self.rosa_values:
            raise ValueError(f"adapter_name: got {name!r}, which has no sparse part, wanted another schedule for it")
        values, shape = self.rosa_values[name], (self.out_features, self.in_features)
        if isinstance(mask, torch.Tensor):
            if mask.dtype != torch.bool or mask.shape != shape:
                raise ValueError(f"mask: got {checks.describe(mask)}, wanted bool {list(shape)}")
            with torch.inference_mode(False):  # a CSR watches the versions of its indices
                csr = CSR.from_dense(mask)
        else:
            with torch.inference_mode(False):
                row_offsets, col_indices = (index.clone() for index in mask)
            zeros = torch.zeros(col_indices.shape, device=col_indices.device)
            csr = CSR(zeros, row_offsets, col_indices, shape).validate()
        if csr.nnz != values.numel():
            raise ValueError(
                f"mask: got {csr.nnz} entries, wanted {values.numel()} (density {self.settings[name].d:g} of {shape})"
            )
        self.release()
        values.zero_()
        self.rosa_row_offsets[name].copy_(csr.row_offsets)
        self.rosa_col_indices[name].copy_(csr.col_indices)
        self._checked_csr(name)

    # the base weight

    @property
    def stored(self) -> torch.Tensor:
        """The base weight [d, k] as it is in memory, which may be W + S."""
        weight = self.base_layer.weight
        return weight.t() if self.transposed else weight

    @property
    def weight(self):
        self.release()
        return self.base_layer.weight

    def release(self):
        """Put W back, bit for bit, where the base weight holds W + S, be it of another layer over the same weight."""
        if not _compiling():
            self._restore_weight()
        elif getattr(self.base_layer, RESIDENT, False):
            torch.compiler.disable(self._restore_weight)()

    def _restore_weight(self) -> None:
        if _plain(self.base_layer.weight):  # any other never held a delta, and may have no memory to look it up by
            residents.restore(self.base_layer.weight)
        if getattr(self.base_layer, RESIDENT, False):
            delattr(self.base_layer, RESIDENT)

    def restore(self):
        self.release()
        super().restore()

    def may_reside(self, name: str) -> bool:
        """Whether the base weight may hold W + S of this adapter between calls."""
        route = self.settings[name].route
        return route == "resident" or (route == "auto" and self.sharing == [] and self._why_not_resident() is None)

    def _why_not_resident(self) -> str | None:
        weight = self.base_layer.weight
        if _compiling():
            return "in compiled code"
        if not _plain(weight):
            return f"over a {type(weight).__name__}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "in a process group, where a weight may be sharded"
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return "in a CUDA graph"
        return None

    def _route(self, x: torch.Tensor, csr: CSR, name: str) -> str:
        """The route of this call, for x as autocast has cast it."""
        route, casts = self.settings[name].route, x.dtype is not self.base_layer.weight.dtype
        if route == "resident" and (why_not := self._why_not_resident()):
            raise ValueError(f'route: got "resident" {why_not}, wanted "auto", "scatter" or "spmm"')
        if route != "auto":
            return route
        T, step = x.numel() // max(x.shape[-1], 1), steps.current()
        if casts or not self.may_reside(name):
            return rosa_routes.forward_route(T, *csr.shape, csr.nnz, x.device.type, x.dtype)
        graph = self.training or torch.is_grad_enabled()
        if graph and self._chosen is not None and self._chosen[0] == step:
            return self._chosen[1]  # a weight saved by one route must not be written by another before its backward
        route = rosa_routes.forward_route(T, *csr.shape, csr.nnz, x.device.type, x.dtype, resident=True)
        if graph:
            steps.watch()
            self._chosen = (step, route)
        return route

    # the layer

    def adapted(self, x, name):
        y = self._output(x, name)
        collector = self.collectors.get(name)
        if collector is None or not torch.is_grad_enabled():
            return y
        return (torch.compiler.disable(collector) if _compiling() else collector)(y, x, self.rosa_values[name])

    def _output(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config, base, csr = self.settings[name], self.base_layer, self._checked_csr(name)
        A, B, _ = self.factors(name) if config.low_rank else (None, None, None)
        if A is None and csr is None:
            self.release()
            return self.product(x)
        route = None
        if csr is not None and why_not_dense(base) is None:
            (x,) = autocast_arguments(x)
            route = self._route(x, csr, name)
        if route == "resident" and x.dtype is base.weight.dtype:
            setattr(base, RESIDENT, True)
        else:
            self.release()  # before autocast casts W, where it does
        p = config.dropout if self.training and A is not None else 0.0
        return self.fused(x, _linear, _update, csr, route, A, B, config.scaling, p)

    def original(self, x):
        """The layer's output without adapters. A graph keeps a copy of W: W + S may be back before its backward."""
        base = self.base_layer
        graph = torch.is_grad_enabled() and (x.requires_grad or (base.bias is not None and base.bias.requires_grad))
        if graph and not _compiling() and why_not_dense(base) is None and any(map(self.may_reside, self.settings)):
            return F.linear(x, residents.original(self.stored), base.bias)
        self.release()
        return self.product(x)

    # merging

    def delta(self, name):
        like = getattr(self, next(iter(self.held(name))))[name]
        wide, device = accumulate_dtype(like.dtype), self.weight.device
        return self._with_delta(torch.zeros(self.out_features, self.in_features, dtype=wide, device=device), name, 1)

    def merged_weight(self, weight, name):
        return self._with_delta(weight, name, 1), ()

    def unmerged_weight(self, weight, name):
        return self._with_delta(weight, name, -1)

    def _with_delta(self, weight: torch.Tensor, name: str, sign: int) -> torch.Tensor:
        """weight + sign (γBA + S), in weight's dtype, at least float32."""
        if self.settings[name].low_rank:
            weight = weight + sign * super().delta(name)
        csr = self._checked_csr(name)
        return weight if csr is None else csr_add(weight, csr.with_values(sign * csr.values.detach()))

    # copies and files: none may hold W + S

    def _apply(self, fn, recurse=True):
        self.release()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.release()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        self.release()
        return {**self.__dict__, "_csr": {}, "collectors": {}, "_chosen": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        for name in self.rosa_values:
            self._checked_csr(name)

    def describe_adapter(self, name):
        config, parts = self.settings[name], []
        if config.low_rank:
            parts.append(super().describe_adapter(name))
        if config.sparse:
            masked = "" if self._checked_csr(name) is not None else ", no mask yet"
            parts.append(f"density={config.d:g}, nnz={self.rosa_values[name].numel()}, route={config.route}{masked}")
        return ", ".join(parts)


def _linear(x, weight, bias, csr: CSR | None, route: str | None, A, B, scale, p):
    if csr is None:
        return lowrank.fused_linear(x, weight, bias, A, B, None, scale, p)
    return rosa.linear(x, weight, csr.ordered(csr.values), csr.pattern, A, B, bias, scale, p, route)


def _update(out, x, csr: CSR | None, route: str | None, A, B, scale, p):
    if A is not None:
        out = lowrank.fused_update(out, x, A, B, None, scale, p)
    return out if csr is None else rosa_update(out, x, csr)


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _plain(weight: torch.Tensor) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor)


def _sparse(values, row_offsets, col_indices, shape) -> CSR | None:
    """The checked CSR of these tensors, or None where they say that there is no mask: every offset is zero."""
    if not values.numel() or values.device.type == "meta":
        return None
    with torch.no_grad():
        if not row_offsets.any() and not col_indices.any():
            return None
    return CSR(values, row_offsets, col_indices, shape).validate()
