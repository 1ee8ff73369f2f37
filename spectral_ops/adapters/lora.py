"""LoRA, rsLoRA, PiSSA, MiLoRA and OLoRA: y = x Wᵀ + γ drop(x) Aᵀ Bᵀ + b (METHODS 1.1, 2).

LoRA: arXiv:2106.09685, γ = α/r. rsLoRA: arXiv:2312.03732, γ = α/√r. PiSSA, MiLoRA and OLoRA start A and B from a part
of W, which the base gives up. They keep the starting pair: the base gets it back, and a file can be plain LoRA.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from spectral_ops.adapters.config import TokensConfig, check_pattern, match_pattern
from spectral_ops.adapters.lowrank import LowRankLinear
from spectral_ops.core import checks
from spectral_ops.functional import segmented_lowrank_linear, segmented_lowrank_update
from spectral_ops.init import start as starts

ABSENT = {  # fields of PEFT's LoraConfig that change the numbers, and what they do
    "alora_invocation_tokens": "adapts the tokens after an invocation only",
    "arrow_config": "routes between adapters",
    "kasa_config": "cuts singular values out of the base weight",
    "layer_replication": "repeats layers of the model",
    "lora_bias": "adds a bias to B",
    "megatron_config": "adapts Megatron's parallel layers",
    "monteclora_config": "samples the weights",
    "target_parameters": "adapts parameters that are no layer's weight, such as experts",
    "use_bdlora": "makes A or B block-diagonal",
    "use_qalora": "pools the inputs of a quantised layer",
    "velora_config": "compresses what A's gradient is computed from",
}


@dataclass
class LoRAConfig(TokensConfig):
    """LoRA under PEFT's field names; see :class:`AdapterConfig` and :class:`TokensConfig` for the common ones.

    lora_alpha, use_rslora: γ = α/r, or α/√r. lora_dropout: on the adapter branch. init_lora_weights: True (A Kaiming,
    B zero), False (both Kaiming), "gaussian" (A normal), "pissa", "pissa_niter_N", "milora" or "milora_" with min, mid,
    max or random, or "olora" (W = Q R). rank_pattern, alpha_pattern: another r or α for the layers whose path ends with
    a match of the key.
    target_parameters: names that end the path of a stacked weight [experts, out, in] of a mixture's experts, such as
    "experts.gate_up_proj"; each expert gets a pair of its own. exclude_modules and layers_to_transform leave it alone,
    and target_modules=[] leaves every other layer out. PEFT has no dropout there, and no
    start from W.
    """

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] | None = None

    peft_type: ClassVar[str] = "LORA"
    peft_flags: ClassVar[dict[str, Any]] = {"use_dora": False}
    peft_idle: ClassVar[dict[str, str]] = {
        **TokensConfig.peft_idle,
        "corda_config": "says how A and B started",
        "eva_config": "says how A and B started",
        "fan_in_fan_out": "every layer says that itself",
        "loftq_config": "says how A and B started",
        "lora_ga_config": "says how A and B started",
        "megatron_core": "only beside megatron_config",
        "qalora_group_size": "only beside use_qalora",
        "runtime_config": "PEFT never writes it",
    }
    peft_refused: ClassVar[dict[str, str]] = {
        name: what for name, what in ABSENT.items() if name != "target_parameters"
    }
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.probability(self._field("lora_dropout"), self.lora_dropout)
        for name in ("rank_pattern", "alpha_pattern"):
            check_pattern(self, name)
        for key, r in self.rank_pattern.items():
            checks.integer(f"{self._field('rank_pattern')}[{key!r}]", r, 1, None, "rank")
        for key, alpha in {"": self.lora_alpha, **self.alpha_pattern}.items():
            name = f"{self._field('alpha_pattern')}[{key!r}]" if key else self._field("lora_alpha")
            checks.number(name, alpha)
            if alpha <= 0:
                raise ValueError(f"{name}: got {alpha!r}, wanted a positive number")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            if starts.parse(self.init_lora_weights) is None:
                self.wrong("init_lora_weights", self.init_lora_weights, f'True, False, "gaussian", {starts.NAMES}')

        self._check_names("target_parameters")
        if isinstance(self.target_parameters, str):
            self.wrong("target_parameters", self.target_parameters, "a list of names of parameters")
        if self.target_parameters and type(self) is not LoRAConfig:
            self.wrong("target_parameters", self.target_parameters, "None: only LoRAConfig adapts parameters")

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def changes_base(self) -> bool:
        return starts.parse(self.init_lora_weights) is not None

    @property
    def scaling(self) -> float:
        """γ."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_layer(self, path: str) -> LoRAConfig:
        r = match_pattern(self.rank_pattern, path, self.r)
        alpha = match_pattern(self.alpha_pattern, path, self.lora_alpha)
        return self if (r, alpha) == (self.r, self.lora_alpha) else dataclasses.replace(self, r=r, lora_alpha=alpha)

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LoRAConfig:
        init = fields.get("init_lora_weights", True)
        if init in ("eva", "orthogonal", "mica"):  # where A and B started; the base is untouched
            fields = {**fields, "init_lora_weights": True}
        elif init in ("corda", "loftq", "lora_ga"):
            raise ValueError(
                f"init_lora_weights: got {init!r}, which changed the base weights, wanted a file converted to plain"
                " LoRA (PEFT's save_pretrained does that with path_initial_model_for_weight_conversion)"
            )
        return super().from_peft(fields)

    def for_file(self, plain: bool) -> LoRAConfig:
        """Plain, a spectral adapter is A' = [A; A₀], B' = [B, -B₀]: rank 2r, and α such that γ stays what it is; and
        there is no dropout beside target_parameters, as PEFT refuses to load that."""
        if plain and self.target_parameters and self.lora_dropout:
            warnings.warn(
                f"lora_dropout: {self.lora_dropout} is written as 0, as PEFT has none on target_parameters"
                " (plain=False keeps it)",
                stacklevel=3,
            )
            return dataclasses.replace(self, lora_dropout=0.0).for_file(plain)
        if not (plain and self.changes_base):
            return self
        growth = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=growth * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: growth * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )


def start(A: torch.Tensor, B: torch.Tensor, config: LoRAConfig) -> None:
    """Fill a pair as an initialisation says that leaves the base alone."""
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if config.init_lora_weights is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


class LoRALinear(LowRankLinear):
    """A linear layer with LoRA adapters: ``lora_A`` [r, k] and ``lora_B`` [d, r] per adapter."""

    config_type = LoRAConfig
    tensor_keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    initial_keys = {"initial_A": "lora_initial_A.weight", "initial_B": "lora_initial_B.weight"}
    mixed: tuple[tuple[str, ...], torch.Tensor] | None = None  # adapters and ids of rows: see adapters/segments.py
    was_mixed = False  # a block of segments() with gradients has ended, and no forward has run since

    @classmethod
    def shapes(cls, config, d, k):
        if config.changes_base and config.r > min(d, k):
            config.wrong("r", config.r, f"at most {min(d, k)} (a weight [{d}, {k}] has no higher rank)")
        return {"lora_A": (config.r, k), "lora_B": (d, config.r)}

    def admit(self, config):
        if config.changes_base:
            self.readable(config.init_lora_weights)
        if self.initial_A or (self.settings and config.changes_base):
            raise ValueError(
                f"adapter_name: got a second adapter on a layer with {self.adapter_names}, wanted a layer of its own"
                " for an initialisation that changes the base (save it as plain LoRA and load that beside others)"
            )

    def reset(self, name):
        A, B, config = self.lora_A[name], self.lora_B[name], self.settings[name]
        if init := starts.parse(config.init_lora_weights):
            weight = self.decomposable(config.init_lora_weights)
            self.set_initial(name, *starts.factors(weight, config.r, config.scaling, init))
            A.copy_(self.initial_A[name])
            B.copy_(self.initial_B[name])
            return
        start(A, B, config)

    @classmethod
    def initial_shapes(cls, config, d, k):
        return {"initial_A": (config.r, k), "initial_B": (d, config.r)}

    def set_initial(self, name, A, B):
        """Record the pair that adapter ``name`` starts from."""
        like = self.lora_A[name]
        self.initial_A[name] = nn.Parameter(A.to(like).contiguous(), requires_grad=False)
        self.initial_B[name] = nn.Parameter(B.to(like).contiguous(), requires_grad=False)

    def factors(self, name):
        return self.parameter("lora_A", name), self.parameter("lora_B", name), None

    def scale(self, name):
        return self.settings[name].scaling

    def taken(self):
        for name in self.initial_A:
            return self.initial_A[name], self.initial_B[name], None, self.scale(name)
        return None

    def forward(self, x):
        if self.mixed is not None and not self._disabled:
            return self.segmented(x, *self.mixed)
        if not torch.compiler.is_compiling() and self.was_mixed:
            if torch._C._current_graph_task_id() != -1:  # a backward pass runs
                raise RuntimeError(
                    "segments: a checkpointed forward is computed again after its block has ended; run backward inside"
                    " `with segments(...)`, or checkpoint what its `bind` returns"
                )
            self.was_mixed = False
        return super().forward(x)

    def segmented(self, x, names, ids):
        """The output where each row has the adapter of ``names`` that its id says, or none."""
        if not names:
            return self.product(x)
        configs = [self.settings[name] for name in names]
        adapters = [self.lora_A[name] for name in names], [self.lora_B[name] for name in names], ids
        options = {
            "scales": [config.scaling for config in configs],
            "dropout_p": configs[0].dropout,
            "training": self.training,
        }

        def linear(x, weight, bias):
            return segmented_lowrank_linear(x, weight, *adapters, bias, **options)

        def update(out, x):
            return segmented_lowrank_update(out, x, *adapters, **options)

        return self.fused(x, linear, update)

    def file_tensors(self, name, plain):
        tensors = super().file_tensors(name, plain)
        if name in self.initial_A and not plain:
            return tensors | {suffix: getattr(self, key)[name].detach() for key, suffix in self.initial_keys.items()}
        if name in self.initial_A:
            A, B = self.tensor_keys["lora_A"], self.tensor_keys["lora_B"]
            tensors[A] = torch.cat([tensors[A], self.initial_A[name]])
            tensors[B] = torch.cat([tensors[B], -self.initial_B[name]], 1)
        return tensors

    def describe_adapter(self, name):
        return f"r={self.settings[name].r}, scaling={self.settings[name].scaling:g}"
