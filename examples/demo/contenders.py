"""The two runs that the demo compares: a method's peer and spectral_ops, from the same weights, seed and data."""

import torch
from peft import PeftModel

import spectral_ops

from . import rosa, training

OURS = "spectral_ops"
METHODS = (*training.METHODS, "rosa")
DENSITY = 0.006  # of RoSA's mask


def peer_of(method: str) -> str:
    """Whom spectral_ops is compared with: PEFT, or plain PyTorch where PEFT lacks the method."""
    return "plain" if method == "rosa" else "peft"


def contenders(options, load_base):
    return (Rosa if options.method == "rosa" else Peft)(options, load_base)


def alone(options, base, name: str):
    """The model of one run as training has it, for what does not depend on its weights."""
    if options.method == "rosa":
        model = rosa_model(options, base, name)
        masked_at_random(model, options.seed)
        return model
    model = training.add_adapter(base, options.method, options.seed, plain_init=True)
    if name == OURS:
        spectral_ops.accelerate(model)
    return model


class Peft:
    """One PeftModel as it is and after `accelerate`: switched in place, the parameters stay."""

    def __init__(self, options, load_base):
        self.model, self.report = training.add_adapter(load_base(), options.method, options.seed), None
        self.initial = training.snapshot(self.model)

    def enter(self, name: str):
        """The model as run ``name`` has it."""
        if name == OURS:
            self.report = spectral_ops.accelerate(self.model)
            return self.model
        return spectral_ops.restore(self.model)

    def start(self, name: str):
        """The same with its initial weights, and what to call after every optimizer step."""
        training.rewind(self.model, self.initial)
        return self.enter(name), None

    def save(self, path, initial=None) -> None:
        """Save as PEFT does; PiSSA's adapter as a LoRA of twice the rank, which any base model can load."""
        conversion = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
        self.model.save_pretrained(path, **conversion)

    def reload(self, base, path):
        """The saved adapter on a fresh base model, without spectral_ops."""
        return PeftModel.from_pretrained(base, path)

    def __str__(self) -> str:
        return str(self.report)


class Rosa:
    """RoSALinear, and the same mathematics in plain PyTorch: two models. Each finds its mask in the run that trains."""

    def __init__(self, options, load_base):
        self.plain = rosa_model(options, load_base(), "plain")
        self.model = rosa_model(options, load_base(), OURS)
        self.phases = rosa_phases(options.steps)
        for plain, ours in self.pairs():
            plain.lora_A.data.copy_(ours.lora_A["default"])

    def pairs(self):
        return zip(rosa.layers(self.plain), spectral_ops.adapter_layers(self.model).values(), strict=True)

    def enter(self, name: str):
        return self.model if name == OURS else self.plain

    def start(self, name: str):
        if name == OURS:
            return self.model, spectral_ops.RoSASchedule(self.model).step
        return self.plain, rosa.Schedule(self.plain, *self.phases).step

    def save(self, path, initial=None) -> None:
        spectral_ops.save_adapter(self.model, path)

    def reload(self, base, path):
        """The saved adapter on a fresh base model."""
        return spectral_ops.load_adapter(base, path)

    @staticmethod
    def places(layer) -> torch.Tensor:
        """Where the mask of a RoSALinear has its entries, in the flattened weight."""
        S = layer.csr()
        rows = torch.repeat_interleave(torch.arange(S.shape[0], device=S.device), S.row_offsets.diff().long())
        return rows * S.shape[1] + S.col_indices

    def __str__(self) -> str:
        """How far the two masks are the same: rounding decides between almost equal gradients."""
        both = entries = 0
        for plain, ours in self.pairs():
            both += torch.isin(self.places(ours), plain.index).sum().item()
            entries += len(plain.index)
        warmup, batches = self.phases
        return (
            f"LoRA alone for {warmup} steps, gradients for the masks from the next {batches}, then LoRA and S\n"
            f"{entries:,} entries in the masks, {both / entries:.3%} of them chosen by both runs"
        )


def rosa_phases(steps: int) -> tuple[int, int]:
    """Steps of LoRA alone, and batches that choose the mask, of a run of ``steps``."""
    return steps // 4, 2 if steps >= 8 else 1


def rosa_model(options, base, name: str):
    """A frozen model with RoSA on its projections, without masks yet."""
    torch.manual_seed(options.seed)
    if name != OURS:
        return rosa.attach(base, training.PROJECTIONS, r=16, scale=2.0, density=DENSITY)
    warmup, batches = rosa_phases(options.steps)
    common = {"r": 16, "lora_alpha": 32, "target_modules": training.PROJECTIONS}
    config = spectral_ops.RoSAConfig(d=DENSITY, schedule=f"wl{warmup}", spa_num_grads=batches, **common)
    return spectral_ops.attach(base, config)


def masked_at_random(model, seed: int) -> None:
    """A mask for every layer, as many entries as it would have."""
    generator = torch.Generator().manual_seed(seed)
    for plain in rosa.layers(model):
        count = plain.base_layer.weight.numel()
        plain.index = torch.randperm(count, generator=generator)[: plain.values.numel()].to(plain.values.device)
    for ours in spectral_ops.adapter_layers(model).values():
        mask = torch.zeros(ours.out_features * ours.in_features, dtype=torch.bool)
        mask[torch.randperm(mask.numel(), generator=generator)[: ours.rosa_values["default"].numel()]] = True
        ours.set_mask(mask.view(ours.out_features, -1).to(ours.rosa_values["default"].device))
