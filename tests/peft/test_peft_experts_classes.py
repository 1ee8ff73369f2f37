"""Experts of classes that nobody knows: transformers' experts interface says enough of them, or PEFT serves them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers.integrations.moe")  # transformers 5
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_tiny import pair, perturb, worst  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402
from transformers.integrations import moe  # noqa: E402

import spectral_ops  # noqa: E402

EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")


def interfaced(kind: type, implementation: str = "batched_mm", **flags) -> nn.Module:
    """Experts of a class of its own, as transformers' decorator makes them."""
    config = PretrainedConfig()
    config._experts_implementation = implementation
    return moe.use_experts_implementation(type("Experts", (kind,), {}), **flags)(config)


class Ungated(nn.Module):
    """Experts without a gate, with biases and a norm behind them: the rest of what the interface's flags can say."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn, self.post_expert_norm = 4, nn.GELU(), nn.LayerNorm(16)
        generator = torch.Generator().manual_seed(3)
        for name, *size in (("up_proj", 4, 24, 16), ("up_proj_bias", 4, 24), ("down_proj", 4, 16, 24),
                            ("down_proj_bias", 4, 16)):  # fmt: skip
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(size, generator=generator)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_without_a_gate_with_biases_and_a_norm(implementation):
    """Its biases are trained, too."""
    flags = {"has_gate": False, "has_bias": True, "has_post_expert_norm": True}
    model = nn.ModuleDict({"experts": interfaced(Ungated, implementation, **flags)})
    names = ["experts.up_proj", "experts.down_proj"]
    model = perturb(get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=names)))
    results = []
    for ours, some in enumerate(pair(model)):
        if ours:
            report = spectral_ops.accelerate(some, strict=True)
        experts = some.base_model.model["experts"]
        for n, p in experts.named_parameters():
            p.requires_grad_(p.requires_grad or n.endswith("bias"))
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(7, 16, generator=generator).requires_grad_()
        index = torch.randint(0, 4, (7, 2), generator=generator)
        out = experts(x, index, torch.rand(7, 2, generator=generator))
        out.square().sum().backward()
        trained = {n: p.grad for n, p in experts.named_parameters() if p.requires_grad}
        assert len(trained) == 7
        results.append({"out": out.detach(), "x": x.grad, **trained})
    assert worst(*results) < EXACT
    assert [row.calls for row in report.rows] == [1, 1]


class Stacks(nn.Module):
    """Experts of somebody's own: every token through the same expert."""

    def __init__(self, config=None):
        super().__init__()
        self.num_experts, self.act_fn = 3, nn.SiLU()
        generator = torch.Generator().manual_seed(3)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6, generator=generator))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, -1)
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0])


def small(experts: nn.Module, names=("gate_up_proj", "down_proj")) -> nn.Module:
    torch.manual_seed(1)
    targets = [f"experts.{name}" for name in names]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    return perturb(get_peft_model(nn.ModuleDict({"experts": experts}), config))


def routed(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    index = torch.zeros(5, 1, dtype=torch.int64)
    with torch.no_grad():
        return model.base_model.model["experts"](torch.randn(5, 8, generator=generator), index, torch.ones(5, 1))


def test_experts_of_somebodys_own():
    stock, ours = pair(small(Stacks()))
    report = spectral_ops.accelerate(ours)
    reason = "the experts are Stacks, whose forward is not that of transformers' experts interface"
    assert {(row.path, row.reason) for row in report.rows} == {("PEFT", reason)}
    assert torch.equal(routed(ours), routed(stock))


def test_an_interface_of_its_own():
    """transformers' FP8 experts have one."""

    class Other(moe.ExpertsInterface):
        _global_mapping = {"eager": None}

    rows = spectral_ops.accelerate(small(interfaced(Stacks, experts_interface=Other()))).rows
    reason = "the experts are Experts, with an interface of their own (Other)"
    assert {(row.path, row.reason) for row in rows} == {("PEFT", reason)}


def test_a_parameter_that_is_no_projection():
    experts = interfaced(Stacks)
    experts.extra = nn.Parameter(torch.ones(3, 4, 4))
    report = spectral_ops.accelerate(small(experts, ("gate_up_proj", "extra")))
    outer = next(row for row in report.rows if not row.name.endswith("base_layer"))
    assert (outer.path, outer.reason) == ("PEFT", "extra is neither gate_up_proj nor down_proj")


def test_a_single_expert():
    """PEFT takes its stack for a plain matrix; an older one's does not fit it."""
    experts = interfaced(Stacks)
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:1].detach()))
    rows = spectral_ops.accelerate(small(experts)).rows
    assert {(row.path, row.reason) for row in rows} == {("PEFT", "gate_up_proj [1, 12, 8] is not a stack of experts")}
