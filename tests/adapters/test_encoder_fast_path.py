"""torch's inference fast path for encoder layers, which reads weights: adapters keep the layers off it."""

import copy
from collections import OrderedDict

import pytest
import torch
from models import perturb
from torch import nn

import spectral_ops as so
from spectral_ops import LoRAConfig

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2).eval()


def took_the_fast_path(call):
    with torch.profiler.profile() as profile:
        call()
    return any("_transformer_encoder_layer_fwd" in event.name for event in profile.events())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestEncoderFastPath:
    """torch takes it in eval mode without gradients; an adapter would be without effect there."""

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
        model = nn.Sequential(OrderedDict(encoder=encoder(), inner=nn.Linear(16, 4)))
        so.attach(model, LoRAConfig(r=2, target_modules=["inner"]))
        with torch.no_grad():
            assert took_the_fast_path(lambda: model(torch.randn(2, 5, 16)))

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
