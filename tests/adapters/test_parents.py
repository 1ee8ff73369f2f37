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
from spectral_ops.adapters import parents, reads

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
    @pytest.mark.parametrize("kind", [Functional, CallsAndReads, Helper, Bound, Inherited])
    def test_refused_by_name_and_left_out_of_all_linear(self, kind):
        model = Outer(kind())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=CALLED + r".*computes with the weight of proj itself.*exclude_modules"):
            so.attach(model, LoRAConfig(r=2, target_modules=["proj"]))
        assert list(model.state_dict()) == list(before)
        with pytest.warns(UserWarning, match=r"\"all-linear\" leaves 'inner.proj' out; .* computes with"):
            so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))
        adapted = {name for name, module in model.named_modules() if isinstance(module, so.LoRALinear)}
        assert adapted == {"inner.others.0", "inner.others.1"}

    def test_children_in_a_list(self):
        assert "others.1" in parents.reads_weight(Listed(), "others.1")
        assert "others.0" in parents.reads_weight(Numbered(), "others.0")
        assert parents.reads_weight(Numbered(), "others.1") is None
        assert parents.reads_weight(Listed(), "proj") is None
        with pytest.raises(ValueError, match="Listed.forward computes with the weight of others.0 itself"):
            so.attach(Listed(), LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["proj"]))

    def test_an_ancestor(self):
        model = Grandparent(Overridden())
        with pytest.raises(ValueError, match="Grandparent.forward computes with the weight of inner.proj itself"):
            so.attach(model, LoRAConfig(r=2, target_modules=["proj"]))

    @pytest.mark.parametrize("kind", [Sometimes, InTraining])
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
        with pytest.warns(UserWarning, match="leaves 'self_attn.out_proj' out") as caught:
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


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2).eval()


def took_the_fast_path(call):
    with torch.profiler.profile() as profile:
        call()
    return any("_transformer_encoder_layer_fwd" in event.name for event in profile.events())


class TestEncoderFastPath:
    """torch takes it in eval mode without gradients; the adapter was without effect there."""

    @pytest.fixture
    def model(self):
        return perturb(so.attach(encoder(), LoRAConfig(r=4, target_modules=["linear1", "linear2"]))).eval()

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
    def test_equals_the_merged_model_everywhere(self, model, padded, no_gradients):
        x = torch.randn(2, 5, 16)
        mask = {"src_key_padding_mask": PADDING} if padded else {}
        valid = ~PADDING if padded else torch.ones_like(PADDING)
        merged = so.detach(so.merge(copy.deepcopy(model)))
        with_gradients = model(x, **mask).detach()
        in_training = model.train()(x, **mask).detach()
        model.eval()
        with no_gradients():
            out, wanted = model(x, **mask), merged(x, **mask)
            base = so.detach(copy.deepcopy(model))(x, **mask)
        assert took_the_fast_path(lambda: no_gradients()(merged)(x, **mask))
        torch.testing.assert_close(out, with_gradients)
        torch.testing.assert_close(out, in_training)
        torch.testing.assert_close(out[valid], wanted[valid], rtol=1e-4, atol=1e-5)
        assert (out - base)[valid].norm() > 1e-2

    def test_one_layer_alone_and_only_one_of_several_adapted(self):
        x = torch.randn(2, 5, 16)
        for model, names in ((encoder().layers[0], ["linear2"]), (encoder(), ["layers.1.linear1"])):
            perturb(so.attach(model, LoRAConfig(r=4, target_modules=names)))
            with torch.no_grad():
                without = model(x)
            torch.testing.assert_close(without, model(x).detach())
            with torch.no_grad(), so.disabled(model):
                assert (model(x) - without).norm() > 1e-3

    def test_detach_gives_the_fast_path_back(self):
        plain, x = encoder(), torch.randn(2, 5, 16)
        model = copy.deepcopy(plain)
        for name in ("a", "b"):
            so.attach(model, LoRAConfig(r=4, target_modules=["linear1"]), name)
        model = copy.deepcopy(model)
        with torch.no_grad():
            assert not took_the_fast_path(lambda: model(x))
            so.detach(model, "a")
            assert not took_the_fast_path(lambda: model(x))
            so.detach(model, "b")
            assert took_the_fast_path(lambda: model(x))
            assert torch.equal(model(x), plain(x))
            assert torch.equal(model(x, src_key_padding_mask=PADDING), plain(x, src_key_padding_mask=PADDING))
        for a, b in zip(plain.modules(), model.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys()
            assert not b._forward_pre_hooks

    def test_an_encoder_without_nested_tensors_stays_without(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
        so.detach(so.attach(model, LoRAConfig(r=2, target_modules=["linear1"])))
        assert model.use_nested_tensor is False

    def test_an_adapter_outside_of_it_leaves_it_alone(self):
        model = nn.Sequential(encoder(), Outer(nn.Linear(16, 4)))
        so.attach(model, LoRAConfig(r=2, target_modules=["inner"]))
        with torch.no_grad():
            assert took_the_fast_path(lambda: model(torch.randn(2, 5, 16)))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors(self, model):
        nested = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(3, 16)])
        with torch.no_grad():
            for call in (model, model.layers[0]):
                with pytest.raises(ValueError, match="src: got a nested tensor .*wanted a padded one"):
                    call(nested)
            assert so.detach(model)(nested).is_nested

    def test_compiled(self, model):
        x = torch.randn(2, 5, 16)
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), model(x))
