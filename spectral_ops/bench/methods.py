"""What is measured and counted: every method of the package in its usual configuration, and the sizes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import spectral_ops
from spectral_ops import adapters
from spectral_ops.adapters.methods import layer_type
from spectral_ops.adapters.svft import banded

RANK, BLOCK, DENSITY = 16, 64, 0.006
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# [out, in] of a block's seven projections, and how many have that size
BLOCKS: dict[str, dict[tuple[int, int], int]] = {
    "smollm2": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "llama3-8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
    "llama3-70b": {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1},
}


def sizes(names: list[str], custom: tuple[int, int]) -> list[tuple[int, int]]:
    """The distinct [out, in] of the named blocks, in order; the name "custom" stands for ``custom``."""
    found = [size for name in names for size in ([custom] if name == "custom" else BLOCKS[name])]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Method:
    """A method: the class of its config in spectral_ops.adapters, and the fields that make its usual configuration."""

    config: str
    fields: dict

    def build(self, **fields) -> adapters.AdapterConfig:
        """The config, with ``fields`` added or replaced."""
        return getattr(adapters, self.config)(**{**self.fields, **fields})


def _low_rank(config: str, **fields) -> Method:
    return Method(config, {"r": RANK, "lora_alpha": 2 * RANK, **fields})


METHODS: dict[str, Method] = {
    "lora": _low_rank("LoRAConfig"),
    "rslora": _low_rank("LoRAConfig", use_rslora=True),
    "pissa": _low_rank("LoRAConfig", init_lora_weights="pissa_niter_4"),
    "milora": _low_rank("LoRAConfig", init_lora_weights="milora"),
    "dora": _low_rank("DoRAConfig"),
    "bone": Method("BoneConfig", {"r": BLOCK}),
    "mini": Method("BoneConfig", {"r": BLOCK, "init_weights": "mini", "mini_r": BLOCK}),
    "bat": Method("BatConfig", {"r": BLOCK}),
    "bat_row": Method("BatConfig", {"r": BLOCK, "mode": "row"}),
    "rosa": _low_rank("RoSAConfig", d=DENSITY),
    "dash": _low_rank("LoRADashConfig"),
    "pica": Method("PiCaConfig", {"r": RANK, "niter": 4}),
    "spectral": Method("SpectralConfig", {"r": RANK}),
    "adalora": Method("AdaLoRAConfig", {"init_r": RANK, "lora_alpha": 2 * RANK, "total_step": 1000}),
    "adalora_dash": Method("AdaLoRADashConfig", {"init_r": RANK, "lora_alpha": 2 * RANK, "total_step": 1000}),
    "spectral_rotation": Method("SpectralConfig", {"r": RANK, "mode": "rotation"}),
    "vera": Method("VeRAConfig", {"r": 256}),
    "dvora": Method("DVoRAConfig", {"r": 256}),
    "svft": Method("SVFTConfig", {"off_diag": 2}),
}


def even_pattern(d: int, k: int, density: float = DENSITY) -> spectral_ops.CSR:
    """A pattern with int(density d k) entries, spread evenly over the rows, with values that train."""
    nnz = int(density * d * k)
    offsets = torch.arange(d + 1, dtype=torch.int64) * nnz // d
    rows = torch.repeat_interleave(torch.arange(d), offsets.diff())
    place = torch.arange(nnz) - offsets[rows]
    columns = place * k // offsets.diff()[rows]
    values = nn.Parameter(torch.zeros(nnz))
    csr = spectral_ops.CSR(values, offsets.to(torch.int32), columns.to(torch.int32), (d, k))
    csr.validate()
    return csr


def pattern_of(name: str, d: int, k: int, **fields) -> spectral_ops.CSR | None:
    """The pattern of a method that trains sparse values, away from its layer: what makes one reads the values of
    tensors, which fake ones do not have."""
    if name == "rosa":
        return even_pattern(d, k)
    if name == "svft":
        return band(METHODS[name].build(**fields), d, k)
    return None


def band(config: adapters.SVFTConfig, d: int, k: int) -> spectral_ops.CSR:
    """SVFT's banded M [m, m], with values that train."""
    m = config.span(d, k)
    places = banded(m, config.off_diag)
    offsets = torch.searchsorted(places // m, torch.arange(m + 1)).to(torch.int32)
    values = nn.Parameter(torch.zeros(len(places)))
    return spectral_ops.CSR(values, offsets, (places % m).to(torch.int32), (m, m)).validate()


def layer(
    name: str,
    linear: nn.Linear,
    pattern: spectral_ops.CSR | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    **fields,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.Tensor]]:
    """Method ``name`` over ``linear``: its forward, and the parameters it trains.

    ``pattern``: RoSA's, which a fresh RoSALinear does not have yet, or SVFT's, see :func:`pattern_of`.
    """
    config = METHODS[name].build(**fields)
    if name == "svft" and pattern is not None:
        (d, k), m = linear.weight.shape, pattern.shape[0]
        U, Vh = (torch.empty(size, device=linear.weight.device) for size in ((d, m), (m, k)))
        return (lambda x: spectral_ops.svft_linear(x, linear.weight, U, Vh, pattern, linear.bias)), [pattern.values]
    adapted = layer_type(config).from_linear(linear, config, autocast_adapter_dtype=autocast_adapter_dtype)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    if pattern is None or not isinstance(adapted, adapters.RoSALinear):
        return adapted, parameters
    A, B = adapted.lora_A["default"], adapted.lora_B["default"]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return spectral_ops.rosa_linear(x, linear.weight, pattern, A, B, linear.bias, scale=config.scaling)

    return forward, [A, B, pattern.values]
