"""The models that ``bench --training`` trains: Llama-shaped with random weights, a method on all seven projections.

Nothing is downloaded: a step takes as long with random weights as with trained ones.
"""

from __future__ import annotations

import copy
import functools
from types import FunctionType

import torch
from torch import nn

import spectral_ops
from spectral_ops._imports import need
from spectral_ops.bench import methods
from spectral_ops.bench.peers import FROZEN, OURS, entries, plain_rosa

METHODS = ("lora", "dora", "bone", "bat", "rosa")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {  # fields of transformers' LlamaConfig
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {  # to try the command
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def base_model(name: str, blocks: int | None, dtype: torch.dtype, device: str) -> nn.Module:
    """A frozen causal language model of ``name``'s dimensions with ``blocks`` blocks (None: as many as it has)."""
    transformers = need("transformers", "a model to measure", "'spectral_ops[bench]'")
    fields = MODELS[name] | {"use_cache": False, "initializer_range": MODELS[name]["hidden_size"] ** -0.5}
    if blocks is not None:
        fields["num_hidden_layers"] = blocks
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**fields), dtype=dtype)
    return model.requires_grad_(False).train()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def checkpoint(model: nn.Module) -> None:
    """Recompute every block in the backward pass."""
    new = getattr(model, "activation_checkpointing_enable", None)  # what transformers 5 calls it
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_blocks(model: nn.Module, name: str, backend: str = "inductor", **options) -> None:
    """Compile every block, with ``options`` of torch.compile; blocks share what is compiled, models do not.

    Dynamo keeps what it has compiled, and where it has given up, with the code object: each model gets one of its own.
    """

    def call(block, *args, **kwargs):
        return type(block).forward(block, *args, **kwargs)

    own = FunctionType(call.__code__.replace(co_name=f"block_of_{name.replace(' ', '_')}"), globals())
    compiled = torch.compile(own, backend=backend, **options)
    for block in blocks_of(model):
        block.forward = functools.partial(compiled, block)


class PlainRoSA(nn.Module):
    """A layer of RoSA under plain autograd."""

    def __init__(self, linear: nn.Linear, config: spectral_ops.RoSAConfig):
        super().__init__()
        d, k = linear.weight.shape
        S, device = methods.even_pattern(d, k, config.d), linear.weight.device
        self.linear, self.scale, self.index = linear, config.scaling, tuple(t.to(device) for t in entries(S))
        sizes = {"A": (config.r, k), "B": (d, config.r), "values": (S.nnz,)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, device=device)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return plain_rosa(x, self.linear.weight, self.index, self.values, self.A, self.B, self.scale)


def _plain_rosa(model: nn.Module, config: spectral_ops.RoSAConfig) -> nn.Module:
    for block in blocks_of(model):
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in PROJECTIONS:
                    setattr(part, name, PlainRoSA(linear, config))
    return model


def _native_rosa(model: nn.Module, config: spectral_ops.RoSAConfig) -> nn.Module:
    spectral_ops.attach(model, config, progress=False)
    for layer in spectral_ops.adapter_layers(model).values():
        S = methods.even_pattern(layer.out_features, layer.in_features, config.d)
        layer.set_mask((S.row_offsets.to(layer.weight.device), S.col_indices.to(layer.weight.device)))
    return model


def _peft(model: nn.Module, config: spectral_ops.AdapterConfig) -> nn.Module:
    peft = need("peft", "a model to compare with", "'spectral_ops[bench]'")
    return peft.get_peft_model(model, config.to_peft())


def sharing_copy(model: nn.Module, own: list[str] = ()) -> nn.Module:
    """A copy over the same weights, besides those of the modules named in ``own``."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return copy.deepcopy(model, {id(t): t for name, t in tensors if not set(own) & set(name.split("."))})


def peer_of(method: str) -> str:
    """Whom spectral_ops is compared with: PEFT, or plain autograd where PEFT lacks the method."""
    return "autograd" if method == "rosa" else "peft"


def contenders(method: str, base: nn.Module, rank: int) -> dict[str, nn.Module]:
    """The frozen model, the method's peer and ours: over one set of weights, with the same values in their parameters.

    RoSA's S may rest in the weights between calls, so ours has its own copy of those it adapts.
    """
    config = methods.METHODS[method].build(r=rank, target_modules=PROJECTIONS)
    torch.manual_seed(0)
    if method == "rosa":
        peer, ours = _plain_rosa(sharing_copy(base), config), _native_rosa(sharing_copy(base, PROJECTIONS), config)
    else:
        peer, ours = (_peft(sharing_copy(base), config) for _ in range(2))
        spectral_ops.accelerate(ours, strict=True)
    generator = torch.Generator(base.device).manual_seed(1)
    with torch.no_grad():
        for p, q in zip(trained(peer), trained(ours), strict=True):  # at zero some would keep others' gradients at zero
            p.add_(0.02 * torch.randn(p.shape, generator=generator, device=p.device))
            q.copy_(p)
    return {name: m.train() for name, m in {FROZEN: sharing_copy(base), peer_of(method): peer, OURS: ours}.items()}
