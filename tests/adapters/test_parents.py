"""Modules that compute with a child's weight: refused, named in a warning, or served."""

import copy
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import perturb
from torch import nn

import spectral_ops as so
from spectral_ops import LoRAConfig
from spectral_ops.adapters.choice import parents, reads

CALLED = "target_modules: got .*, wanted layers that are called; "


class Parent(nn.Module):
    """A parent with one child, ``proj``, and whatever its forward does with that."""

    def __init__(self, **settings):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.others = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        for name, value in settings.items():
            setattr(self, name, value)


class Functional(Parent):
    def forward(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)


class CallsAndReads(Parent):
    def forward(self, x):
        return self.proj(x) + x @ self.proj.weight


class Helper(Parent):
    def forward(self, x):
        return self.twice(x)

    def twice(self, x):
        weight = self.proj.weight
        return x @ weight @ weight


class Bound(Parent):
    def forward(self, x):
        layer = self.proj
        return torch.einsum("bi,oi->bo", x, layer.weight)


class Listed(Parent):
    def forward(self, x):
        for layer in self.others:
            x = F.linear(x, layer.weight)
        return self.proj(x)


class Numbered(Parent):
    def forward(self, x):
        return self.proj(F.linear(x, self.others[0].weight) + self.others[1](x))


class Sometimes(Parent):
    def forward(self, x):
        if x.requires_grad:
            return x @ self.proj.weight
        return self.proj(x)


class BySetting(Parent):
    def forward(self, x):
        if self.slices > 1 and not self.exact:
            return x @ self.proj.weight
        return self.proj(x)


class Calculated(Parent):
    """A condition that is not looked into: it may have effects."""

    def forward(self, x):
        if self.count():
            return x @ self.proj.weight
        return self.proj(x)

    def count(self):
        raise AssertionError("was called")


class ByAttribute(Parent):
    def forward(self, x):
        if hasattr(self, "quantised"):
            return self.proj(x)
        return x @ self.proj.weight


class InTraining(Parent):
    def forward(self, x):
        return x @ self.proj.weight if self.training else self.proj(x)


class Looks(Parent):
    """Everything that asks what a weight is, and all that is done to it when a module is set up."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.proj.weight)

    def _init_weights(self, module):
        self.proj.weight.data.normal_()

    def tie_weights(self):
        self.proj.weight = self.others[0].weight

    @property
    def device(self):
        return self.proj.weight.device

    def forward(self, x):
        weight = self.proj.weight
        assert isinstance(self.proj.weight, torch.Tensor)
        assert self.proj.weight is not None
        if self.proj.weight.dtype != x.dtype or weight.requires_grad or self.proj.weight.size(0) < 1:
            x = x.to(self.proj.weight.data.dtype)
        return self.proj(x.to(weight.device))


class Overridden(Functional):
    def forward(self, x):
        return self.proj(x)


class Inherited(Functional):
    def forward(self, x):
        return super().forward(x)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Grandparent(Outer):
    def forward(self, x):
        return self.inner(x) + x @ self.inner.proj.weight


class TestBySource:
    @pytest.mark.parametrize("kind", [Functional, CallsAndReads, Helper, Bound, Inherited, ByAttribute])
    def test_refused_by_name_and_left_out_of_all_linear(self, kind):
        model = Outer(kind())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=CALLED + r".*computes with the weight of proj itself.*exclude_modules"):
            so.attach(model, LoRAConfig(r=2, target_modules=["proj"]))
        assert list(model.state_dict()) == list(before)
        with pytest.warns(UserWarning, match=r"'inner.proj' is left out, as .* computes with"):
            so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))
        adapted = {name for name, module in model.named_modules() if isinstance(module, so.LoRALinear)}
        assert adapted == {"inner.others.0", "inner.others.1"}

    def test_children_in_a_list(self):
        assert "weight of others.* itself" in parents.reads_weight(Listed(), "others.1")
        assert "others.0" in parents.reads_weight(Numbered(), "others.0")
        assert parents.reads_weight(Numbered(), "others.1") is None
        assert parents.reads_weight(Listed(), "proj") is None
        with pytest.raises(
            ValueError, match=r"'others.0'.*Listed.forward computes with the weight of others.\* itself"
        ):
            so.attach(Listed(), LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["proj"]))

    def test_an_ancestor(self):
        model = Grandparent(Overridden())
        with pytest.raises(ValueError, match="Grandparent.forward computes with the weight of inner.proj itself"):
            so.attach(model, LoRAConfig(r=2, target_modules=["proj"]))

    @pytest.mark.parametrize("kind", [Sometimes, Calculated, InTraining])
    @pytest.mark.parametrize("chosen", [["proj"], "all-linear"])
    def test_warned_of_where_only_some_calls_do_so(self, kind, chosen):
        model = nn.ModuleList([kind(), kind()])
        with pytest.warns(UserWarning, match=rf"{kind.__name__}.forward computes.*'0.proj' and 1 more") as caught:
            so.attach(model, LoRAConfig(r=2, target_modules=chosen))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert all(isinstance(parent.proj, so.LoRALinear) for parent in model)

    @pytest.mark.parametrize(
        ("settings", "found"),
        [
            ({"slices": 1, "exact": False}, False),
            ({"slices": 2, "exact": True}, False),
            ({"slices": 2, "exact": 0}, True),
        ],
    )
    def test_a_branch_that_the_settings_rule_out(self, settings, found):
        assert (parents.reads_weight(BySetting(**settings), "proj") is not None) == found

    def test_a_call_that_the_settings_rule_out(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with pytest.raises(ValueError, match="ByAttribute"):
                so.attach(ByAttribute(), LoRAConfig(r=2, target_modules=["proj"]))
        with pytest.warns(UserWarning, match="on some of its paths"):
            so.attach(ByAttribute(quantised=True), LoRAConfig(r=2, target_modules=["proj"]))

    @pytest.mark.parametrize("kind", [Looks, Overridden])
    def test_no_alarm(self, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            so.attach(Outer(kind()), LoRAConfig(r=2, target_modules="all-linear"))

    def test_a_forward_put_on_the_instance(self):
        model = Overridden()
        model.forward = Functional.forward.__get__(model)
        assert "Functional.forward" in parents.reads_weight(model, "proj")

    def test_a_forward_put_on_the_class(self, monkeypatch):
        assert parents.reads_weight(Overridden(), "proj") is None
        monkeypatch.setattr(Overridden, "forward", Functional.forward)
        assert "Functional.forward" in parents.reads_weight(Overridden(), "proj")

    def test_a_module_under_two_parents(self):
        model = nn.ModuleList([Overridden(), Functional()])
        model[1].proj = model[0].proj
        with pytest.raises(ValueError, match=r"got '0.proj'.*Functional\.forward"):
            so.attach(model, LoRAConfig(r=2, target_modules=["proj"]))

    def test_no_source(self):
        names = {"Parent": Parent, "nn": nn}
        exec("class Hidden(Parent):\n    def forward(self, x):\n        return x @ self.proj.weight", names)
        assert parents.reads_weight(names["Hidden"](), "proj") is None  # nothing to judge by

    def test_torch_without_source(self, monkeypatch):
        monkeypatch.setattr(reads.Reader, "found", lambda self, module: reads.Found((), frozenset()))
        assert "out_proj" in parents.reads_weight(nn.MultiheadAttention(4, 2), "out_proj")


class TestTorch:
    def test_every_class_that_reads_the_weight_of_a_linear_layer(self):
        """A class that torch adds must be looked at: it is found here."""
        reader, found = reads.Reader(), set()
        for package in ("torch.nn", "torch.ao.nn"):
            for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
                module = importlib.import_module(info.name)
                for kind in vars(module).values():
                    if inspect.isclass(kind) and issubclass(kind, nn.Module) and not inspect.isabstract(kind):
                        its = reader.found(object.__new__(kind)).reads
                        found |= {(kind.__name__, ".".join(read.chain)) for read in its}
        linear = {(name, chain) for name, chain in found if not chain.endswith(("bn", "norm1", "norm2"))}
        assert linear - {("LinearCrossEntropyLoss", "linear")} == {
            ("MultiheadAttention", "out_proj"),
            ("TransformerEncoder", "layers.0.linear1"),
            ("TransformerEncoder", "layers.0.linear2"),
            ("TransformerEncoder", "layers.0.self_attn.out_proj"),
            ("TransformerEncoderLayer", "linear1"),
            ("TransformerEncoderLayer", "linear2"),
            ("TransformerEncoderLayer", "self_attn.out_proj"),
        }

    def test_attention_is_refused_and_left_out(self):
        model = nn.TransformerEncoderLayer(8, 2)
        with pytest.raises(ValueError, match="'self_attn.out_proj'.*MultiheadAttention.forward computes"):
            so.attach(model, LoRAConfig(r=2, target_modules=["out_proj"]))
        with pytest.warns(UserWarning, match="'self_attn.out_proj' is left out") as caught:
            so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))
        assert len(caught) == 1
        assert isinstance(model.linear1, so.LoRALinear)
        with pytest.raises(ValueError, match="MultiheadAttention.forward"):
            so.attach(nn.MultiheadAttention(8, 2), LoRAConfig(r=2, target_modules="all-linear"))

    @pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such loss")
    def test_fused_loss_is_refused(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.LinearCrossEntropyLoss(8, 5))
        with pytest.raises(ValueError, match="LinearCrossEntropyLoss.forward computes with the weight of linear"):
            so.attach(model, LoRAConfig(r=2, target_modules=["linear"]))

    @pytest.mark.parametrize("kind", ["MultiheadAttention"])
    def test_a_subclass_that_calls_its_child_is_adapted(self, kind):
        from torch.ao.nn import quantizable

        model = nn.ModuleList([quantizable.MultiheadAttention(8, 2)])
        so.attach(model, LoRAConfig(r=2, target_modules=["out_proj"]))
        perturb(model)
        x = torch.randn(3, 2, 8)
        with so.disabled(model):
            base = model[0](x, x, x)[0]
        assert (model[0](x, x, x)[0] - base).norm() > 0


def small(kind, **settings):
    """One of transformers' models, two layers deep."""
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
    if settings.pop("usual", True):
        shared |= {"intermediate_size": 48, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**{**shared, **settings})
    return getattr(transformers, f"{kind}Model")(config)


def convolving(kind):
    return small(
        kind, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip


class TestTransformers:
    @pytest.mark.parametrize(
        ("build", "name", "why"),
        [
            (lambda: small("Mamba", usual=False, state_size=4), "out_proj", "MambaMixer hands"),
            (lambda: small("Mamba", usual=False, state_size=4), "dt_proj", "MambaMixer.forward"),
            (lambda: small("FalconMamba", usual=False, state_size=4), "out_proj", "FalconMambaMixer hands"),
            (lambda: small("FalconMamba", usual=False, state_size=4), "dt_proj", "FalconMambaMixer.forward"),
            (
                lambda: small("Mamba2", usual=False, state_size=4, num_heads=8, head_dim=8, n_groups=1),
                "out_proj",
                "Mamba2Mixer hands",
            ),
            (lambda: convolving("WavLM"), "q_proj", "WavLMAttention.torch_multi_head_self_attention"),
        ],
    )
    def test_refused(self, build, name, why):
        with pytest.raises(ValueError, match=CALLED + why):
            so.attach(build(), LoRAConfig(r=2, target_modules=[name]))

    @pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
    def test_what_a_training_kernel_takes_is_named(self, kind):
        model = small(kind, usual=False, state_size=4)
        with pytest.warns(UserWarning, match=f"{kind}Mixer.forward .*x_proj.* and 1 more like it is without effect"):
            so.attach(model, LoRAConfig(r=2, target_modules=["x_proj"]))

    @pytest.mark.filterwarnings("ignore:target_modules. MambaMixer.forward computes")
    @pytest.mark.parametrize(
        ("build", "names"),
        [
            (lambda: small("Mamba", usual=False, state_size=4), {"in_proj", "x_proj"}),
            (lambda: convolving("WavLM"), None),
        ],
    )
    def test_all_linear_is_what_has_an_effect(self, build, names):
        """Every adapter that stays gets a gradient, and the ones left out would have had none."""
        model = build()
        with pytest.warns(UserWarning, match="is left out"):
            so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))
        layers = {path: m for path, m in model.named_modules() if isinstance(m, so.LoRALinear)}
        assert names in (None, {path.rpartition(".")[2] for path in layers})
        perturb(model).train()
        inputs = torch.arange(8)[None] if names else torch.randn(1, 200)
        model(inputs).last_hidden_state.square().sum().backward()
        for path, layer in layers.items():
            assert layer.lora_B["default"].grad.norm() > 0, path

    def test_one_warning_for_layers_that_are_alike(self):
        model = small("Rwkv", usual=False, num_hidden_layers=3)
        with pytest.warns(UserWarning, match=r"_rescale_layers .*blocks.\*.attention.output.* and 2 more") as caught:
            so.attach(model, LoRAConfig(r=2, target_modules=["output"]))
        assert len(caught) == 1

    @pytest.mark.parametrize("kind", ["Llama", "Bert", "Bloom", "T5", "Bart", "CLIPVision", "Gemma3Text", "Phi"])
    def test_no_alarm(self, kind):
        settings = {"T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}, "Bart": {"d_model": 32}}
        model = small(kind, **settings.get(kind, {}), **({"usual": False} if kind == "T5" else {}))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))

    def test_bloom_as_it_computes_in_slices(self):
        model = small("Bloom", pretraining_tp=2, slow_but_exact=True)
        with pytest.raises(ValueError, match="BloomMLP.forward"):
            so.attach(model, LoRAConfig(r=2, target_modules=["dense_4h_to_h"]))
