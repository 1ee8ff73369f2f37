"""LoRA on the stacked weights of experts (``target_parameters``): W_e + γ B_e A_e for each expert e (METHODS 1.10).

A pair is held as PEFT packs it: A [E r, k] has the expert slowest, B [d, r E] the expert fastest. [d, k] is the
parameter's slice as stored, or turned where the module says ``is_transposed``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import match_pattern
from spectral_ops.adapters.expert_layer import Update, is_llama4, of_product, replaced, run_experts, stacks, unfit
from spectral_ops.adapters.lora import LoRAConfig, start
from spectral_ops.adapters.lowrank import product
from spectral_ops.init import start as starts
from spectral_ops.init import svd_cache

SIDES = ("up", "down")  # the two projections of an expert


def named(targets: list[str], path: str, module: nn.Module) -> list[str]:
    """The parameters of ``module`` at ``path`` that target_parameters names, by PEFT's rule, in the module's order."""
    paths = {name: f"{path}.{name}" for name, p in module._parameters.items() if p is not None}
    return [name for name, key in paths.items() if any(key == t or key.endswith(f".{t}") for t in targets)]


class LoRAExperts(AdapterLinear):
    """The experts module of a mixture with LoRA adapters on one or both of its stacks.

    ``lora_up_A`` and ``lora_up_B`` hold, by adapter, the pairs of the first projection (gate_up_proj or up_proj),
    ``lora_down_A`` and ``lora_down_B`` those of the second (down_proj); an adapter has those that its config names. The
    forward is :func:`run_experts`, whatever ``experts_implementation`` says: nothing of the size of a stack is made.

    ``settings[name]`` names this module's own parameters in target_parameters, rank_pattern and alpha_pattern.
    """

    config_type = LoRAConfig
    tensor_keys = {f"lora_{side}_{m}": f"lora_{m}.weight" for side in SIDES for m in "AB"}
    initial_keys = {f"initial_{side}_{m}": f"lora_initial_{m}.weight" for side in SIDES for m in "AB"}

    def hold(self, base_layer: nn.Module) -> None:
        names = stacks(base_layer)
        if (why := unfit(base_layer, names)) is not None:
            raise TypeError(f"base_layer: got a module that cannot be run with updates, wanted experts ({why})")
        self.base_layer = base_layer
        self.transposed = False  # no layer of its own that is stored so
        self.sides = dict(zip(SIDES, names, strict=True))
        self.num_experts = self.weight.shape[0]
        self.scales: dict[str, dict[str, float]] = {}  # γ by adapter and side

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model reads from the module it put here, such as experts.num_experts
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name in base._parameters:  # its weights lack the adapter
                raise
            return getattr(base, name)

    # the stacks

    @property
    def weights(self) -> list[torch.Tensor]:
        return [getattr(self.base_layer, name) for name in self.sides.values()]

    @property
    def weight(self) -> torch.Tensor:
        """The first stack: its device and dtype are the layer's."""
        return getattr(self.base_layer, self.sides["up"])

    @property
    def bias(self) -> None:
        """None: the experts' biases never train with the adapter."""
        return None

    @property
    def is_dense(self) -> bool:
        return True

    def slices(self, side: str) -> torch.Tensor:
        """The stack of a projection as [E, d, k]; a view."""
        weight = getattr(self.base_layer, self.sides[side])
        return weight.mT if getattr(self.base_layer, "is_transposed", False) else weight

    def pair(self, side: str, name: str, kind: str = "lora") -> tuple[torch.Tensor, torch.Tensor]:
        """A [E, r, k] and B [E, d, r] of an adapter, or the pair it started from (``kind`` "initial"); views."""
        A, B = self.parameter(f"{kind}_{side}_A", name), self.parameter(f"{kind}_{side}_B", name)
        E, (d, k) = self.num_experts, (B.shape[0], A.shape[1])
        return A.reshape(E, -1, k), B.reshape(d, -1, E).permute(2, 0, 1)

    # an adapter

    def fitted(self, config: LoRAConfig, path: str) -> LoRAConfig:
        names = named(config.target_parameters or [], path, self.base_layer)
        ranks = {name: match_pattern(config.rank_pattern, f"{path}.{name}", config.r) for name in names}
        alphas = {name: match_pattern(config.alpha_pattern, f"{path}.{name}", config.lora_alpha) for name in names}
        return dataclasses.replace(config, target_parameters=names, rank_pattern=ranks, alpha_pattern=alphas)

    def _of_sides(self, settings: LoRAConfig) -> dict[str, LoRAConfig]:
        """The config of each projection that ``settings`` names."""
        chosen = settings.target_parameters or []
        return {side: settings.for_layer(name) for side, name in self.sides.items() if name in chosen}

    def tensor_shapes(self, settings, initial=False):
        shapes = {}
        for side, config in self._of_sides(settings).items():
            E, d, k = self.slices(side).shape
            if config.changes_base and config.r > min(d, k):
                config.wrong("r", config.r, f"at most {min(d, k)} (a slice [{d}, {k}] has no higher rank)")
            for kind in ("lora", "initial") if initial else ("lora",):
                shapes |= {f"{kind}_{side}_A": (config.r * E, k), f"{kind}_{side}_B": (d, config.r * E)}
        return shapes

    def indices(self, settings):
        return {}

    def suffixes(self, settings):
        """In PEFT each parameter has a wrapper of its own, the later one around the earlier."""
        outer = list(reversed(settings.target_parameters))
        return {
            key: "base_layer." * outer.index(self.sides[side]) + suffix
            for key, suffix in (self.tensor_keys | self.initial_keys).items()
            if self.sides[side := key.split("_")[1]] in outer
        }

    def held(self, name):
        suffixes = self.suffixes(self.settings[name])
        return {key: suffixes[key] for key in self.tensor_keys if name in getattr(self, key)}

    def starts(self, name):
        suffixes = self.suffixes(self.settings[name])
        return {key: suffixes[key] for key in self.initial_keys if key in suffixes}

    def admit(self, config):
        if any(getattr(self, key) for key in self.initial_keys) or (self.settings and config.changes_base):
            raise ValueError(
                f"adapter_name: got a second adapter on a layer with {self.adapter_names}, wanted a layer of its own"
                " for an initialisation that changes the base (save it as plain LoRA and load that beside others)"
            )

    def add_adapter(self, name, config, path="", **options):
        super().add_adapter(name, config, path, **options)
        self.scales[name] = {side: c.scaling for side, c in self._of_sides(self.settings[name]).items()}

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self.scales.pop(name, None)

    def reset(self, name):
        for side, config in self._of_sides(self.settings[name]).items():
            spectral = starts.parse(config.init_lora_weights)
            A, B = self.parameter(f"lora_{side}_A", name), self.parameter(f"lora_{side}_B", name)
            if spectral is None:
                start(A, B, config)
                continue
            for kind, own in (("A", A), ("B", B)):
                pair = nn.Parameter(torch.empty_like(own), requires_grad=False)
                getattr(self, f"initial_{side}_{kind}")[name] = pair
            pairs = zip(self.slices(side), *self.pair(side, name, "initial"), strict=True)
            for e, (weight, initial_A, initial_B) in enumerate(pairs):
                with _stored(f"{self.sides[side]}.{e}"):
                    factors = starts.factors(weight, config.r, config.scaling, spectral)
                initial_A.copy_(factors[0])
                initial_B.copy_(factors[1])
            A.copy_(self.parameter(f"initial_{side}_A", name))
            B.copy_(self.parameter(f"initial_{side}_B", name))

    def set_initial(self, name, *tensors):
        for (key, _), tensor in zip(self.starts(name).items(), tensors, strict=True):
            like = self.parameter(key.replace("initial", "lora"), name)
            getattr(self, key)[name] = nn.Parameter(tensor.to(like).contiguous(), requires_grad=False)

    # the forward

    def _updates(self, name: str, kind: str = "lora") -> dict[str, Update]:
        base = self._modules["base_layer"]
        scales = self.scales[name].items()
        return {self.sides[s]: (*of_product(base, *self.pair(s, name, kind)), scale) for s, scale in scales}

    def _taken(self) -> str | None:
        """The adapter that started from a part of the stacks, which they lack; at most one does, and its copies."""
        return next((name for key in self.initial_keys for name in getattr(self, key)), None)

    def _took(self, name: str) -> bool:
        return any(name in getattr(self, key) for key in self.initial_keys)

    def forward(self, *args):
        """The arguments of the experts' own forward, and its output."""
        base, name, training = self._modules["base_layer"], self.active, self.training
        if self.merged is not None:
            return base(*args)
        if not self._disabled and name in self.settings:
            updates, p = self._updates(name), self.settings[name].dropout
        elif (taken := self._taken()) is not None:
            updates, p = self._updates(taken, "initial"), 0.0
        else:
            return base(*args)
        if (why := replaced(base)) is not None:
            raise ValueError(f"base_layer: {why} after the adapter came, wanted it on the model or on this layer")
        return run_experts(base, args, updates, p, training)

    # the weights

    def _add(self, name: str, sign: int, kind: str = "lora") -> None:
        """Add an adapter's product to the stacks, or take it out: a slice at a time, in float32 and cast once."""
        for side in self.scales[name]:
            for weight, A, B in zip(self.slices(side), *self.pair(side, name, kind), strict=True):
                weight.copy_(_sum(weight, A, B, sign * self.scales[name][side]))

    @torch.no_grad()
    def commit(self, name):
        if self._took(name):
            self._add(name, -1, "initial")

    @torch.no_grad()
    def restore(self):
        if (name := self._taken()) is not None:
            self._add(name, 1, "initial")

    @torch.no_grad()
    def merges_finite(self):
        name = self.active
        return all(
            bool(torch.isfinite(_sum(weight, A, B, scale).to(weight.dtype)).all())
            for side, scale in self.scales[name].items()
            for weight, A, B in zip(self.slices(side), *self.pair(side, name), strict=True)
        )

    @torch.no_grad()
    def merge(self, *, safe=False, keep_base=False):
        if self.merged is not None or self.active not in self.settings:
            return
        if safe and not self.merges_finite():
            raise ValueError(f"adapter {self.active!r}: got non-finite merged weights, wanted finite ones (safe=True)")
        self._snapshot = {side: self.slices(side).clone() for side in self.scales[self.active]} if keep_base else None
        self._add(self.active, 1)
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self):
        if self.merged is None:
            return
        if self._snapshot is None:
            self._add(self.merged, -1)
        else:
            for side, weight in self._snapshot.items():
                self.slices(side).copy_(weight)
        self.merged = self._snapshot = None

    @torch.no_grad()
    def delta_weight(self, adapter_name: str | None = None, expert: int | None = None) -> dict[str, torch.Tensor]:
        """What a merge of the adapter (default: the active one) adds to each parameter, by its name and shaped as
        stored: the whole stack, or the slice of one expert; float32 (float64)."""
        name, found = self._known(adapter_name), {}
        for side, scale in self.scales[name].items():
            A, B = self.pair(side, name)
            A, B = (A, B) if expert is None else (A[expert], B[expert])
            delta = product(A, B, None, scale)
            found[self.sides[side]] = delta.mT if getattr(self.base_layer, "is_transposed", False) else delta
        return found

    @torch.no_grad()
    def sampled(self, count):
        values, taken = [], self._taken()
        lacking = [] if self.merged is None or self._snapshot is not None else [(self.merged, "lora", -1)]
        lacking += [] if taken is None else [(taken, "initial", 1)]
        for side in self.sides:
            weight = self.slices(side) if self._snapshot is None else self._snapshot.get(side, self.slices(side))
            E, d, k = weight.shape
            for place in torch.linspace(0, E * d * k - 1, count, dtype=torch.float64).long().tolist():
                e, row, column = place // (d * k), place // k % d, place % k
                value = weight[e, row, column].to(accumulate_dtype(weight.dtype))
                for name, kind, sign in lacking:
                    if side in self.scales[name]:
                        A, B = self.pair(side, name, kind)
                        value = _sum(value, A[e, :, [column]], B[e, [row]], sign * self.scales[name][side])
                values.append(float(value))
        return values

    # a file

    def plain_pair(self, side: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`pair` over the original stack: with the negative of what it started from beside it, if anything."""
        A, B = (t.detach() for t in self.pair(side, name))
        if not self._took(name):
            return A, B
        A0, B0 = self.pair(side, name, "initial")
        return torch.cat([A, A0], 1), torch.cat([B, -B0], 2)

    def linear_pair(self, side: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`plain_pair` of the layer x W_eᵀ that expert e is, however the stack is stored."""
        return of_product(self.base_layer, *self.plain_pair(side, name))

    def linear_size(self, side: str) -> tuple[int, int]:
        """[out_features, in_features] of that layer."""
        size = tuple(self.slices(side).shape[1:])
        return size[::-1] if is_llama4(self.base_layer) else size

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows [E, out, ...] of the first projection by what they are: gate and up, or up alone."""
        if self.sides["up"] != "gate_up_proj":
            return {"up": rows}
        if getattr(self.base_layer, "is_concatenated", True):
            return dict(zip(("gate", "up"), rows.chunk(2, 1), strict=True))
        return {"gate": rows[:, ::2], "up": rows[:, 1::2]}

    def file_tensors(self, name, plain):
        tensors, suffixes = super().file_tensors(name, plain), self.held(name)
        if self._took(name) and not plain:
            return tensors | {s: getattr(self, key)[name].detach() for key, s in self.starts(name).items()}
        for side in self.scales[name] if self._took(name) else ():
            A, B = self.plain_pair(side, name)
            tensors[suffixes[f"lora_{side}_A"]] = A.flatten(0, 1)
            tensors[suffixes[f"lora_{side}_B"]] = B.permute(1, 2, 0).flatten(1)
        return tensors

    def describe_adapter(self, name):
        each = self._of_sides(self.settings[name])
        return ", ".join(f"{self.sides[s]} r={c.r}, scaling={c.scaling:g}" for s, c in each.items())

    def extra_repr(self):
        parts = [f"num_experts={self.num_experts}"]
        parts += [f"{n}{'*' if n == self.active else ''}: {self.describe_adapter(n)}" for n in self.settings]
        return ", ".join([*parts, *([f"merged={self.merged!r}"] if self.merged else [])])


def _sum(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    return weight.to(accumulate_dtype(weight.dtype)) + product(A, B, None, scale)


def _stored(part: str):
    """Decompositions within go under a name of their own, beside the others of the layer."""
    place = svd_cache.current()
    return svd_cache.stored(place and place[0], f"{place[1] if place else ''}.{part}")
