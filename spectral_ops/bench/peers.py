"""One layer in several implementations, on the same weight and parameter values: ours, and what it is measured beside.

Ours is the native adapter layer. Its peers: PEFT's layer (accelerated, as it is, and compiled), the method's formula
under plain autograd, and other packages' LoRA kernels where they are installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import spectral_ops
from spectral_ops import adapters
from spectral_ops.adapters.dora import MagnitudeLinear
from spectral_ops.bench import methods

METHODS = {  # every method, and its usual rank or block size
    name: method.fields.get("init_r", method.fields.get("r")) for name, method in methods.METHODS.items()
}
USUAL = ("lora", "dora", "bone", "bat", "rosa")
FROZEN, OURS = "frozen", "spectral_ops"
PEFT = ("lora", "rslora", "pissa", "milora", "dora", "bone", "mini", "bat", "adalora", "vera")  # those that PEFT has
EXTERNAL = {"unsloth": ("lora", "rslora"), "axolotl": ("lora", "rslora", "dora")}  # whose kernels take these methods
LYCORIS = ("lora", "rslora")  # its DoRA is another: the norm is part of the gradient
PACKAGES = {
    "peft": "peft", "unsloth": "unsloth", "axolotl": "axolotl", "LyCORIS": "lycoris", "Liger": "liger_kernel",
    "spops": "spops",
}  # fmt: skip
RANKS = {"mini": ("r", "mini_r"), "adalora": ("init_r", "target_r"), "adalora_dash": ("init_r", "target_r")}  # or r
# initialisations that decompose W are not what is timed: the step of the plain ones is the same
FIELDS: dict[str, dict] = {
    "pissa": {"init_lora_weights": True},
    "milora": {"init_lora_weights": True},
    "spectral": {"niter": 1},
    "spectral_rotation": {"niter": 1},
    "pica": {"niter": 1},
}


def missing() -> list[str]:
    """The packages with peers that are not installed."""
    return [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]


@dataclass
class Layer:
    """A layer to time: its forward, and the parameters it trains, in one order for all implementations of a method."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]


def pattern(d: int, k: int, device: torch.device) -> spectral_ops.CSR:
    """A random mask of RoSA's usual density."""
    generator = torch.Generator(device).manual_seed(2)
    return spectral_ops.CSR.from_dense(torch.rand(d, k, generator=generator, device=device) < methods.DENSITY)


class Subject:
    """A method over a weight [d, k], its parameters in ``dtype`` (float32, or the weight's) away from their start."""

    def __init__(self, method: str, weight: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32):
        self.method, self.weight = method, weight
        fields = FIELDS.get(method, {}) | dict.fromkeys(RANKS.get(method, ("r",)), rank)
        self.config = methods.METHODS[method].build(**fields)
        self.autocast = dtype == torch.float32
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self.csr = None
        if method == "rosa":
            csr = pattern(*weight.shape, weight.device)
            self.csr = csr.with_values(csr.values.detach().to(dtype).requires_grad_())
        forward, self.parameters = methods.layer(
            method, linear, self.csr, autocast_adapter_dtype=self.autocast, **fields
        )
        self.ours = Layer(forward, self.parameters)
        self.adapted = forward if isinstance(forward, nn.Module) else None
        generator = torch.Generator(weight.device).manual_seed(1)
        for p in (*self.parameters, *self._zeros()):
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
            p.data.add_((0.02 * noise).to(p.dtype))

    def _zeros(self) -> Iterator[nn.Parameter]:
        """Frozen parameters that a later step of training would fill (LoRA-Dash's directions)."""
        named = [] if self.adapted is None else self.adapted.named_parameters()
        yield from (p for n, p in named if not n.startswith("base_layer") and not p.requires_grad and not p.any())

    def formula(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The method's formula (docs/METHODS.md) as one would write it, in x's dtype and weight's."""
        layer, name = self.adapted, "default"
        if self.csr is not None:
            A, B, values = self.parameters
            return plain_rosa(x, weight, entries(self.csr), values, A, B, self.config.scaling)
        if isinstance(layer, adapters.BatLinear):
            return F.linear(x, (weight + layer.change(weight, name)).to(x.dtype))
        if isinstance(layer, adapters.BoneLinear):
            D = layer.miss_block[name].to(x.dtype)
            h = F.pad(x, (0, -x.shape[-1] % len(D))).unflatten(-1, (-1, len(D))).sum(-2)
            return F.linear(x, weight) + (h @ D).repeat(1, len(weight) // D.shape[1])
        if isinstance(layer, adapters.SVFTLinear):
            csr = layer.csr(name)
            M = csr.values.new_zeros(csr.shape).index_put(entries(csr), csr.values)
            return F.linear(x, weight) + _low_rank(x, layer.svft_Vh[name], layer.svft_U[name], M.t())
        A, B, core = layer.factors(name)
        scale = layer.scale(name)
        y = F.linear(x, weight) + scale * _low_rank(x, A, B, core)
        if isinstance(layer, MagnitudeLinear):
            with torch.no_grad():
                B = B if core is None else B * core
                norm = torch.linalg.vector_norm(weight + scale * (B.to(weight.dtype) @ A.to(weight.dtype)), dim=1)
            y = (layer.magnitude(name).to(y.dtype) / norm) * y
        return y

    def plain(self) -> Layer:
        """The formula under plain autograd."""
        return Layer(lambda x: self.formula(x, self.weight), self.parameters)

    def _peft_model(self):
        import peft

        config = dataclasses.replace(self.config, target_modules=["0"]).to_peft()
        base = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=self.autocast)
        model.train()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        keys = [n.split(".")[0] for n, p in self.adapted.named_parameters() if p.requires_grad]
        parameters = [next(p for n, p in named.items() if key in n) for key in keys]
        for p, ours in zip(parameters, self.parameters, strict=True):
            p.data.copy_(ours.data)
        return model, parameters

    def peft(self, fused: bool = False, compiled: bool = False) -> Layer:
        """PEFT's layer as it is, accelerated, or compiled."""
        model, parameters = self._peft_model()
        if fused:
            spectral_ops.accelerate(model, strict=True)
        forward = model.base_model.model
        if compiled:
            torch._dynamo.reset()  # else the ninth shape would run eagerly
            forward = torch.compile(forward, dynamic=False)
        return Layer(forward, parameters)

    def external(self, package: str) -> Layer:
        """PEFT's parameters under the kernels of unsloth or axolotl, which take [batch, length, k]."""
        modules = {"unsloth": "unsloth.kernels.fast_lora", "axolotl": "axolotl.kernels.lora"}
        apply = importlib.import_module(modules[package]).apply_lora_o
        model, parameters = self._peft_model()
        holder = SimpleNamespace(o_proj=model.base_model.model[0], training=True)
        return Layer(lambda x: apply(holder, x.unsqueeze(0)).squeeze(0), parameters)

    def lycoris(self) -> Layer:
        """LyCORIS's Triton kernels for the low-rank term, its factors in x's dtype as its own module has them."""
        locon = importlib.import_module("lycoris.functional.locon")
        if "backend" not in inspect.signature(locon.bypass_forward_diff).parameters:
            raise RuntimeError("lycoris-lora is older than 4.0, which has no kernels")
        backend = "triton" if self.weight.is_cuda else "torch"
        A, B = self.parameters
        scale = self.adapted.scale("default")

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.weight)
            down, up = A.to(x.dtype), B.to(x.dtype)
            return y + locon.bypass_forward_diff(x, y, down, up, None, gamma=scale, backend=backend)

        return Layer(forward, self.parameters)

    def peers(self, compiled: bool = False) -> dict[str, Callable[[], Layer]]:
        """A builder for each peer that this machine has of the method."""
        absent = missing()
        found: dict[str, Callable[[], Layer]] = {}
        if self.method in PEFT and "peft" not in absent:
            found["PEFT accelerated"] = lambda: self.peft(fused=True)
            found["PEFT"] = self.peft
            if compiled:
                found["PEFT compiled"] = lambda: self.peft(compiled=True)
            for package, methods in EXTERNAL.items():
                if self.method in methods and package not in absent and self.weight.is_cuda:
                    found[package] = lambda package=package: self.external(package)
        if self.method in LYCORIS and "LyCORIS" not in absent and self.weight.is_cuda:
            found["LyCORIS"] = self.lycoris
        return found | {"autograd": self.plain}


def entries(csr: spectral_ops.CSR) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every entry, int64 [nnz]."""
    rows = torch.arange(csr.shape[0], device=csr.row_offsets.device)
    return torch.repeat_interleave(rows, csr.row_offsets.diff().long()), csr.col_indices.long()


def plain_rosa(x, weight, index, values, A, B, scale: float) -> torch.Tensor:
    """RoSA as plain autograd has it: a copy of W with S scattered into it, and a dense gradient for S."""
    total = weight.clone().index_put(index, values.to(weight.dtype), accumulate=True)
    return F.linear(x, total) + scale * _low_rank(x, A, B)


def _low_rank(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, core: torch.Tensor | None = None) -> torch.Tensor:
    h = F.linear(x, A.to(x.dtype))
    if core is not None:
        h = h * core.to(x.dtype) if core.dim() == 1 else h @ core.to(x.dtype)
    return F.linear(h, B.to(x.dtype))
