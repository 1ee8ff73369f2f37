"""RoSALinear beyond what every method is tested for: its gradients, W + S resident in W, files, quantised bases."""

import copy
import functools
import io
import json
import pickle

import pytest
import torch
from models import Conv1D, quantised, trained
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import spectral_ops as so
from spectral_ops import RoSAConfig, RoSALinear, RoSASchedule, residents
from spectral_ops.functional import rosa_routes
from spectral_ops.init import topk_pattern

D, K = 20, 14
routes_of_s = pytest.mark.parametrize("route", ["spmm", "scatter", "resident"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nobody_left():
    yield
    residents._by_memory.clear()


def fill(module, name="default", scale=0.1):
    """Random masks and adapters."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, RoSALinear) and name in layer.settings:
                if name in layer.rosa_values:
                    places = torch.rand(layer.out_features, layer.in_features)
                    layer.set_mask(topk_pattern(places, layer.rosa_values[name].numel()), name)
                for key in layer.tensor_keys:
                    if name in getattr(layer, key):
                        getattr(layer, key)[name].add_(scale * torch.randn(getattr(layer, key)[name].shape))
    return module


def make(route="spmm", dtype=torch.float64, transposed=False, **fields):
    base = (Conv1D(D, K) if transposed else nn.Linear(K, D)).to(dtype)
    return fill(RoSALinear.from_linear(base, RoSAConfig(**{"r": 3, "d": 0.2, "route": route, **fields})))


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(K, D), nn.GELU(), nn.Linear(D, 12), nn.GELU(), nn.Linear(12, 6))


def model(route="resident", **fields):
    torch.manual_seed(4)
    fields = {"r": 3, "d": 0.2, "target_modules": ["0", "2"], "route": route, **fields}
    return fill(so.attach(mlp(), RoSAConfig(**fields)))


def weights(module):
    """Every base weight as it is in memory."""
    return [layer.base_layer.weight.detach().clone() for layer in so.adapter_layers(module).values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


ORIGINAL = [mlp()[i].weight.detach().clone() for i in (0, 2)]


# --- numbers ---------------------------------------------------------------------------------------------------------


@routes_of_s
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("schedule", ["default", "spa_only"])
def test_the_gradient_of_the_values_is_the_masked_dense_gradient(route, transposed, schedule):
    layer = make(route, transposed=transposed, schedule=schedule)
    x, dy = torch.randn(9, K, dtype=torch.float64, requires_grad=True), torch.randn(9, D, dtype=torch.float64)
    csr, mask = layer.csr(), layer.csr().to_dense() != 0
    W = (layer.matrix + csr.to_dense()).detach().requires_grad_()
    if schedule == "default":
        scale = layer.settings["default"].scaling
        low = scale * (x @ layer.lora_A["default"].T) @ layer.lora_B["default"].T
    else:
        assert trained(layer) == [layer.rosa_values["default"]]
        low = 0
    want = x @ W.T + low + layer.bias
    dW, dx = torch.autograd.grad(want, [W, x], dy, retain_graph=True)
    got = layer(x)
    grads = torch.autograd.grad(got, [layer.rosa_values["default"], x], dy)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(grads[0], dW[mask], rtol=1e-12, atol=1e-12)
    assert torch.allclose(grads[1], dx, rtol=1e-12, atol=1e-12)


def test_s_takes_no_part_without_a_mask():
    layer = RoSALinear.from_linear(nn.Linear(K, D), RoSAConfig(r=3, d=0.2))
    values = layer.rosa_values["default"]
    assert layer.csr() is None and "no mask yet" in repr(layer) and values.shape == (56,) and values.requires_grad
    with torch.no_grad():
        values.fill_(7.0)
    x = torch.randn(5, K)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).sum().backward()
    assert values.grad is None and layer.lora_B["default"].grad is not None
    layer.set_mask(topk_pattern(torch.rand(D, K), 56))
    assert not values.any() and "no mask" not in repr(layer)  # a mask starts at zero
    layer(x).sum().backward()
    assert values.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_w_plus_everything_cast_once(dtype):
    layer = make("resident", dtype)
    W = layer.weight.detach().double()
    scale = layer.settings["default"].scaling
    delta = (
        layer.csr().to_dense().double() + scale * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    )
    layer(torch.randn(3, K).to(dtype))
    assert residents.holds(layer.base_layer.weight)
    assert torch.allclose(layer.delta_weight().double(), delta, atol=1e-6)
    layer.merge(keep_base=True)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(layer.base_layer.weight.double(), W + delta, rtol=eps, atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight.double(), W)


def test_explicit_masks():
    layer = RoSALinear.from_linear(nn.Linear(3, 2), RoSAConfig(r=1, d=0.5))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    layer.set_mask(mask)
    assert torch.equal(layer.csr().with_values(torch.ones(3)).to_dense().bool(), mask)
    with pytest.raises(ValueError, match=r"mask: got 2 entries, wanted 3 \(density 0.5 of \(2, 3\)\)"):
        layer.set_mask(torch.tensor([[True, False, True], [False, False, False]]))
    with pytest.raises(ValueError, match=r"mask: got \[2, 3\] float32"):
        layer.set_mask(mask.float())
    index = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 5, 1], dtype=torch.int32)
    with pytest.raises(IndexError, match="col_indices: got columns 0 to 5, wanted 0 to 2"):
        layer.set_mask(index)
    assert torch.equal(layer.csr().with_values(torch.ones(3)).to_dense().bool(), mask)
    lora = RoSALinear.from_linear(nn.Linear(3, 2), RoSAConfig(r=1, schedule="lora_only"))
    with pytest.raises(ValueError, match="'default', which has no sparse part"):
        lora.set_mask(mask)


def test_indices_are_checked_once(monkeypatch):
    layer, calls = make(), []
    check = so.CSR._check_indices
    monkeypatch.setattr(so.CSR, "_check_indices", lambda self: (calls.append(1), check(self))[1])
    x = torch.randn(4, K, dtype=torch.float64)
    for _ in range(3):
        layer(x).sum().backward()
    assert not calls
    layer.load_state_dict(layer.state_dict())  # writes the indices in place
    layer(x)
    layer(x)
    assert len(calls) == 1
    with torch.no_grad():
        layer.rosa_col_indices["default"][0] = 99
    with pytest.raises(IndexError, match="col_indices: got columns"):
        layer(x)


def test_an_optimizer_made_before_the_mask_trains_it():
    net = so.attach(mlp(), RoSAConfig(r=3, d=0.2, target_modules=["0", "2"]))
    optimizer = torch.optim.SGD(trained(net), lr=0.1)
    RoSASchedule(net, optimizer)
    for _ in range(3):
        net(torch.randn(8, K)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.rosa_values["default"].any() for layer in so.adapter_layers(net).values())


# --- W + S resident in W ---------------------------------------------------------------------------------------------


def pair(route="resident"):
    """Two equal models, the second on the spmm route."""
    return model(route), model("spmm")


def test_resident_training_is_training_by_spmm():
    found = []
    for net in pair():
        optimizer = torch.optim.AdamW(trained(net), lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for _ in range(2):
                net(torch.randn(5, K, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in trained(net)])
        assert same([layer.weight for layer in so.adapter_layers(net).values()], ORIGINAL)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


RESTORING = {
    "state_dict": lambda net: net.state_dict(),
    "weight": lambda net: [layer.weight for layer in so.adapter_layers(net).values()],
    "matrix": lambda net: [layer.matrix for layer in so.adapter_layers(net).values()],
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to": lambda net: net.to(torch.float32),
    "detach": so.detach,
    "set_adapter": lambda net: so.set_adapter(net, "default"),
    "load_state_dict": lambda net: net.load_state_dict(net.state_dict()),
    "disabled": lambda net: so.disabled(net).__enter__(),
}


@pytest.mark.parametrize("what", RESTORING)
def test_w_is_back_bit_for_bit(what):
    net = model()
    bases = [layer.base_layer for layer in so.adapter_layers(net).values()]
    net(torch.randn(3, K)).sum().backward()
    assert not any(same([b.weight], [w]) for b, w in zip(bases, ORIGINAL, strict=True))  # W + S at the moment
    RESTORING[what](net)
    assert same([b.weight for b in bases], ORIGINAL) and not residents._by_memory


def test_no_copy_or_file_ever_holds_the_delta(tmp_path):
    net, x = model(), torch.randn(3, K)
    want = net(x)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert same([state["0.base_layer.weight"], state["2.base_layer.weight"]], ORIGINAL)
    net(x)
    twin = copy.deepcopy(net)
    net(x)
    again = pickle.loads(pickle.dumps(net))
    net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=False)
    for other in (twin, again, stored):
        assert same(weights(other), ORIGINAL)
        assert torch.allclose(other(x), want, atol=1e-6)
    net(x)
    so.save_adapter(net, tmp_path)
    loaded = so.load_adapter(mlp(), tmp_path)  # check_base compares samples of W
    assert torch.allclose(loaded(x), want, atol=1e-6)
    net(x)
    so.merge(net)
    assert torch.allclose(net(x), want, atol=1e-5) and not residents.holds(net[0].base_layer.weight)
    so.unmerge(net)
    assert torch.allclose(net(x), want, atol=1e-5)
    fresh = so.attach(mlp(), RoSAConfig(r=3, d=0.2, target_modules=["0", "2"], route="resident"))
    fresh(x)
    fresh.load_state_dict(state)
    assert same(weights(fresh), ORIGINAL) and torch.allclose(fresh(x), want, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_resident_in_inference_mode(transposed):
    layer, x = make("resident", transposed=transposed), torch.randn(3, K, dtype=torch.float64)
    before = layer.weight.detach().clone()
    with torch.inference_mode():
        want = layer(x)
        assert not torch.equal(layer.base_layer.weight, before)
    assert torch.allclose(layer(x), want)
    layer(x).sum().backward()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("first", ["policy", "reference"])
@pytest.mark.parametrize("route", ["resident", "auto"])
def test_a_disabled_forward_between_a_forward_and_its_backward(route, first, grad):
    """DPO and PPO: the reference is the same model without adapters."""
    found = []
    for net in pair(route):
        for layer in so.adapter_layers(net).values():
            layer.bias.requires_grad_()  # so that the reference has a graph and, through it, needs W in its backward
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def reference(net=net, x=x):
            with so.disabled(net), torch.set_grad_enabled(grad):
                return net(x)

        one, other = (net(x), reference()) if first == "policy" else (reference(), net(x))
        (one.square().sum() + one.sigmoid().sum() * other.square().sum()).backward()
        found.append([one, other, x.grad, *[p.grad for p in trained(net)]])
        assert same([layer.weight for layer in so.adapter_layers(net).values()], ORIGINAL)
    with torch.no_grad():
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(found[0][first == "policy"], mlp()(x), atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_restored_backward_is_right_after_every_kind_of_interruption():
    for interrupt in (RESTORING["state_dict"], RESTORING["weight"], copy.deepcopy, lambda net: net(torch.randn(2, K))):
        found = []
        for net in pair():
            x = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = net(x)
            interrupt(net)
            y.square().sum().backward()
            found.append([x.grad, *[p.grad for p in trained(net)]])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_backward_with_the_values_of_another_step_raises():
    net = model()
    optimizer = torch.optim.SGD(trained(net), lr=0.1)
    x = torch.randn(3, K, requires_grad=True)
    old = net(x)
    net(x).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError):
        old.sum().backward()
    assert not residents._by_memory or same([layer.weight for layer in so.adapter_layers(net).values()], ORIGINAL)


def test_an_exception_in_forward_or_backward_leaves_w(monkeypatch):
    net, x = model(), torch.randn(3, K, requires_grad=True)
    layer = net[0]
    with pytest.raises((RuntimeError, ValueError)):
        net(torch.randn(3, K + 1))
    assert same(weights(net), ORIGINAL)

    def fail(*_args):
        assert residents.holds(layer.base_layer.weight)
        raise KeyError("stop")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("spectral_ops.functional.rosa.rosa_linear_forward_op", fail)
        net(x)
    assert same(weights(net), ORIGINAL)
    y = net(x)
    with pytest.raises(RuntimeError):
        y.backward(torch.randn(3, 7))
    y.sum().backward()
    assert same([unit.weight for unit in so.adapter_layers(net).values()], ORIGINAL)


@routes_of_s
def test_two_adapters_on_one_layer(route):
    net, x = model(route), torch.randn(4, K)
    first = net(x)
    so.attach(net, RoSAConfig(r=2, d=0.1, target_modules=["0", "2"], route=route), "second")
    fill(net, "second")
    second = net(x)
    assert not torch.allclose(first, second, atol=1e-3)
    for _ in range(2):
        so.set_adapter(net, "default")
        assert torch.allclose(net(x), first, atol=1e-6)
        so.set_adapter(net, "second")
        assert torch.allclose(net(x), second, atol=1e-6)
    with so.disabled(net):
        assert torch.allclose(net(x), mlp()(x), atol=1e-6)
    so.detach(net, "second")
    assert same(weights(net), ORIGINAL)
    so.set_adapter(net, "default")
    assert torch.allclose(net(x), first, atol=1e-6)


@pytest.mark.parametrize("routes_", [("resident", "resident"), ("resident", "spmm"), ("scatter", "resident")])
def test_two_layers_over_one_weight(routes_):
    linear, x = nn.Linear(K, D), torch.randn(4, K, requires_grad=True)
    config = [RoSAConfig(r=3, d=0.2, route=route) for route in routes_]
    layers = [fill(RoSALinear.from_linear(linear, c)) for c in config]
    W = linear.weight.detach().clone()
    want = []
    for layer in layers:
        full = W + layer.delta_weight()
        want.append(x @ full.T + linear.bias)
        layer.release()
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        for i in order:
            assert torch.allclose(layers[i](x), want[i], atol=1e-5)
    got = [layer(x) for layer in layers]
    if "spmm" not in routes_ and "scatter" not in routes_:  # these save W itself, and autograd watches it
        dx = torch.autograd.grad(sum(y.square().sum() for y in got), x)[0]
        assert torch.allclose(dx, torch.autograd.grad(sum(y.square().sum() for y in want), x)[0], atol=1e-4)
    with torch.no_grad():
        for layer in layers:
            assert torch.allclose(layer.original(x), linear(x)) and torch.equal(linear.weight, W)


def tied():
    net = nn.ModuleDict({"embed": nn.Embedding(D, K), "other": nn.Linear(K, D), "head": nn.Linear(K, D)})
    net["head"].weight = net["embed"].weight
    return net


def test_a_tied_weight():
    net = tied()
    with pytest.raises(ValueError, match=r'head: route: got "resident" on a weight that \'embed\' also reads'):
        so.attach(net, RoSAConfig(r=2, d=0.1, target_modules=["other", "head"], route="resident"))
    assert isinstance(net["head"], nn.Linear) and isinstance(net["other"], nn.Linear)
    so.attach(net, RoSAConfig(r=2, d=0.1, target_modules=["other", "head"]))
    assert (net["head"].sharing, net["other"].sharing) == (["embed"], [])
    assert not net["head"].may_reside("default") and net["other"].may_reside("default")
    fill(net)
    before = net["embed"].weight.detach().clone()
    net["head"](torch.randn(64, K)).sum().backward()
    assert torch.equal(net["embed"].weight, before)


def test_a_weight_that_is_part_of_a_larger_one():
    """Some loaders make all weights views of one buffer."""
    net = nn.Sequential(nn.Linear(K, D), nn.Linear(K, D))
    whole = torch.randn(2 * D, K)
    for i, linear in enumerate(net):
        linear.weight = nn.Parameter(whole[i * D : (i + 1) * D])
    so.attach(net, RoSAConfig(r=2, d=0.1, target_modules="all-linear"))
    assert (net[0].sharing, net[1].sharing) == (["1"], ["0"])
    assert not net[0].may_reside("default") and not net[1].may_reside("default")


# --- which route "auto" takes ----------------------------------------------------------------------------------------


def fast_resident(monkeypatch, beyond=0):
    def choose(T, d, k, nnz, device_type, dtype, *, resident=False):
        return "resident" if resident and beyond < T else "spmm"

    monkeypatch.setattr(rosa_routes, "forward_route", choose)


def test_auto_is_resident_only_where_nothing_else_reads_the_weight(monkeypatch):
    fast_resident(monkeypatch)
    x = torch.randn(3, K)
    for grad in (True, False):
        net = model("auto")
        with torch.set_grad_enabled(grad):
            net(x)
        assert len(residents._by_memory) == 2
        net[0].release(), net[2].release()
    alone = make("auto", torch.float32)
    alone(x)
    assert not residents._by_memory  # not attached to a model: who knows who else reads it
    net = model("auto")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    net(x)
    assert not residents._by_memory
    with pytest.raises(ValueError, match='route: got "resident" in a process group, where a weight may be sharded'):
        model("resident")(x)


def test_auto_keeps_one_route_among_the_graphs_of_a_step(monkeypatch):
    """A weight that one route saved for its backward must not be written by the other before it."""
    fast_resident(monkeypatch, beyond=4)
    for sizes in ((2, 9), (9, 2)):
        net, plain = pair("auto")
        losses = []
        for m in (net, plain):
            generator = torch.Generator().manual_seed(1)
            xs = [torch.randn(n, K, generator=generator) for n in sizes]
            ys = [m(x) for x in xs]
            assert m is plain or bool(residents._by_memory) == (sizes[0] > 4)
            sum(y.square().sum() for y in ys).backward()
            losses.append([p.grad for p in trained(m)])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*losses, strict=True))
        torch.optim.SGD(trained(net), lr=0.0).step()
        net(torch.randn(sizes[1], K))
        assert bool(residents._by_memory) == (sizes[1] > 4)  # a new step chooses anew
        net.eval()
        with torch.no_grad():
            for n, held in ((2, False), (9, True), (1, False)):
                net(torch.randn(n, K))
                assert bool(residents._by_memory) == held
        for layer in so.adapter_layers(net).values():
            layer.release()


def test_compiled_code_never_sees_the_delta(monkeypatch):
    fast_resident(monkeypatch)
    net, x = model("auto"), torch.randn(3, K)
    want = model("spmm")(x)
    other = model("auto")
    other(x)
    assert len(residents._by_memory) == 2  # of a model that is not compiled
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), want, atol=1e-6) and len(residents._by_memory) == 2
    so.detach(other)
    assert torch.allclose(net(x), want, atol=1e-6) and residents._by_memory
    loose = torch.compile(net, backend="eager")
    assert torch.allclose(loose(x), want, atol=1e-6) and not residents._by_memory
    torch._dynamo.reset()
    with pytest.raises(Exception, match='route: got "resident" in compiled code'):
        torch.compile(model("resident"), backend="eager", fullgraph=True)(x)


def test_a_copy_can_be_compiled_at_once():
    net, x = model("spmm"), torch.randn(3, K)
    torch._dynamo.reset()
    other = copy.deepcopy(net)
    assert torch.allclose(torch.compile(other, backend="eager", fullgraph=True)(x), net(x), atol=1e-6)


def run_once(net, run, size=5, dtype=torch.float32):
    x = torch.randn(size, K, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    for p in trained(net):
        p.grad = None
    y = run(net, x)
    y.square().sum().backward()
    return [y, x.grad, *[p.grad for p in trained(net)]]


@pytest.mark.parametrize("how", ["early stop", "no early stop", "reentrant"])
def test_resident_under_checkpointing(how):
    net = model()
    want = run_once(net, lambda net, x: net(x))
    with set_checkpoint_early_stop(how == "early stop"):
        assert same(run_once(net, functools.partial(checkpoint, use_reentrant=how == "reentrant")), want)
    assert residents._by_memory
    assert same([layer.weight for layer in so.adapter_layers(net).values()], ORIGINAL)


@pytest.mark.parametrize("route", ["resident", "auto"])
@pytest.mark.parametrize("saves", [lambda op: op.namespace == "aten", lambda op: op.namespace != "aten", bool])
def test_no_weight_is_resident_under_selective_checkpointing(monkeypatch, route, saves):
    """The scatter route stands in, with the numbers of a plain step bit for bit, which may have left W + S in W."""
    fast_resident(monkeypatch)
    net = model(route)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saves(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(net, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
        assert not residents._by_memory
        return y

    want = run_once(net, lambda net, x: net(x))
    assert len(residents._by_memory) == 2
    for _ in range(2):
        assert same(run_once(net, selective), want)
        assert not residents._by_memory
        assert same(weights(net), ORIGINAL)


@pytest.mark.parametrize("route", ["resident", "auto"])
def test_under_autocast_the_base_weight_is_cast_and_not_what_it_holds(monkeypatch, route):
    fast_resident(monkeypatch)
    net = model(route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = run_once(net, lambda net, x: net(x))
        run_once(net, lambda net, x: net(x))
    with torch.autocast("cpu", enabled=False):
        run_once(net, lambda net, x: net(x))
    assert not same(weights(net), ORIGINAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.allclose(a, b) for a, b in zip(run_once(net, lambda net, x: net(x)), want, strict=True))
    assert same([layer.weight for layer in so.adapter_layers(net).values()], ORIGINAL)


def test_fsdp_swaps_the_values_and_no_index_is_checked_again(monkeypatch):
    """Under fully_shard each forward finds another parameter of the same name."""
    layer, x = make(), torch.randn(3, K, dtype=torch.float64)
    want, calls = layer(x), []
    monkeypatch.setattr(so.CSR, "_check_indices", lambda self: calls.append(1))
    layer.rosa_values["default"] = nn.Parameter(layer.rosa_values["default"].detach().clone())
    got = layer(x)
    got.sum().backward()
    assert torch.equal(got, want) and layer.rosa_values["default"].grad is not None and not calls


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    so.save_adapter(model("auto"), tmp_path)
    return tmp_path


def edit(path, change):
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, tensors)
    save_file(tensors, file)


P = "base_model.model.2.rosa_"
DAMAGE = {
    "short": (lambda s, t: t.update({P + "col_indices": t[P + "col_indices"][:-1]}), ValueError, r"\[47\], wanted"),
    "missing": (lambda s, t: t.pop(P + "row_offsets"), ValueError, "got no .*2.rosa_row_offsets"),
    "far": (lambda s, t: t[P + "col_indices"].fill_(99), IndexError, "2: col_indices: got columns 99 to 99"),
    "negative": (lambda s, t: t[P + "col_indices"].fill_(-1), IndexError, "2: col_indices: got columns -1"),
    "offsets": (lambda s, t: t[P + "row_offsets"].add_(1), ValueError, "2: row_offsets: got 1 as its first entry"),
    "ends": (lambda s, t: t[P + "row_offsets"][-1:].fill_(7), ValueError, "2: row_offsets: got 7 as its last entry"),
    "order": (lambda s, t: t.update({P + "col_indices": t[P + "col_indices"].flip(0)}), ValueError, "2: col_indices"),
    "zeroed": (lambda s, t: t[P + "row_offsets"].zero_(), ValueError, "2: row_offsets: got 0 as its last entry"),
    "dtype": (
        lambda s, t: t.update({P + "col_indices": t[P + "col_indices"].long()}), ValueError, "int64, wanted .*int32",
    ),
    "floats": (
        lambda s, t: t.update({P + "row_offsets": t[P + "row_offsets"].float()}), ValueError, "float32, wanted .*int32",
    ),
    "values": (lambda s, t: t.update({P + "values": t[P + "values"].int()}), ValueError, "wanted floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_indices_are_reported_and_the_model_untouched(saved, damage):
    change, error, message = DAMAGE[damage]
    edit(saved, change)
    net = mlp()
    with pytest.raises(error, match=message):
        so.load_adapter(net, saved)
    assert [type(m) for m in net] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]


def test_files_without_a_mask_and_with_paths(tmp_path):
    paths = {"mask_save_path": "m", "terminate_after_mask_generation": True}
    net = so.attach(mlp(), RoSAConfig(r=3, d=0.2, target_modules=["0"], schedule="wl64", **paths))
    so.save_adapter(net, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "ROSA" and fields["schedule"] == "wl64" and not any(fields[name] for name in paths)
    again = so.load_adapter(mlp(), tmp_path)
    assert again[0].csr() is None and RoSASchedule(again).phase == "warmup"


# --- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_a_quantised_base(bits, dtype):
    net = fill(so.attach(quantised(bits, dtype), RoSAConfig(r=3, d=0.05, target_modules=["0"])))
    layer = net[0]
    x, dy = torch.randn(6, 64).to(dtype).requires_grad_(), torch.randn(6, 64).to(dtype)
    got = net(x)
    grads = torch.autograd.grad(got, [layer.rosa_values["default"], layer.lora_B["default"], x], dy)
    S, scale = layer.csr().to_dense().double(), layer.settings["default"].scaling
    A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
    base = layer.base_layer(x)
    want = base.double() + x.double() @ (S + scale * B @ A).T
    dx = torch.autograd.grad(base, x, dy)[0].double() + dy.double() @ (S + scale * B @ A)
    wanted = [(dy.double().T @ x.double())[S != 0], scale * dy.double().T @ (x.double() @ A.T), dx]
    for g, w in zip([got, *grads], [want, *wanted], strict=True):
        assert (g.double() - w).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * w.norm()
    with so.disabled(net):
        assert torch.equal(net(x), layer.base_layer(x))
    packed = layer.base_layer.weight.data.clone()
    so.merge(net)
    assert not torch.equal(layer.base_layer.weight.data, packed)
    assert torch.equal(so.unmerge(net)[0].base_layer.weight.data, packed)
    assert not residents._by_memory


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mask_over_a_quantised_base(bits, tmp_path):
    net = so.attach(quantised(bits), RoSAConfig(r=3, d=0.05, target_modules=["0"]))
    schedule, x, dy = RoSASchedule(net), torch.randn(6, 64), torch.randn(6, 64)
    net(x).backward(dy)
    schedule.step()
    csr = net[0].csr()
    want = topk_pattern((dy.T @ x).square(), csr.nnz)
    assert torch.equal(csr.row_offsets, want[0]) and torch.equal(csr.col_indices, want[1])
    fill_values = torch.randn(csr.nnz)
    with torch.no_grad():
        net[0].rosa_values["default"].copy_(fill_values)
    so.save_adapter(net, tmp_path)
    again = so.load_adapter(quantised(bits), tmp_path)
    assert torch.allclose(again(x), net(x), atol=1e-6)


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d": 1.5}, r"RoSAConfig\.d: got 1\.5, wanted a density in \[0, 1\]"),
        ({"d": "dense"}, r"RoSAConfig\.d: got 'dense'"),
        ({"density_pattern": {"q": -1}}, r"density_pattern\['q'\]: got -1, wanted a density"),
        ({"density_pattern": 0.5}, "density_pattern: got 0.5, wanted a dict"),
        ({"schedule": "wl"}, "schedule: got 'wl', wanted \"default\""),
        ({"schedule": None}, "schedule: got None"),
        ({"grad_acc_mode": "max"}, "grad_acc_mode: got 'max', wanted one of 'mean_squared', 'mean'"),
        ({"route": "fast"}, "route: got 'fast', wanted one of 'auto', 'resident', 'scatter', 'spmm'"),
        ({"spa_num_grads": 0}, "spa_num_grads: got 0, wanted at least 1"),
        ({"mask_load_path": "a", "mask_save_path": "b"}, "mask_load_path: got 'a', wanted None"),
        ({"terminate_after_mask_generation": True}, "mask_save_path: got None, wanted a file"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', wanted True, False"),
        ({"bias": "lora_only"}, "wanted one of 'none', 'all', 'rosa_only'"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RoSAConfig(**fields)


def test_the_number_of_entries_is_the_authors():
    layer = RoSALinear.from_linear(nn.Linear(2048, 3), RoSAConfig(d=0.006))
    assert layer.rosa_values["default"].numel() == int(0.006 * 3 * 2048) and layer.csr() is None
    assert "density=0.006, nnz=36, route=auto, no mask yet" in repr(layer)
