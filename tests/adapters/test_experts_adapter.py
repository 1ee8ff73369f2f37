"""LoRA on the stacked weights of experts: the formula, what merges and unmerges, what is refused, what is held."""

from __future__ import annotations

import copy

import pytest

peft = pytest.importorskip("peft")
moe = pytest.importorskip("transformers.integrations.moe")

import torch  # noqa: E402
import transformers  # noqa: E402
from experts_tiny import FAMILIES, INTERFACE, STACKS, mixture  # noqa: E402
from models import adamw, perturb, trained  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import spectral_ops as so  # noqa: E402
from spectral_ops.adapters import LoRAExperts  # noqa: E402

E, K, F, T, R = 4, 16, 12, 9, 3
families = pytest.mark.parametrize("family", FAMILIES)


def modeling(name, path):
    return getattr(__import__(f"transformers.models.{path}.modeling_{path}", fromlist=[name]), name)


def experts_class(family):
    """The class of a family's experts, and a config of E experts with x [T, K] and F between."""
    if family == "nemotron_h":  # no gate
        sizes = {"n_routed_experts": E, "moe_intermediate_size": F, "hidden_size": K, "moe_latent_size": None}
        return modeling("NemotronHExperts", family), transformers.NemotronHConfig(**sizes)
    if family == "muse_spark":  # a norm after each expert
        config = modeling("MuseSparkTextConfig", family)()
        config.num_local_experts, config.moe_hidden_size, config.moe_intermediate_size = E, K, F
        return modeling("MuseSparkExperts", family), config
    if family == "llama4":
        sizes = {"num_local_experts": E, "hidden_size": K, "intermediate_size": F}
        return modeling("Llama4TextExperts", family), transformers.Llama4TextConfig(**sizes)
    prefix, _, _ = FAMILIES[family]
    sizes = {"hidden_size": K, "intermediate_size": F, "moe_intermediate_size": F}
    sizes |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
    return modeling(f"{prefix}Experts", family), getattr(transformers, f"{prefix}Config")(**sizes)


def module(family, dtype=torch.float64):
    """An experts module inside of another, frozen, and the arguments of its forward."""
    kind, config = experts_class(family)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = kind(config).to(dtype)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
    if family == "llama4":
        return nn.ModuleDict({"experts": experts}), (torch.randn(E * T, K, dtype=dtype),)
    index = torch.rand(T, E).topk(2).indices
    index[index == 1] = 0  # nobody asks for expert 1
    return nn.ModuleDict({"experts": experts}), (torch.randn(T, K, dtype=dtype), index, torch.rand(T, 2, dtype=dtype))


def attach(family, targets=None, dtype=torch.float64, scale=0.4, **fields):
    """(the adapted experts, the frozen ones, the arguments)."""
    net, args = module(family, dtype)
    frozen = copy.deepcopy(net["experts"]).requires_grad_(False)
    targets = targets or [f"experts.{name}" for name in names(net["experts"])]
    so.attach(net, so.LoRAConfig(**{"r": R, "lora_alpha": 5, "target_parameters": targets, **fields}))
    return perturb(net, scale)["experts"], frozen, args


def names(experts):
    return [name for name, p in experts.named_parameters() if p.dim() == 3]


def delta(layer, side, name="default"):
    """γBA as PEFT's packing means it, in the form in which the parameter is stored; differentiable."""
    A, B = getattr(layer, f"lora_{side}_A")[name], getattr(layer, f"lora_{side}_B")[name]
    A, B = A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E)
    form = "ore,eri->eio" if getattr(layer.base_layer, "is_transposed", False) else "ore,eri->eoi"
    return layer.scales[name][side] * torch.einsum(form, B, A)


def dense(layer, frozen, args, sides=("up", "down")):
    """The experts' own forward over stacks that have the update in them."""
    stacks = {layer.sides[s]: getattr(frozen, layer.sides[s]) + delta(layer, s) for s in sides}
    return functional_call(frozen, stacks, args)


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h", "muse_spark"])
def test_output_and_gradients_are_those_of_adapted_stacks(family):
    layer, frozen, args = attach(family)
    args[0].requires_grad_()
    floats = [a for a in args if a.is_floating_point()] + trained(layer)
    assert len(trained(layer)) == 4 and isinstance(layer, LoRAExperts)
    for a in floats:
        a.requires_grad_()
    got, want = layer(*args), dense(layer, frozen, args)
    dy = torch.randn_like(want)
    assert torch.allclose(got, want, atol=1e-12)
    assert not torch.allclose(got, frozen(*args), atol=1e-2)
    for mine, theirs in zip(torch.autograd.grad(got, floats, dy), torch.autograd.grad(want, floats, dy), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)
        assert mine.abs().max() > 0


@pytest.mark.parametrize("side", ["up", "down"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_one_stack_alone(family, side):
    name = {"up": "gate_up_proj", "down": "down_proj"}[side]
    layer, frozen, args = attach(family, [name])
    assert len(trained(layer)) == 2
    assert torch.allclose(layer(*args), dense(layer, frozen, args, [side]), atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_frozen_experts_agrees(implementation):
    layer, frozen, args = attach("mixtral", dtype=torch.float32)
    layer.base_layer.config._experts_implementation = implementation
    net = nn.ModuleDict({"experts": layer})
    assert torch.allclose(layer(*args), dense(layer, frozen, args), atol=1e-4)
    with so.disabled(net):
        assert torch.allclose(layer(*args), frozen(*args), atol=1e-4)


def test_ranks_and_scales_by_parameter():
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 5}, "alpha_pattern": {"experts.down_proj": 12}}
    layer, frozen, args = attach("qwen3_moe", **patterns)
    assert layer.lora_up_A["default"].shape == (5 * E, K) and layer.lora_down_A["default"].shape == (R * E, F)
    assert layer.scales["default"] == {"up": 5 / 5, "down": 12 / R}
    assert torch.allclose(layer(*args), dense(layer, frozen, args), atol=1e-12)
    stabilised, _, _ = attach("qwen3_moe", use_rslora=True, **patterns)
    assert stabilised.scales["default"] == {"up": 5 / 5**0.5, "down": 12 / R**0.5}


def test_dropout_acts_on_the_updates_while_training_only():
    layer, frozen, args = attach("mixtral", ["down_proj"], lora_dropout=0.3)
    want = dense(layer, frozen, args, ["down"])
    assert torch.allclose(layer.eval()(*args), want, atol=1e-12)
    layer.train()
    torch.manual_seed(3)
    first = layer(*args)
    torch.manual_seed(3)
    assert torch.equal(layer(*args), first) and not torch.allclose(first, want, atol=1e-3)
    with torch.no_grad():  # the second projection is linear in its mask
        many = [torch.cat([a] * 1000) for a in args]
        mean = layer(*many).unflatten(0, (1000, T)).mean(0)
    update = want - frozen(*args)
    assert (mean - want).norm() < 0.06 * update.norm()


def test_inits_that_leave_the_base_alone():
    layer, frozen, args = attach("olmoe", scale=0.0)
    assert torch.allclose(layer(*args), frozen(*args), atol=1e-12)
    assert not layer.lora_up_B["default"].any() and layer.lora_up_A["default"].abs().max() <= (1 / K) ** 0.5
    torch.manual_seed(0)
    gaussian, _, _ = attach("olmoe", scale=0.0, init_lora_weights="gaussian", r=8)
    assert 0.8 / 8 < gaussian.lora_up_A["default"].std() < 1.2 / 8
    both, frozen, args = attach("olmoe", scale=0.0, init_lora_weights=False)
    assert both.lora_down_B["default"].any() and not torch.allclose(both(*args), frozen(*args), atol=1e-4)


# --- weights ---------------------------------------------------------------------------------------------------------


@families
def test_a_merge_is_exact_and_cast_once(family):
    layer, frozen, args = attach(family, dtype=torch.bfloat16)
    net = nn.ModuleDict({"experts": layer})
    assert layer.lora_up_A["default"].dtype == torch.float32
    so.merge(net)
    for side, name in layer.sides.items():
        want = (getattr(frozen, name).float() + delta(layer, side)).bfloat16()
        got = getattr(layer.base_layer, name)
        assert (got != want).float().mean() < 0.02  # float32 sums in another order
        assert torch.allclose(got.float(), want.float(), rtol=2**-7)
        assert not torch.equal(got, getattr(frozen, name))
    so.unmerge(net)
    for name in layer.sides.values():
        assert torch.allclose(getattr(layer.base_layer, name).float(), getattr(frozen, name).float(), atol=0.02)
    before = layer(*args)
    so.merge(net, keep_base=True)
    assert torch.allclose(layer(*args).float(), before.float(), atol=0.3, rtol=0.05)
    so.unmerge(net)
    assert torch.equal(layer(*args), before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_merge_unmerge_disable_detach(family):
    layer, frozen, args = attach(family)
    net, with_it, without = nn.ModuleDict({"experts": layer}), layer(*args), frozen(*args)
    so.merge(net, safe=True)
    so.merge(net)  # does nothing more
    assert torch.allclose(layer(*args), with_it, atol=1e-12)
    with so.disabled(net):
        assert torch.allclose(layer(*args), without, atol=1e-12)
    assert layer.merged == "default" and torch.allclose(layer(*args), with_it, atol=1e-12)
    so.detach(net)
    assert type(net["experts"]) is type(frozen) and torch.allclose(net["experts"](*args), with_it, atol=1e-12)


def test_delta_weight_is_what_a_merge_adds():
    for family in ("mixtral", "gpt_oss"):
        layer, frozen, _ = attach(family)
        whole = layer.delta_weight()
        for side, name in layer.sides.items():
            assert torch.allclose(whole[name], delta(layer, side), atol=1e-13)
            assert torch.equal(layer.delta_weight(expert=2)[name], whole[name][2])


def test_a_safe_merge_that_is_not_finite_changes_nothing():
    layer, frozen, _ = attach("mixtral")
    with torch.no_grad():
        layer.lora_down_B["default"][1, 5] = float("inf")
    with pytest.raises(ValueError, match="got non-finite merged weights, wanted finite ones"):
        so.merge(nn.ModuleDict({"experts": layer}), safe=True)
    assert torch.equal(layer.base_layer.gate_up_proj, frozen.gate_up_proj) and layer.merged is None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "milora"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_pissa_by_expert(family, init, tmp_path):
    net, args = module(family)
    frozen = copy.deepcopy(net["experts"])
    so.attach(net, so.LoRAConfig(r=R, target_parameters=list(STACKS), init_lora_weights=init), svd_cache_dir=tmp_path)
    layer = net["experts"]
    assert torch.allclose(layer(*args), frozen(*args), atol=1e-10)
    for name in STACKS:
        was, left = (torch.linalg.svdvals(getattr(m, name)) for m in (frozen, layer.base_layer))
        if init == "milora":
            assert torch.allclose(left[:, :-R], was[:, :-R], atol=1e-10) and left[:, -R:].max() < 1e-10
        elif init == "pissa":
            assert torch.allclose(left[:, :-R], was[:, R:], atol=1e-10)
        else:
            assert (left[:, 0] < 1.05 * was[:, R]).all()
    again, _ = module(family)
    so.attach(again, so.LoRAConfig(r=R, target_parameters=list(STACKS), init_lora_weights=init), svd_cache_dir=tmp_path)
    assert torch.equal(again["experts"].lora_up_A["default"], layer.lora_up_A["default"])
    perturb(net, 0.3)
    assert not torch.allclose(layer(*args), frozen(*args), atol=1e-2)
    with so.disabled(net):
        assert torch.allclose(layer(*args), frozen(*args), atol=1e-10)
    with_it = layer(*args)
    so.save_adapter(net, tmp_path / "plain")
    so.save_adapter(net, tmp_path / "trained", plain=False)
    for form in ("plain", "trained"):
        back = so.load_adapter(module(family)[0], tmp_path / form)["experts"]
        assert torch.allclose(back(*args), with_it, atol=1e-9)
        assert back.lora_up_A["default"].shape[0] == E * R * (2 if form == "plain" else 1)
    so.merge(net)
    assert torch.allclose(layer(*args), with_it, atol=1e-10)
    so.unmerge(net)
    so.detach(net)
    for name in STACKS:
        assert torch.allclose(getattr(net["experts"], name), getattr(frozen, name), atol=1e-10)


def test_several_adapters():
    layer, frozen, args = attach("qwen3_moe")
    net, first = nn.ModuleDict({"experts": layer}), layer(*args)
    so.attach(net, so.LoRAConfig(r=2, lora_alpha=3, target_parameters=["down_proj"]), "other")
    perturb(net, 0.4)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_down_A.other", "lora_down_B.other"}
    want = functional_call(frozen, {"down_proj": frozen.down_proj + delta(layer, "down", "other")}, args)
    assert torch.allclose(layer(*args), want, atol=1e-12)
    so.set_adapter(net, "default")
    assert torch.equal(layer(*args), first) and len(trained(layer)) == 4
    so.train_adapters(net, ["other"])
    assert torch.equal(layer(*args), first) and len(trained(layer)) == 2
    with pytest.raises(ValueError, match="got a second adapter on a layer with"):
        so.attach(net, so.LoRAConfig(r=2, target_parameters=["down_proj"], init_lora_weights="pissa"), "third")
    so.detach(net, "other")
    assert net["experts"] is layer and layer.adapter_names == ["default"]
    with pytest.raises(ValueError, match="a LoRAExperts, wanted LoRA layers over their original base"):
        so.segments(net, ["default"] * 2)


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that an operator made, views and what is written in place apart."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_no_tensor_of_the_size_of_a_stack_while_training(family):
    layer, frozen, args = attach(family, dtype=torch.float32, r=1)
    args = tuple(a[: E if family == "llama4" else 4] for a in args)
    smallest = min(getattr(frozen, name).numel() for name in STACKS)
    with Sizes() as ours:
        layer(*args).sum().backward()
    with Sizes() as folded:
        dense(layer, frozen, args).sum().backward()
    assert ours.largest < smallest <= folded.largest


# --- in a model ------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(14).reshape(2, 7) * 3 % 64


def adapted(family="qwen3_moe", **fields):
    model = mixture(family, "eager" if family in INTERFACE else None)
    fields = {"r": 2, "target_parameters": list(STACKS), "target_modules": [], **fields}
    return perturb(so.attach(model, so.LoRAConfig(**fields)), 0.2)


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = adapted(lora_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        model(TOKENS).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 8
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6) and grad.any()


def test_compiled_in_one_graph():
    layer, frozen, args = attach("qwen3_moe", dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*args), dense(layer, frozen, args), atol=1e-4)
    compiled(*args).sum().backward()
    assert all(p.grad is not None for p in trained(layer))


def test_copies_state_dicts_and_peft_wrapper(tmp_path):
    model = adapted(target_modules=["q_proj"])
    with torch.no_grad():
        want = model(TOKENS).logits
        assert torch.equal(copy.deepcopy(model)(TOKENS).logits, want)
        other = so.attach(mixture("qwen3_moe"), so.adapter_configs(model)["default"])
        other.load_state_dict(model.state_dict())
        assert torch.allclose(other(TOKENS).logits, want, atol=1e-6)
        wrapped = so.as_peft_model(model)
        wrapped.save_pretrained(tmp_path)
        wrapped.add_adapter("ref", wrapped.peft_config["default"])
        wrapped.set_adapter("ref")
        assert torch.equal(wrapped(TOKENS).logits, want)
    assert wrapped.peft_config["default"].target_parameters == list(STACKS)
    back = so.load_adapter(mixture("qwen3_moe", "eager"), tmp_path)
    assert torch.allclose(back(TOKENS).logits, want, atol=1e-6)
    trained_now, total = so.adapters.pretrained.trainable_parameters(back)
    assert trained_now == sum(p.numel() for p in trained(back)) and total > trained_now


def test_a_reference_over_the_same_reduced_base(tmp_path):
    model = adapted(init_lora_weights="pissa")
    with torch.no_grad():
        want = model(TOKENS).logits
        wrapped = so.as_peft_model(model)
        wrapped.add_adapter("ref", wrapped.peft_config["default"])
        perturb(model, 0.3)
        assert not torch.allclose(wrapped(TOKENS).logits, want, atol=1e-2)
        for plain in (True, False):
            so.save_adapter(model, tmp_path / str(plain), "ref", plain=plain)
            back = so.load_adapter(mixture("qwen3_moe", "eager"), tmp_path / str(plain))
            assert torch.allclose(back(TOKENS).logits, want, atol=1e-4)
        wrapped.set_adapter("ref")
        assert torch.equal(wrapped(TOKENS).logits, want)


def test_what_the_model_reads_from_its_experts():
    layer, _, _ = attach("gpt_oss")
    assert layer.num_experts == E and layer.limit == layer.base_layer.limit
    with pytest.raises(AttributeError, match="gate_up_proj"):  # a product with it would lack the adapter
        layer.gate_up_proj  # noqa: B018
    assert "gate_up_proj r=3, scaling=1.66667" in repr(layer)


def test_the_loss_falls():
    model, losses = adapted().train(), []
    optimizer = adamw(model, 0.02)
    for _ in range(12):
        losses.append(model(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


# --- refusals --------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Experts of nobody's form."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, K))

    def forward(self, x):
        return x @ self.gate_up_proj[0].t()


def wrong(net, wanted, **fields):
    before = {name: type(m) for name, m in net.named_modules()}
    with pytest.raises(ValueError, match=wanted):
        so.attach(net, so.LoRAConfig(**fields))
    assert {name: type(m) for name, m in net.named_modules()} == before


def test_what_cannot_be_run_is_refused():
    flat = {"target_parameters": ["gate.weight"], "target_modules": []}
    wrong(mixture("qwen3_moe"), r"wanted stacks \[experts, out, in\] only \(weight is \[6, 32\]", **flat)
    wrong(
        nn.ModuleDict({"experts": Odd()}), "Odd follows neither transformers' experts interface nor Llama 4's form",
        target_parameters=["experts.gate_up_proj"],
    )  # fmt: skip
    wrong(Odd(), "wanted parameters of a module inside the model", target_parameters=["gate_up_proj"])
    net = module("gpt_oss")[0]
    wrong(net, "'none' over 'experts', whose experts have biases", target_parameters=["down_proj"], bias="all")
    net["experts"].forward = net["experts"].forward
    wrong(net, "the forward of this GptOssExperts was replaced", target_parameters=["down_proj"])
    wrong(module("mixtral")[0], "matches nothing", target_modules=["x"], target_parameters=["nothing"])
    wrong(mixture("mixtral"), "r: got 100, wanted at most 24", r=100, target_parameters=["down_proj"],
          init_lora_weights="pissa")  # fmt: skip
    half = module("mixtral")[0]
    half["experts"].down_proj.data = half["experts"].down_proj.data.to(torch.float8_e4m3fn)
    wrong(
        half, "down_proj is .* float8_e4m3fn .*, not a plain floating-point stack", target_parameters=["gate_up_proj"]
    )


@pytest.mark.parametrize("name", ["down_proj", "gate_up_proj_bias"])
def test_experts_in_two_dtypes_are_refused(name):
    net = module("gpt_oss")[0]
    getattr(net["experts"], name).data = getattr(net["experts"], name).data.float()
    wrong(net, f"{name} is in torch.float32, gate_up_proj in torch.float64", target_parameters=["down_proj"])


def test_the_name_of_llama4s_experts_is_not_enough():
    class Llama4TextExperts(Odd):
        def forward(self, x):
            return super().forward(x)

    Llama4TextExperts.forward.__qualname__ = "Llama4TextExperts.forward"
    experts = Llama4TextExperts()
    experts.down_proj = nn.Parameter(torch.randn(E, K, F))
    wrong(nn.ModuleDict({"experts": experts}), "follows neither", target_parameters=["down_proj"])


def test_rows_that_llama4_cannot_share_out():
    layer, _, (x,) = attach("llama4")
    with pytest.raises(ValueError, match=rf"x: got .*, wanted as many rows for each of {E} experts"):
        layer(x[1:])


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    kind, config = experts_class("mixtral")
    config._experts_implementation = "eager"

    class Mine(kind):
        def forward(self, x, index, weights):
            return super().forward(x, index, weights) + 1

    wrong(nn.ModuleDict({"experts": Mine(config)}), "Mine follows neither", target_parameters=["down_proj"])


def test_fields():
    for value in ("down_proj", [1], [""]):
        with pytest.raises(ValueError, match=r"LoRAConfig.target_parameters: got .*, wanted a list of"):
            so.LoRAConfig(target_parameters=value)
    for config in (so.DoRAConfig, so.RoSAConfig, so.LoRADashConfig):
        with pytest.raises(ValueError, match="wanted None: only LoRAConfig adapts parameters"):
            config(target_parameters=["down_proj"])
    with pytest.warns(UserWarning, match=r"target_parameters: \['nowhere'\] match nothing"):
        so.attach(module("mixtral")[0], so.LoRAConfig(r=2, target_parameters=["down_proj", "nowhere"]))


def test_hooks_that_come_after_the_adapter():
    layer, _, args = attach("mixtral")
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="this MixtralExperts carries hooks after the adapter came"):
        layer(*args)
    handle.remove()
    layer.register_forward_hook(lambda module, args, out: out * 0)
    assert not layer(*args).any()


def test_trained_base_weights_are_refused():
    layer, _, args = attach("mixtral")
    layer.base_layer.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match="down: got requires_grad=True, wanted a frozen tensor"):
        layer(*args)
