"""LoRA+'s parameter groups, beside PEFT's."""

import pytest
import torch
from torch import nn

import spectral_ops
from spectral_ops import LoRAConfig, lora_plus_groups


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.norm(self.embed(ids)))))


def named(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, g["weight_decay"], g["lr"]) for g in groups if g["params"]]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_groups_are_pefts(use_dora, accelerated):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    targets = ["up", "down"] if version < (0, 21) else ["embed", "up", "down"]  # earlier ones miss embeddings
    fields = {"target_modules": targets, "bias": "all", "modules_to_save": ["norm"], "use_dora": use_dora}
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=2, **fields))
    if accelerated:
        spectral_ops.accelerate(model)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5
    )
    ours = lora_plus_groups(model, 16, lr=3e-4, weight_decay=0.1, embedding_lr=1e-5)
    assert len(ours) == len(targets) + 1 and named(model, ours) == named(model, theirs.param_groups)
    assert ours[0].keys() == {"params", "weight_decay", "lr"}


def test_of_an_adapter_of_ours_in_an_optimizer():
    model = Small()
    spectral_ops.attach(model, LoRAConfig(r=2, target_modules=["up", "down"], bias="lora_only"))
    groups = lora_plus_groups(model, 4.0, lr=0.5, weight_decay=0.25)
    found = named(model, groups)
    assert [rate for _, _, rate in found] == [0.5, 2.0, 2.0] and [decay for _, decay, _ in found] == [0.25, 0.25, 0.0]
    assert all("lora_A" in name for name in found[0][0]) and all("lora_B" in name for name in found[1][0])
    assert all(name.endswith("bias") for name in found[2][0]) and [len(names) for names, *_ in found] == [2, 2, 1]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(groups, lr=99.0)
    model(torch.arange(11)).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = 0.5 if "lora_A" in name else 2.0
            decay = 0.0 if name.endswith("bias") else 0.25
            torch.testing.assert_close(p, before[name] - rate * (gradients[name] + decay * before[name]))


def test_no_normalisation_layer_decays():
    model = Small()
    model.norm = nn.RMSNorm(8)
    spectral_ops.attach(model, LoRAConfig(r=2, target_modules=["up"], modules_to_save=["norm"]))
    *_, (names, decay, _) = named(model, lora_plus_groups(model, 2, lr=1.0, weight_decay=0.5))
    assert decay == 0.0 and len(names) == 1 and "norm" in next(iter(names))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio: got 0, wanted a number above 0"),
        ({"ratio": "16"}, TypeError, "ratio: got '16'"),
        ({"lr": -1.0}, ValueError, "lr: got -1.0, wanted a number above 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: got -0.1, wanted a number at least 0"),
        ({"embedding_lr": float("nan")}, ValueError, "embedding_lr: got nan"),
        ({"model": Small()}, ValueError, "model: got no trained lora_B"),
        ({"model": [nn.Linear(2, 2)]}, TypeError, "model: got .*list.*wanted a torch.nn.Module"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    model = spectral_ops.attach(Small(), LoRAConfig(r=2, target_modules=["up"]))
    options = {"model": model, "ratio": 16, "lr": 1e-3, **change}
    with pytest.raises(error, match=message):
        lora_plus_groups(options.pop("model"), options.pop("ratio"), **options)
