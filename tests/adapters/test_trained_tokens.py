"""Chosen rows of an embedding: against a dense weight with those rows in it, and against PEFT on whole models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops.adapters.trained_tokens import TrainedTokens

V, D = 23, 6
CHOSEN = [7, 2, 22]
IDS = torch.tensor([[7, 7, 3, 22], [0, 2, 7, 5]])


class Scaled(nn.Embedding):
    """As Gemma's: the factor is a buffer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """As BART's."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def unit_of(embedding, indices=CHOSEN, tied=None, **kwargs):
    """A unit whose rows are no longer the weight's."""
    unit = TrainedTokens(embedding.requires_grad_(False))
    unit.add_adapter("default", indices, **kwargs)
    unit.set_active("default")
    with torch.no_grad():
        unit.rows["default"].add_(torch.randn_like(unit.rows["default"]))
    return unit


def pair(bias=False):
    """An embedding and a head that share a weight, and the same two as units."""
    embedding, head = nn.Embedding(V, D), nn.Linear(D, V, bias=bias)
    head.weight = embedding.weight
    unit = unit_of(embedding)
    tied = TrainedTokens(head.requires_grad_(False), unit)
    tied.add_adapter("default", CHOSEN)
    tied.set_active("default")
    return unit, tied


def dense(unit):
    """The weight with the unit's rows in it, a leaf."""
    weight = unit.original_module.weight.detach().clone()
    weight[torch.tensor(unit.indices["default"])] = unit.rows["default"].detach().to(weight.dtype)
    return weight.requires_grad_()


EMBEDDINGS = {
    "plain": lambda: nn.Embedding(V, D),
    "padding": lambda: nn.Embedding(V, D, padding_idx=3),
    "padding_chosen": lambda: nn.Embedding(V, D, padding_idx=7),
    "by_frequency": lambda: nn.Embedding(V, D, scale_grad_by_freq=True),
    "scaled": lambda: Scaled(V, D, padding_idx=0),
    "scaled_by_number": lambda: ScaledByNumber(V, D),
}


class TestAgainstADenseWeight:
    @pytest.mark.parametrize("kind", EMBEDDINGS)
    def test_embedding_output_and_gradient(self, kind):
        base = EMBEDDINGS[kind]()
        unit = unit_of(copy.deepcopy(base))
        whole = copy.deepcopy(base)
        whole.weight = nn.Parameter(dense(unit).detach())
        out, wanted = unit(IDS), whole(IDS)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        wanted.backward(upstream)
        torch.testing.assert_close(unit.rows["default"].grad, whole.weight.grad[CHOSEN])
        assert unit.original_module.weight.grad is None
        assert (unit.rows["default"].grad[0].norm() == 0) == (kind == "padding_chosen")  # id 7 is in the batch

    def test_the_replaced_rows_of_a_trained_weight_get_no_gradient(self):
        unit = unit_of(nn.Embedding(V, D))
        unit.original_module.requires_grad_(True)
        unit(IDS).sum().backward()
        gradient = unit.original_module.weight.grad
        assert gradient[CHOSEN].norm() == 0
        assert gradient[3].norm() > 0

    @pytest.mark.parametrize("bias", [False, True])
    def test_tied_pair_output_and_gradients(self, bias):
        unit, head = pair(bias)
        weight, x = dense(unit), torch.randn(2, 4, D, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out = head(torch.tanh(unit(IDS)) + x)
        wanted = F.linear(torch.tanh(F.embedding(IDS, weight)) + y, weight, head.original_module.bias)
        torch.testing.assert_close(out, wanted)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        wanted.backward(upstream)
        torch.testing.assert_close(unit.rows["default"].grad, weight.grad[CHOSEN])
        torch.testing.assert_close(x.grad, y.grad)

    def test_the_weight_that_a_model_reads(self):
        unit, head = pair()
        for module in (unit, head):
            assert torch.equal(module.weight, dense(unit))
        F.linear(torch.ones(1, D), head.weight).sum().backward()
        assert torch.equal(unit.rows["default"].grad, torch.ones(3, D))
        unit.set_active("other")
        assert unit.weight is unit.original_module.weight
        assert unit.embedding_dim == D
        assert head.in_features == D
        with pytest.raises(AttributeError, match="no_such"):
            _ = unit.no_such

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype):
        unit = unit_of(Scaled(V, D).to(dtype))
        assert unit.rows["default"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        whole = copy.deepcopy(unit.original_module)
        whole.weight = nn.Parameter(dense(unit).detach())
        assert unit(IDS).dtype == dtype
        assert torch.equal(unit(IDS), whole(IDS))
        assert unit_of(nn.Embedding(V, D).to(dtype), autocast_adapter_dtype=False).rows["default"].dtype == dtype

    def test_autocast(self):
        unit, head = pair()
        x = torch.randn(2, 4, D)
        with torch.autocast("cpu", torch.bfloat16):
            out, wanted = head(x), F.linear(x, dense(unit))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, wanted)

    def test_forward_makes_no_copy_of_the_weight(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        sizes = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.data_ptr() != unit.original_module.weight.data_ptr():
                    sizes.append(out.numel())
                return out

        vocabulary = 1000
        embedding, head = nn.Embedding(vocabulary, D), nn.Linear(D, vocabulary, bias=False)
        head.weight = embedding.weight
        unit = unit_of(embedding)
        tied = TrainedTokens(head, unit)
        tied.set_active("default")
        with Record():
            tied(unit(IDS[:1, :2])).sum().backward()
        assert max(sizes) == 2 * vocabulary  # the logits
        assert unit.rows["default"].grad.norm() > 0


class TestLife:
    def test_rows_start_from_the_weight_and_only_the_active_ones_train(self):
        unit = TrainedTokens(nn.Embedding(V, D).requires_grad_(False))
        for name, indices in {"a": [4, 1], "b": [0, 1, 2]}.items():
            unit.add_adapter(name, indices)
            assert torch.equal(unit.rows[name], unit.original_module.weight[indices])
        assert unit.adapter_names == ["a", "b"]
        unit.set_active("b")
        assert {n for n, p in unit.named_parameters() if p.requires_grad} == {"rows.b"}
        with torch.no_grad():
            unit.rows["a"].fill_(1)
            unit.rows["b"].fill_(2)
        assert torch.equal(unit(torch.tensor([4, 1])), torch.stack([unit.original_module.weight[4], 2 * torch.ones(D)]))
        unit.set_active("a")
        assert torch.equal(unit(torch.tensor([4, 1])), torch.ones(2, D))
        unit.remove_adapter("a")
        assert unit.active is None
        assert torch.equal(unit(IDS), unit.original_module(IDS))
        assert set(unit.state_dict()) == {"original_module.weight", "rows.b"}
        unit.add_adapter("a", [5])
        assert unit.indices == {"b": [0, 1, 2], "a": [5]}

    def test_disabled_runs_the_original(self):
        unit, head = pair()
        x = torch.randn(3, D)
        unit._disabled = head._disabled = 1
        assert torch.equal(unit(IDS), unit.original_module(IDS))
        assert torch.equal(head(x), head.original_module(x))
        assert unit.weight is head.weight is unit.original_module.weight

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merge_and_unmerge(self, dtype):
        unit, head = pair()
        for module in (unit, head):
            module.to(dtype)
        assert head.original_module.weight is unit.original_module.weight
        before, x = unit.original_module.weight.clone(), torch.randn(3, D, dtype=dtype)
        ids_out, x_out, version = unit(IDS), head(x), unit.original_module.weight._version
        for module in (unit, head, unit):
            module.merge()
        assert unit.merged == head.merged == "default"
        assert unit.original_module.weight._version > version
        assert torch.equal(unit.original_module.weight, dense(unit))
        assert torch.equal(unit(IDS), ids_out)
        torch.testing.assert_close(head(x), x_out)
        for module in (unit, head):
            module.unmerge()
        assert torch.equal(unit.original_module.weight, before)
        assert unit.merged is head.merged is None
        assert torch.equal(unit(IDS), ids_out)

    def test_safe_merge_changes_nothing(self):
        unit = unit_of(nn.Embedding(V, D))
        before = unit.original_module.weight.clone()
        with torch.no_grad():
            unit.rows["default"][0, 0] = float("nan")
        with pytest.raises(ValueError, match="non-finite"):
            unit.merge(safe=True)
        assert unit.merged is None
        assert torch.equal(unit.original_module.weight, before)

    def test_merge_of_an_adapter_that_is_not_there_does_nothing(self):
        unit = unit_of(nn.Embedding(V, D))
        before = unit.original_module.weight.clone()
        unit.set_active("other")
        unit.merge()
        unit.unmerge()
        assert unit.merged is None
        assert torch.equal(unit.original_module.weight, before)

    def test_state_dict_and_file(self):
        unit, head = pair()
        assert set(head.state_dict()) == {"original_module.weight"}
        assert not [name for name, _ in head.named_parameters() if "rows" in name]
        assert head.file_tensors("default") == {}
        assert unit.file_tensors("other") == {}
        saved = unit.file_tensors("default")
        assert list(saved) == ["token_adapter.trainable_tokens_delta"]
        assert torch.equal(saved["token_adapter.trainable_tokens_delta"], unit.rows["default"])
        other = unit_of(nn.Embedding(V, D))
        other.load_state_dict(unit.state_dict())
        assert torch.equal(other(IDS), unit(IDS))

    def test_a_copy_of_a_pair_is_a_pair_of_its_own(self):
        both = nn.ModuleList(pair())
        twin = copy.deepcopy(both)
        assert twin[1].tied is twin[0]
        assert twin[1].original_module.weight is twin[0].original_module.weight
        x = torch.randn(2, D)
        assert torch.equal(twin[1](x), both[1](x))
        with torch.no_grad():
            twin[0].rows["default"].zero_()
        assert (twin[1](x)[:, CHOSEN] == 0).all()
        assert not (both[1](x)[:, CHOSEN] == 0).any()

    def test_to_another_device_and_dtype(self):
        both = nn.ModuleList(pair()).to("meta")
        assert both[1](both[0](IDS.to("meta"))).device.type == "meta"
        assert {t.device.type for t in (*both.parameters(), *both.buffers())} == {"meta"}
        both = nn.ModuleList(pair()).to(torch.bfloat16)
        assert both[0](IDS).dtype == torch.bfloat16
        assert both[0].slots["default"].dtype == torch.int32

    def test_rows_made_in_inference_mode_train(self):
        with torch.inference_mode():
            unit = unit_of(nn.Embedding(V, D))
        unit.original_module.weight = nn.Parameter(torch.randn(V, D), requires_grad=False)
        unit(IDS).sum().backward()
        assert unit.rows["default"].grad.norm() > 0

    def test_compiled(self):
        unit, head = pair(bias=True)

        def run(ids, x):
            return head(torch.tanh(unit(ids)) + x), F.linear(x, unit.weight)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 4, D)
        gradients = []
        for function in (run, compiled):
            unit.zero_grad()
            a, b = function(IDS, x)
            (a.square().sum() + b.sin().sum()).backward()
            gradients.append((a.detach(), b.detach(), unit.rows["default"].grad))
        torch.testing.assert_close(gradients[1], gradients[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("indices", "error", "why"),
        [
            ([], ValueError, "distinct"),
            ([1, 2, 1], ValueError, "distinct"),
            ([1, V], ValueError, rf"\[{V}\], wanted indices in 0..{V - 1}"),
            ([-1], ValueError, r"\[-1\]"),
            ([1.0], TypeError, "list of int"),
            ([True], TypeError, "list of int"),
            ("12", TypeError, "list of int"),
            (None, TypeError, "list of int"),
            (torch.tensor([1]), TypeError, "list of int"),
        ],
    )
    def test_indices(self, indices, error, why):
        unit = TrainedTokens(nn.Embedding(V, D))
        with pytest.raises(error, match=f"trainable_token_indices: .*{why}"):
            unit.add_adapter("default", indices)
        assert unit.adapter_names == []
        assert len(unit.rows) == 0

    @pytest.mark.parametrize(
        ("embedding", "why"),
        [
            (lambda: nn.Embedding(V, D, max_norm=1.0), "max_norm=1.0"),
            (lambda: nn.Embedding(V, D, sparse=True), "sparse=True"),
            (lambda: nn.Linear(D, V), "wanted an nn.Embedding"),
            (lambda: type("Shifted", (nn.Embedding,), {"forward": lambda s, i: s.weight[i] + 1})(V, D), "changes"),
            (lambda: type("Places", (nn.Embedding,), {"forward": lambda s, i, n: s.weight[:n]})(V, D), "token ids"),
        ],
    )
    def test_embeddings(self, embedding, why):
        with pytest.raises(ValueError, match=f"trainable_token_indices: .*{why}"):
            TrainedTokens(embedding())

    def test_heads(self):
        unit = unit_of(nn.Embedding(V, D))
        with pytest.raises(ValueError, match="weight of its own"):
            TrainedTokens(nn.Linear(D, V), unit)
        with pytest.raises(ValueError, match=r"wanted a plain nn\.Linear"):
            TrainedTokens(nn.GELU(), unit)


def llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=tied, pad_token_id=0,
        )
    )  # fmt: skip


def gemma(tied):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=tied, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.usefixtures("tiny")
class TestAgainstPEFT:
    """LoRA's B is zero, so PEFT's model computes with the trained rows alone."""

    @pytest.fixture(params=[(llama, True), (llama, False), (gemma, True)], ids=["tied", "untied", "gemma"])
    def base(self, request):
        build, tied = request.param
        return build(tied)

    def both(self, base, dtype=torch.float32):
        from peft import LoraConfig, get_peft_model

        ours = copy.deepcopy(base.to(dtype)).requires_grad_(False)
        config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=CHOSEN)
        theirs = get_peft_model(base, config)
        wrapper = theirs.base_model.model.model.embed_tokens
        unit = TrainedTokens(ours.model.embed_tokens)
        unit.add_adapter("default", CHOSEN)
        rows = wrapper.token_adapter.trainable_tokens_delta["default"]
        assert rows.dtype == unit.rows["default"].dtype
        assert torch.equal(rows, unit.rows["default"])
        with torch.no_grad():
            rows.add_(torch.randn_like(rows))
            unit.rows["default"].copy_(rows)
        ours.model.embed_tokens = unit
        if ours.config.tie_word_embeddings:
            ours.lm_head = TrainedTokens(ours.lm_head, unit)
            ours.lm_head.set_active("default")
        unit.set_active("default")
        return ours, theirs, rows

    def test_logits_gradients_and_merged_weights(self, base):
        ours, theirs, rows = self.both(base)
        wanted, got = (m(input_ids=IDS, labels=IDS) for m in (theirs, ours))
        torch.testing.assert_close(got.logits, wanted.logits)
        wanted.loss.backward()
        got.loss.backward()
        torch.testing.assert_close(ours.model.embed_tokens.rows["default"].grad, rows.grad)
        assert torch.equal(ours.model.embed_tokens.weight, theirs.base_model.model.model.embed_tokens.weight)
        for module in (ours.model.embed_tokens, ours.lm_head):
            if isinstance(module, TrainedTokens):
                module.merge()
        merged = theirs.merge_and_unload()
        assert torch.equal(ours.model.embed_tokens.original_module.weight, merged.model.embed_tokens.weight)
        torch.testing.assert_close(ours(input_ids=IDS).logits, merged(input_ids=IDS).logits)

    def test_half_precision(self, base):
        ours, theirs, rows = self.both(base, torch.bfloat16)
        assert rows.dtype == torch.float32
        with torch.no_grad():
            wanted, got = (m(input_ids=IDS).logits for m in (theirs, ours))
        torch.testing.assert_close(got, wanted)

    def test_generate_and_checkpointing(self, base):
        ours, theirs, rows = self.both(base)
        wanted, got = (
            m.eval().generate(input_ids=IDS[:1, :3], max_new_tokens=5, do_sample=False) for m in (theirs, ours)
        )
        assert torch.equal(got, wanted)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                ours.gradient_checkpointing_enable()
            ours.zero_grad()
            ours.train()(input_ids=IDS, labels=IDS).loss.backward()
            gradients.append(ours.model.embed_tokens.rows["default"].grad.clone())
        torch.testing.assert_close(gradients[1], gradients[0])
