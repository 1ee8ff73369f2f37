"""PiCa beyond what every method is tested for: its projection, and the M that layers share, in every situation."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from instruments import saved_tensors
from models import fill, quantised, trained
from processes import in_two_processes
from torch import nn
from torch.func import functional_call

import spectral_ops as so
from spectral_ops import PiCaConfig, PiCaLinear
from spectral_ops.adapters import pica
from spectral_ops.core import autograd, philox

BOTH = ["input", "output"]
sides = pytest.mark.parametrize("side", BOTH)

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block with two roles, up [20, 12] and down [12, 20]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def stack(layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(layers)])


def attached(layers=3, dtype=torch.float32, **fields):
    config = PiCaConfig(**{"r": 4, "target_modules": ["up", "down"], **fields})
    return fill(so.attach(stack(layers).to(dtype), config))


def assert_tied(model, name="default"):
    """One M for each role, the same parameter in every layer of it."""
    found: dict[str, set[int]] = {}
    for path, layer in so.adapter_layers(model).items():
        found.setdefault(path.rpartition(".")[2], set()).add(id(layer.pica_M[name]))
    assert found and all(len(ids) == 1 for ids in found.values())


# --- the projection --------------------------------------------------------------------------------------------------


@sides
@pytest.mark.parametrize("niter", [None, 4])
def test_the_projection_is_made_of_the_largest_singular_vectors(side, niter):
    linear = nn.Linear(30, 20)
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
        linear.weight.copy_(U * 2.0 ** -torch.arange(20) @ Vh)  # far apart, so that both decompositions find the same
    weight = linear.weight.detach().clone()
    layer = PiCaLinear.from_linear(linear, PiCaConfig(r=5, side=side, niter=niter))
    P, M = layer.pica_P["default"], layer.pica_M["default"]
    want = Vh[:5] if side == "input" else U[:, :5]
    along = (P.double() * want).sum(1 if side == "input" else 0)
    assert P.shape == want.shape and torch.allclose(along.abs(), torch.ones(5).double(), atol=1e-5)
    assert M.shape == ((20, 5) if side == "input" else (5, 30)) and not M.any()
    assert M.requires_grad and not P.requires_grad and torch.equal(layer.weight, weight)


# --- what is shared --------------------------------------------------------------------------------------------------


@sides
def test_a_llama_trains_one_matrix_per_role(tiny, side):
    model = so.attach(tiny.llama(), PiCaConfig(r=4, side=side, target_modules="all-linear"))
    layers = so.adapter_layers(model)
    sizes = {path.rpartition(".")[2]: (x.out_features, x.in_features) for path, x in layers.items()}
    assert len(layers) == 14 and len(sizes) == 7
    want = sum(4 * (d if side == "input" else k) for d, k in sizes.values())
    assert sum(p.numel() for p in trained(model)) == want and len(trained(model)) == 7
    assert_tied(model)


@sides
def test_the_gradient_is_the_sum_over_the_layers(tiny, side):
    """Beside a plain Llama in float64 whose every layer has an M, and a weight formed from it, of its own."""
    ids = tiny.tokens()
    plain = tiny.llama(torch.float64).eval()
    model = so.attach(tiny.llama(torch.float64), PiCaConfig(r=4, side=side, target_modules="all-linear")).eval()
    fill(model)
    own, weights = {}, {}
    for path, layer in so.adapter_layers(model).items():
        P, M = layer.pica_P["default"].detach(), layer.pica_M["default"].detach()
        own[path] = M.clone().requires_grad_()
        delta = own[path] @ P if side == "input" else P @ own[path]
        weights[f"{path}.weight"] = plain.get_submodule(path).weight.detach() + delta
    loss = functional_call(plain, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    got = tiny.loss_of(model, ids)
    got.backward()
    assert got.item() == pytest.approx(loss.item(), rel=1e-12)
    for path, layer in so.adapter_layers(model).items():
        role = path.rpartition(".")[2]
        want = sum(g for other, g in gradients.items() if other.endswith(role))
        assert torch.allclose(layer.pica_M["default"].grad, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_gradient_is_summed_in_float32_over_a_narrow_base(autocast_adapter_dtype):
    model = stack(8).bfloat16()
    config = PiCaConfig(r=4, target_modules=["up", "down"])
    fill(so.attach(model, config, autocast_adapter_dtype=autocast_adapter_dtype))
    x, dy = torch.randn(64, 12).bfloat16(), torch.randn(64, 12).bfloat16()
    model(x).backward(dy)
    untied = copy.deepcopy(model)
    for layer in so.adapter_layers(untied).values():
        layer.pica_M["default"] = nn.Parameter(layer.pica_M["default"].detach().clone())
    untied(x).backward(dy)
    for role in ("up", "down"):
        parts = [getattr(block, role).pica_M["default"].grad for block in untied]
        got, want = getattr(model[0], role).pica_M["default"].grad, sum(part.double() for part in parts)
        narrow = sum((part.bfloat16() for part in parts), torch.zeros((), dtype=torch.bfloat16))
        assert got.dtype == torch.float32 and len(parts) == 8
        assert (got - want).norm() <= 1e-6 * want.norm() < (narrow - want).norm()


def test_copies_stay_tied_among_themselves():
    model, x = attached(), torch.randn(5, 12)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_tied(other)
        assert torch.equal(other(x), want)
        fill(other, 0.3)
        assert torch.equal(model(x), want) and not torch.allclose(other(x), want)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    model, fresh, x = attached(), so.attach(stack(), PiCaConfig(r=4, target_modules=["up", "down"])), torch.randn(5, 12)
    state = copy.deepcopy(model.state_dict())
    assert {f"{i}.up.pica_M.default.weight" for i in range(3)} <= set(state)
    assert not fresh.load_state_dict(state, assign=assign).missing_keys
    assert_tied(fresh)
    assert torch.equal(fresh(x), model(x)) and len(trained(fresh)) == 2


@pytest.mark.parametrize("config", [PiCaConfig(r=4), so.VeRAConfig(r=16)], ids=["pica", "vera"])
def test_what_layers_share_is_saved_once_by_transformers(tiny, config, tmp_path):
    """As in Trainer's checkpoints: safetensors take no tensor twice."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = dataclasses.replace(config, target_modules="all-linear")
    model, ids = fill(so.attach(tiny.llama(), config)), tiny.tokens()
    model.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    for key, count in (("pica_M", 7), ("vera_A", 1), ("vera_B", 1)):
        assert sum(key in name for name in state) == (count if config.peft_type[0].lower() == key[0] else 0)
    fresh = so.attach(tiny.llama(), config)
    assert fresh.load_state_dict(state, strict=False) == ([], [])
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_conversions_and_empty_memory():
    model = attached()
    assert_tied(model.to(torch.float64))
    assert trained(model)[0].dtype == torch.float64
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_tied(empty)
    x = torch.randn(3, 12).double()
    assert torch.equal(empty(x), model(x))


def test_several_adapters_share_each_for_itself():
    model, x = stack(), torch.randn(5, 12)
    fill(so.attach(model, PiCaConfig(r=4, target_modules=["up", "down"]), "first"))
    first = model(x)
    wide = PiCaConfig(r=6, target_modules=["up"], rank_pattern={"up": 5})
    fill(so.attach(model, wide, "second"), 0.3)
    second = model(x)
    assert len(trained(model)) == 1 and trained(model)[0].shape == (20, 5)
    assert_tied(nn.ModuleList(block.up for block in model), "second")
    so.set_adapter(model, "first")
    assert torch.equal(model(x), first) and len(trained(model)) == 2
    so.detach(model, "first")
    assert type(model[0].down) is nn.Linear
    so.set_adapter(model, "second")
    assert torch.equal(model(x), second) and len(trained(model)) == 1
    assert not [key for key in model.state_dict() if "first" in key]
    so.merge(model)
    assert torch.allclose(model(x), second, atol=1e-6)
    so.unmerge(model)
    so.detach(model)
    assert torch.allclose(model(x), stack()(x), atol=1e-6)


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=0.01)
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(16, 12, generator=generator) for _ in range(2))
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_training_resumes():
    whole, _ = train(attached(), 6)
    model = attached()
    start, optimizer = train(model, 3)
    assert len(optimizer.param_groups[0]["params"]) == 2
    again = so.attach(stack(), PiCaConfig(r=4, target_modules=["up", "down"]))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    second = torch.optim.AdamW(trained(again), lr=0.01)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert start + train(again, 3, second)[0] == whole
    assert whole[-1] < whole[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, reentrant):
    ids, results = tiny.tokens(), []
    for use in (False, True):
        config = PiCaConfig(r=4, pica_dropout=0.2, target_modules="all-linear")
        model = fill(so.attach(tiny.llama(), config)).train()
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        tiny.loss_of(model, ids).backward()
        results.append([p.grad for p in trained(model)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_one_graph_of_layers_that_share():
    model, x = attached(2), torch.randn(6, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), trained(model))
    got = torch.autograd.grad(compiled(x).square().sum(), trained(model))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, want, strict=True))


def train_on_half(rank: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    part, results = slice(rank * 8, rank * 8 + 8), []
    model = attached()
    results.append(through_two_steps(nn.parallel.DistributedDataParallel(model), model, part))
    model = attached()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    results.append(through_two_steps(model, model, part))
    return results


def through_two_steps(net, model, part):
    """The shared parameters after two steps on a part of the batch."""
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(16, 12, generator=generator)[part] for _ in range(2))
    for _ in range(2):
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained(model)]
    return [p.detach().tolist() for p in whole]


@pytest.mark.slow
def test_ddp_and_fsdp2_with_half_the_batch_in_each_of_two_processes(tmp_path):
    alone = attached()
    want = through_two_steps(alone, alone, slice(None))
    assert not torch.allclose(torch.tensor(want[0]), trained(attached())[0], atol=1e-2)  # it did train
    for results in in_two_processes(train_on_half, tmp_path):
        assert [len(got) for got in results] == [2, 2]
        for g, w in zip(sum(results, []), want * 2, strict=True):
            assert torch.allclose(torch.tensor(g), torch.tensor(w), atol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_every_projection_and_each_m_once(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = attached(), torch.randn(5, 12)
    so.save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    layers = {f"base_model.model.{i}.{role}.pica_P" for i in range(3) for role in ("up", "down")}
    assert set(tensors) == layers | {"base_model.pica_M.up", "base_model.pica_M.down"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PICA"

    def refuse(*_args, **_options):
        raise AssertionError("the decomposition was computed again")

    monkeypatch.setattr(pica, "truncated_svd", refuse)
    again = so.load_adapter(stack(), tmp_path)
    assert torch.equal(again(x), model(x)) and len(trained(again)) == 2
    assert_tied(again)
    longer = so.load_adapter(stack(), tmp_path, "other")
    assert all(torch.equal(a, b) for a, b in zip(trained(longer), trained(model), strict=True))
    other = nn.Sequential(Block(), nn.ModuleDict({"up": nn.Linear(12, 21), "down": nn.Linear(20, 12)}))
    with pytest.raises(
        ValueError, match=r"does not fit this model: .*got '1.up' \[21, 12\].* beside '0.up' \[20, 12\]"
    ):
        so.load_adapter(other, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(bits, tmp_path):
    own = so.attach(quantised(bits), PiCaConfig(r=4, target_modules=["0"]))[0]
    _, _, Vh = torch.linalg.svd(own.full_matrix())
    assert torch.allclose((own.pica_P["default"] @ Vh[:4].T).abs(), torch.eye(4), atol=1e-4)
    net = quantised(bits)
    dense = fill(so.attach(nn.Sequential(nn.Linear(64, 64)), PiCaConfig(r=4, target_modules=["0"])))
    so.save_adapter(dense, tmp_path)
    so.load_adapter(net, tmp_path)
    x, dy = torch.randn(6, 64), torch.randn(6, 64)
    P, M = dense[0].pica_P["default"], dense[0].pica_M["default"]
    assert torch.allclose(net(x), net[0].base_layer(x) + x @ P.T @ M.T, atol=1e-5)
    net(x).backward(dy)
    assert torch.allclose(net[0].pica_M["default"].grad, dy.T @ (x @ P.T), atol=1e-4)


# --- the operator ----------------------------------------------------------------------------------------------------


@sides
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_output_and_gradients_are_those_of_the_dense_formula(side, p):
    layer = PiCaLinear.from_linear(nn.Linear(14, 9).double(), PiCaConfig(r=3, side=side, pica_dropout=p))
    fill(layer)
    x, dy = torch.randn(2, 5, 14).double().requires_grad_(), torch.randn(2, 5, 9).double()
    P, M = layer.pica_P["default"], layer.pica_M["default"]
    keep = 1.0
    if p:
        torch.manual_seed(4)
        keep = philox.keep_mask(10, 14, autograd.draw_seed(x, p, True), p).double().reshape(x.shape) / (1 - p)
    delta = M @ P if side == "input" else P @ M
    want = x @ layer.weight.T + layer.bias + (keep * x) @ delta.T
    wanted = torch.autograd.grad(want, [x, M], dy)
    torch.manual_seed(4)
    got = layer(x)
    gradients = torch.autograd.grad(got, [x, M], dy)
    for g, w in zip([got, *gradients], [want, *wanted], strict=True):
        assert torch.allclose(g, w, rtol=1e-12, atol=1e-12)


def test_what_is_saved_for_backward():
    for side, saves_x in (("input", False), ("output", True)):  # a frozen A has no gradient that would read x
        layer = fill(PiCaLinear.from_linear(nn.Linear(40, 30), PiCaConfig(r=3, side=side)))
        x = torch.randn(50, 40, requires_grad=True)
        with saved_tensors() as kept:
            layer(x)
        constants = {p.data_ptr() for p in layer.parameters()}
        shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in constants]
        assert shapes == [(50, 40)] if saves_x else shapes == [(50, 3)]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": "all-linear"},
            r"got '1.up' \[12, 8\] with r=4 beside '0.up' \[20, 12\] with r=4, wanted one",
        ),
        ({"target_modules": ["down"], "rank_pattern": {"1.down": 3}}, r"got '1.down' .* r=3 beside '0.down' .* r=4"),
        ({"target_modules": ["0.up"], "r": 13}, r"0.up: PiCaConfig\.r: got 13, wanted at most 12"),
    ],
)
def test_layers_that_cannot_share(fields, message, monkeypatch):
    model = stack(2)
    if "r" not in fields:
        monkeypatch.setattr(pica, "truncated_svd", None)  # the error comes before any decomposition
        model[1].up = nn.Linear(8, 12) if fields["target_modules"] == "all-linear" else model[1].up
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        so.attach(model, PiCaConfig(**{"r": 4, **fields}))
    assert not so.adapter_layers(model)
    assert all(
        torch.equal(p, q) and p.requires_grad for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": "left"}, r"PiCaConfig\.side: got 'left', wanted \"input\" or \"output\""),
        ({"niter": -1}, r"PiCaConfig\.niter: got -1, wanted at least 0"),
        ({"pica_dropout": 1.0}, r"PiCaConfig\.pica_dropout: got 1\.0"),
        ({"rank_pattern": [3]}, r"PiCaConfig\.rank_pattern: got \[3\], wanted a dict"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: got 0, wanted at least 1"),
        ({"bias": "lora_only"}, "wanted one of 'none', 'all', 'pica_only'"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PiCaConfig(**fields)
