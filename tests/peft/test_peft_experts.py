"""LoRA on the experts of transformers 5 (``target_parameters``): PEFT's numbers for every family, made without a stack.

Each family is held to PEFT under each of transformers' implementations, which differ in how they sum.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers.integrations.moe")  # transformers 5
pytest.importorskip("peft")

from experts_tiny import (  # noqa: E402
    FAMILIES,
    INTERFACE,
    STACKS,
    adapted_mixture,
    experts_config,
    experts_of,
    mixture,
    with_second,
)
from instruments import Recorder, saved_tensors  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_tiny import ATTENTION, logits_and_gradients, loss_of, pair, perturb, tokens, worst  # noqa: E402
from torch import nn  # noqa: E402

import spectral_ops  # noqa: E402

EXACT = 5e-6
ALL_FUSED = {"fused": 4, "fused (base-agnostic)": 0, "PEFT": 0}  # two blocks, two stacks each
CASES = [(family, i) for family in INTERFACE for i in ("eager", "batched_mm", "grouped_mm")] + [("llama4", None)]
pytestmark = pytest.mark.usefixtures("one_thread")


def compare(stock: nn.Module, ours: nn.Module, ids=None, bound: float = EXACT) -> dict:
    ids = tokens() if ids is None else ids
    got = logits_and_gradients(ours, ids)
    assert worst(logits_and_gradients(stock, ids), got) < bound
    return got


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_every_gradient_under_every_implementation(family, backend):
    """The batches differ in their number of tokens, and the last is one token, for which few experts have rows."""
    found = {}
    for implementation in [i for name, i in CASES if name == family]:
        stock, ours = pair(adapted_mixture(family, implementation))
        report = spectral_ops.accelerate(ours, strict=True)
        for shape in ((2, 7), (3, 5), (1, 2)):
            compare(stock, ours, tokens(*shape))
        assert report.counts == ALL_FUSED and [row.calls for row in report.rows] == [3] * 4
        assert {row.operators for row in report.rows} == {"experts_lowrank" if family == "llama4" else "experts_mlp"}
        found[implementation] = logits_and_gradients(ours, tokens())
    first, *others = found.values()
    assert all(torch.equal(first["logits"], other["logits"]) for other in others)  # one computation serves them all


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_one_stack_alone(family, stack):
    stock, ours = pair(adapted_mixture(family, stacks=[stack]))
    report = spectral_ops.accelerate(ours, strict=True)
    compare(stock, ours)
    assert report.counts["fused"] == 2 and [row.calls for row in report.rows] == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_an_optimizer(family):
    stock, ours = pair(adapted_mixture(family))
    report = spectral_ops.accelerate(ours, strict=True)
    losses = []
    for model in (stock, ours):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        for step in range(20):
            loss = loss_of(model, tokens(seed=step % 4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[20:] == pytest.approx(losses[:20], rel=1e-4)
    assert losses[16] < losses[0] - 0.2  # it has learnt something of the first batch
    assert not report.fallbacks() and [row.calls for row in report.rows] == [20] * 4
    theirs, got = dict(stock.named_parameters()), dict(ours.named_parameters())  # PEFT moves its own to the end
    assert theirs.keys() == got.keys() and stock.state_dict().keys() == ours.state_dict().keys()
    for name, p in theirs.items():
        torch.testing.assert_close(got[name], p, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_ranks_that_differ_rslora_and_layers_beside_the_experts(family):
    settings = {"use_rslora": True, "rank_pattern": {"gate_up_proj": 6}, "target_modules": ATTENTION}
    stock, ours = pair(adapted_mixture(family, **settings))
    report = spectral_ops.accelerate(ours, strict=True)
    compare(stock, ours)
    ranks = {m.lora_A["default"].weight.shape[0] for m in experts_of(ours, everything=True)}
    assert len(ranks) == 2
    assert report.counts["fused"] == 12 and {row.method for row in report.rows} == {"rsLoRA"}


def two_adapters(family: str) -> nn.Module:
    return perturb(with_second(adapted_mixture(family), experts_config(family, r=3, lora_alpha=2)))


def activate(model: nn.Module, names) -> nn.Module:
    model.base_model.set_adapter(names)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_several_adapters_one_at_a_time_and_together(family):
    stock, ours = pair(two_adapters(family))
    report = spectral_ops.accelerate(ours, strict=True)
    seen = []
    for names in ("default", "second", ["default", "second"], ["second", "default"], "default"):
        got = compare(activate(stock, names), activate(ours, names))
        seen.append(got["logits"])
    assert torch.equal(seen[0], seen[4]) and not torch.allclose(seen[0], seen[1]) and not torch.allclose(*seen[1:3])
    assert not report.fallbacks() and [row.calls for row in report.rows] == [5] * 4


def test_a_scale_that_is_a_tensor():
    """PEFT's hot swapping of adapters under torch.compile makes it one and fills it anew."""
    stock, ours = pair(adapted_mixture("qwen3_moe"))
    spectral_ops.accelerate(ours, strict=True)
    for value in (0.5, 3.0):
        for model in (stock, ours):
            for wrapper in experts_of(model, everything=True):
                scale = wrapper.scaling["default"]
                wrapper.scaling["default"] = scale.fill_(value) if torch.is_tensor(scale) else torch.tensor(value)
        with torch.no_grad():
            expected = compare_with_numbers(stock, value)
            torch.testing.assert_close(ours(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def compare_with_numbers(model: nn.Module, value: float) -> torch.Tensor:
    """PEFT's baddbmm takes a number alone."""
    other = copy.deepcopy(model)
    for wrapper in experts_of(other, everything=True):
        wrapper.scaling["default"] = value
    return other(tokens()).logits


# --- dtypes ----------------------------------------------------------------------------------------------------------


def called(experts: nn.Module, dtype: torch.dtype, seed: int, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients of the experts alone: a whole model in bfloat16 may choose other experts."""
    generator = torch.Generator().manual_seed(seed)
    E = experts.get_base_layer().num_experts
    x, dy = (torch.randn(64, 32, generator=generator).bfloat16().to(dtype) for _ in range(2))
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(64)])
    weights = torch.rand(64, 2, generator=generator).bfloat16().to(dtype)
    x.requires_grad_()
    experts.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = experts(x) if type(experts.get_base_layer()).__name__.startswith("Llama4") else experts(x, index, weights)
    out.backward(dy.to(out.dtype))
    trained = {n: p.grad for n, p in experts.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **trained}


def far(exact: nn.Module, stock: nn.Module, ours: nn.Module, dtype: torch.dtype, autocast: bool) -> list[float]:
    """How far PEFT and we are from the exact experts, all tensors and three batches together; the dtypes agree."""
    found = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        expected = called(exact, torch.float32, seed)
        results = [called(experts, dtype, seed, autocast) for experts in (stock, ours)]
        assert {n: t.dtype for n, t in results[0].items()} == {n: t.dtype for n, t in results[1].items()}
        for name, e in expected.items():
            found += torch.stack([(got[name].double() - e).square().sum() / e.square().sum() for got in results])
    return found.sqrt().tolist()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_bfloat16_is_no_farther_from_float32_than_peft(family, adapters, autocast):
    stock, ours = pair(adapted_mixture(family, dtype=torch.bfloat16))
    for model in (stock, ours):
        for p in model.parameters():
            p.data = p.data.to(adapters if p.requires_grad else torch.bfloat16)
    exact = copy.deepcopy(stock).float()
    report = spectral_ops.accelerate(ours, strict=True)
    theirs, got = far(*(experts_of(m)[0] for m in (exact, stock, ours)), torch.bfloat16, autocast)
    assert 1e-3 < theirs and got < 1.1 * theirs
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_and_gradients(ours, tokens())
    assert report.counts == ALL_FUSED and not report.fallbacks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_float32_under_autocast(family, dtype):
    """torch's grouped_mm takes no part in it. Llama 4's bmm does: it rounds W + γBA once, where the product and the
    update are rounded each."""
    stock, ours = pair(adapted_mixture(family))
    exact = copy.deepcopy(stock)
    spectral_ops.accelerate(ours, strict=True)
    theirs, got = far(*(experts_of(m)[0] for m in (exact, stock, ours)), dtype, True)
    assert got < 1.4 * theirs + 1e-5


def test_float64():
    stock, ours = pair(adapted_mixture("gpt_oss", "batched_mm").double())
    spectral_ops.accelerate(ours, strict=True)
    compare(stock, ours, bound=1e-12)


# --- the call itself -------------------------------------------------------------------------------------------------


def alone(family: str, implementation: str | None = None) -> tuple[nn.Module, nn.Module]:
    """The experts of one block, PEFT's and ours."""
    stock, ours = pair(adapted_mixture(family, implementation))
    spectral_ops.accelerate(ours, strict=True)
    return experts_of(stock)[0], experts_of(ours)[0]


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_another_rank_add_nothing(family, implementation):
    """Under expert parallelism transformers gives their pairs the id E and the weight 0."""
    results = []
    for experts in alone(family, implementation):
        module = experts.get_base_layer()
        module._is_expert_parallel, E = True, module.num_experts
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(9, 32, generator=generator).requires_grad_()
        index = torch.randint(0, E, (9, 2), generator=generator)
        weights = torch.rand(9, 2, generator=generator)
        index[::2, 1] = index[4] = E
        weights[index == E] = 0.0
        weights.requires_grad_()
        out = experts(x, index, weights)
        out.square().sum().backward()
        factors = {n: p.grad for n, p in experts.named_parameters() if p.requires_grad}
        results.append({"out": out.detach(), "x": x.grad, "weights": weights.grad, **factors})
    assert worst(*results) < EXACT
    assert not results[1]["out"][4].any() and not results[1]["weights"][4].any()


def test_arguments_by_name():
    for experts in alone("qwen3_moe"):
        x, index, weights = torch.ones(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
        expected = experts(x, index, weights)
        assert torch.equal(experts(x, index, top_k_weights=weights), expected)
        assert torch.equal(experts(x, top_k_weights=weights, top_k_index=index), expected)
        state = experts.__dict__.get("_spectral_ops")
    assert state.calls == 3 and not state.reasons


def test_no_tokens():
    results = []
    for experts in alone("gpt_oss", "batched_mm"):
        x = torch.empty(0, 32, requires_grad=True)
        out = experts(x, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
        (out.sum() + sum(0.0 * p.sum() for p in experts.parameters() if p.requires_grad)).backward()
        results.append({"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in experts.named_parameters()}})
    assert worst(*results) == 0.0


def test_nothing_as_large_as_a_stack():
    """A layer with few rows for its many experts, in which PEFT makes the stack and its gradient."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 16, "moe_intermediate_size": 64, "hidden_size": 64, "num_hidden_layers": 1,
             "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
             "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    stock, ours = pair(perturb(get_peft_model(base, experts_config("qwen3_moe"))))
    spectral_ops.accelerate(ours, strict=True)
    stack = 16 * 64 * 64  # down_proj; gate_up_proj is twice that
    largest, kept = [], []
    for model in (stock, ours):
        loss_of(model, tokens(1, 4)).backward()  # once before: what is made only once
        with Recorder() as recorder, saved_tensors() as saved:
            loss_of(model, tokens(1, 4)).backward()
        largest.append(max(t.numel() for _, _, t in recorder.allocated))
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(max(t.numel() for t in saved if t.untyped_storage().data_ptr() not in frozen))
    assert largest[0] >= 2 * stack and kept[0] >= stack
    assert largest[1] <= stack // 8 and kept[1] <= stack // 8  # attention's mask and logits, and A's gradient


def test_old_names_that_peft_turns_into_stacks():
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion", reason="an older PEFT turns none")
    assert conversion
    torch.manual_seed(1)
    stock, ours = pair(perturb(get_peft_model(mixture("mixtral"), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]))))
    report = spectral_ops.accelerate(ours, strict=True)
    compare(stock, ours)
    assert report.counts == ALL_FUSED
