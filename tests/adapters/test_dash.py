"""LoRA-Dash beyond what every method is tested for: scores, when it launches, resuming, ranks, quantised bases."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from instruments import Recorder
from models import Conv1D, mlp, perturb, trained
from processes import in_two_processes
from tensors import accumulate
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import spectral_ops as so
from spectral_ops import LoRADashConfig, LoRADashLinear, task_direction_scores
from spectral_ops.adapters import dash, quantised

D, K = 20, 14

pytestmark = pytest.mark.usefixtures("one_thread")


def make(dtype=torch.float64, transposed=False, launch=True, **fields):
    """A layer that has learnt something, launched, with Δσ trained too."""
    base = (Conv1D(D, K) if transposed else nn.Linear(K, D)).to(dtype)
    fields = {"r": 3, "lora_alpha": 4, "directions": 4, **fields}
    layer = perturb(LoRADashLinear.from_linear(base, LoRADashConfig(**fields)), 0.3)
    if launch:
        layer.launch()
        perturb(layer, 0.3)
    return layer


def attached(**fields):
    torch.manual_seed(3)
    return so.attach(mlp(K, D, 2), LoRADashConfig(**{"r": 3, "directions": 4, "target_modules": ["0", "2"], **fields}))


def layers(model):
    return list(so.adapter_layers(model).values())


def launched(model):
    return [layer.launched() for layer in layers(model)]


def step(model, optimizer, generator, micro_batches=1):
    for _ in range(micro_batches):
        x = torch.randn(8, K, generator=generator)
        (model(x) - x[:, :12].cos()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- scores ----------------------------------------------------------------------------------------------------------


def dense_scores(W, A, B, scale):
    """δ in float64, one direction after the other, from ΔW."""
    delta = scale * B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    scores = [abs(U[:, i] @ delta @ Vh[i]) / (S[i] + 1e-6) for i in range(len(S))]
    return torch.stack(scores), U, S, Vh


@pytest.mark.parametrize("shape", [(20, 14), (14, 20), (9, 9), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_dense_update(shape, dtype):
    (d, k), r = shape, 3
    W, A, B = torch.randn(d, k), torch.randn(r, k).to(dtype), torch.randn(d, r).to(dtype)
    want, U, S, Vh = dense_scores(W, A, B, -1.7)
    wide = accumulate(dtype)
    got = task_direction_scores(A, B, U.to(wide), S.to(wide), Vh.to(wide), -1.7)
    assert got.dtype == wide and got.shape == (min(d, k),) and (got >= 0).all()
    assert (got - want).norm() <= (1e-12 if wide == torch.float64 else 1e-5) * want.norm()


def test_scores_never_form_the_update():
    A, B = torch.randn(3, 40), torch.randn(30, 3)
    U, S, Vh = torch.linalg.svd(torch.randn(30, 40), full_matrices=False)
    with Recorder() as recorder:
        task_direction_scores(A, B, U[:, :7], S[:7], Vh[:7], 2.0)
    assert max(math.prod(shape) for shape in recorder.shapes()) == 7 * 3


def test_a_direction_that_the_weight_lacks_does_not_divide_by_zero():
    U, S, Vh = torch.eye(4), torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.eye(4)
    got = task_direction_scores(torch.eye(4)[:3], torch.eye(4)[:, :3], U, S, Vh)
    assert torch.allclose(got, torch.tensor([0.5, 1.0, 1e6, 0.0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_A": torch.zeros(3)}, ValueError, r"lora_A: got \[3\] .* wanted 2 dimensions"),
        ({"lora_A": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "lora_A: got .*int32"),
        ({"lora_B": torch.zeros(5, 2)}, ValueError, "lora_B: got .*wanted size 3 in dimension 1"),
        ({"U": torch.zeros(6, 4)}, ValueError, "U: got .*wanted size 5 in dimension 0"),
        ({"U": torch.zeros(5, 3)}, ValueError, "U: got .*wanted size 4 in dimension 1"),
        ({"Vh": torch.zeros(3, 4)}, ValueError, "Vh: got .*wanted size 4 in dimension 0"),
        ({"Vh": torch.zeros(4, 5)}, ValueError, "Vh: got .*wanted size 4 in dimension 1"),
        ({"S": torch.zeros(4, 1)}, ValueError, "S: got .*wanted 1 dimensions"),
        ({"S": torch.zeros(4, device="meta")}, ValueError, "S: got a tensor on meta"),
        ({"scale": "1"}, TypeError, "scale: got '1'"),
    ],
)
def test_bad_arguments_of_the_scores(change, error, message):
    arguments = {
        "lora_A": torch.zeros(3, 4), "lora_B": torch.zeros(5, 3), "U": torch.zeros(5, 4), "S": torch.zeros(4),
        "Vh": torch.zeros(4, 4), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        task_direction_scores(**{**arguments, **change})


# --- the launch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_launch_chooses_what_the_dense_reference_does(dtype, transposed, use_rslora):
    layer = make(dtype, transposed, launch=False, use_rslora=use_rslora)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    W = layer.matrix.detach().clone()
    scores, U, _, Vh = dense_scores(W, A, B, 4 / (3**0.5 if use_rslora else 3))
    before = layer(torch.eye(K, dtype=dtype))
    layer.launch()
    order = scores.argsort(descending=True)[:4]
    chosen, atol = layer.dash_U["default"].double(), 1e-10 if dtype == torch.float64 else 1e-4
    for j, i in enumerate(order):  # a direction is a pair of vectors up to one sign for both
        want = torch.outer(U[:, i], Vh[i])
        assert torch.allclose(torch.outer(chosen[:, j], layer.dash_V["default"][j].double()), want, atol=atol)
    assert not layer.dash_delta["default"].any() and layer.launched()
    assert torch.equal(layer(torch.eye(K, dtype=dtype)), before) and torch.equal(layer.matrix, W)


def test_directions_do_not_depend_on_what_is_merged():
    layer = make(launch=False)
    other = copy.deepcopy(layer)
    other.merge(keep_base=True)
    layer.launch()
    other.launch()
    assert torch.allclose(layer.dash_U["default"], other.dash_U["default"], atol=1e-10)


def test_before_the_launch_it_is_lora():
    layer = make(launch=False)
    with torch.no_grad():
        layer.dash_delta["default"].fill_(3.0)  # takes no part
    lora = so.LoRALinear.from_linear(layer.base_layer, so.LoRAConfig(r=3, lora_alpha=4))
    with torch.no_grad():
        for key in ("lora_A", "lora_B"):
            getattr(lora, key)["default"].copy_(getattr(layer, key)["default"])
    x, dy = torch.randn(5, K, dtype=torch.float64, requires_grad=True), torch.randn(5, D, dtype=torch.float64)
    assert torch.allclose(layer(x), lora(x), atol=1e-14)
    got, want = (
        torch.autograd.grad(layer(x), [x, *trained(layer)], dy),
        torch.autograd.grad(lora(x), [x, *trained(lora)], dy),
    )
    assert all(torch.allclose(g, w, atol=1e-13) for g, w in zip(got, want, strict=False))
    assert len(got) == len(want) + 1 and torch.equal(got[-1], torch.zeros(4, dtype=torch.float64))
    base = layer.weight.detach().clone()
    delta = layer.delta_weight()
    assert torch.allclose(delta, lora.delta_weight(), atol=1e-14)
    layer.merge()
    assert torch.allclose(layer.weight, base + delta)
    layer.unmerge()
    assert torch.allclose(layer.weight, base)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_after_the_launch(p):
    layer = make(lora_dropout=p)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def forward(x, *_parameters):
        torch.manual_seed(5)  # one mask
        return layer(x)

    assert torch.autograd.gradcheck(forward, (x, *trained(layer)))
    assert len(trained(layer)) == 3
    if p == 0:
        W, A, B = layer.weight.detach(), layer.lora_A["default"], layer.lora_B["default"]
        delta, U, V = (getattr(layer, key)["default"] for key in ("dash_delta", "dash_U", "dash_V"))
        want = x @ (W + 4 / 3 * B @ A + U @ torch.diag(delta) @ V).T + layer.bias
        dy = torch.randn(3, D, dtype=torch.float64)
        assert torch.allclose(layer(x), want, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(y, [x, A, B, delta], dy) for y in (layer(x), want)), strict=True)
        assert all(torch.allclose(g, w, atol=1e-12) for g, w in pairs)


def test_delta_is_not_scaled():
    one, other = make(lora_alpha=4), make(lora_alpha=4)
    with torch.no_grad():
        for layer in (one, other):
            layer.lora_B["default"].zero_()
    settings = copy.copy(other.settings["default"])
    settings.lora_alpha = 40
    other.load_state_dict(one.state_dict())
    other.settings["default"] = settings
    x = torch.randn(4, K, dtype=torch.float64)
    assert torch.allclose(one(x), other(x), atol=1e-12) and not torch.allclose(one(x), one.base_layer(x), atol=1e-2)


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_launches_after_so_many_optimizer_steps(micro_batches):
    model, generator = attached(launch_step=4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1, requires_grad=True))], lr=0.1)
    for i in range(1, 7):
        step(model, optimizer, generator, micro_batches)
        other.step()  # somebody else's
        assert [layer.dash_steps["default"].item() for layer in layers(model)] == [min(i, 4)] * 2
        assert launched(model) == [i >= 4] * 2
        assert all(layer.dash_U["default"].any() == (i >= 4) for layer in layers(model))
        assert all(layer.dash_delta["default"].any() == (i > 4) for layer in layers(model))
    assert "directions=4 (launched)" in repr(model)
    assert "launch after 4 steps" in repr(attached(launch_step=4))


def test_only_the_active_adapter_counts():
    model, generator = attached(launch_step=2), torch.Generator().manual_seed(0)
    config = LoRADashConfig(r=2, directions=2, launch_step=3, target_modules=["2"])
    so.attach(model, config, "second")
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n or "dash_" in n], lr=0.1)
    for _ in range(2):
        step(model, optimizer, generator)
    counts = [model[2].dash_steps[name].item() for name in ("default", "second")]
    assert counts == [0, 2] and model[0].dash_steps["default"].item() == 0
    so.set_adapter(model, "default")
    step(model, optimizer, generator)
    step(model, optimizer, generator)
    assert launched(model) == [True, True] and not model[2].launched("second")


def test_ordinary_steps_read_nothing_from_the_device_and_a_freed_model_is_not_watched():
    model, generator = attached(launch_step=50), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, foreach=False)
    step(model, optimizer, generator)
    with Recorder() as recorder:
        step(model, optimizer, generator)
    counts = {id(count) for layer in dash._watched.values() for count in layer.dash_steps.held.values()}
    for name, args in recorder.calls:  # the counts are read, which are on the CPU wherever the model is
        assert "_local_scalar_dense" not in name or id(args[0]) in counts, name
    assert all(layer.dash_steps["default"].device.type == "cpu" for layer in layers(model))
    assert not any("dash_steps" in name for name, _ in model.named_buffers())
    first = weakref.ref(model[0])
    assert any(layer is model[0] for layer in dash._watched.values())
    del model, optimizer, recorder
    gc.collect()
    assert first() is None


def test_no_new_graph_when_it_launches():
    layer, x = make(torch.float32, launch=False), torch.randn(5, K)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(x).sum().backward()
    layer.launch()
    perturb(layer, 0.3)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    compiled(x).sum().backward()
    assert counter.frame_count == 1


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 4, 6], ids=["before", "at", "after"])
@pytest.mark.parametrize("through", ["state_dict", "files"])
def test_training_goes_on_bit_for_bit(at, through, tmp_path, monkeypatch):
    def run(model, optimizer, first, last):
        for i in range(first, last):
            step(model, optimizer, torch.Generator().manual_seed(i), micro_batches=2)

    def adamw(model):
        return torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.1)

    whole = attached(launch_step=4)
    run(whole, adamw(whole), 0, 9)
    model = attached(launch_step=4)
    optimizer = adamw(model)
    run(model, optimizer, 0, at)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    truncated_svd = dash.truncated_svd
    monkeypatch.setattr(dash, "truncated_svd", None)  # nothing is decomposed to load
    if through == "state_dict":
        again = attached(launch_step=4)
        for layer in layers(again):
            perturb(layer, 0.3)
        again.load_state_dict(kept["model"])
    else:
        pytest.importorskip("safetensors")
        so.save_adapter(model, tmp_path)
        again = so.load_adapter(mlp(K, D, 2), tmp_path)
    monkeypatch.setattr(dash, "truncated_svd", truncated_svd)
    assert launched(again) == [at >= 4] * 2
    optimizer = adamw(again)
    optimizer.load_state_dict(kept["optimizer"])
    run(again, optimizer, at, 9)
    assert same(state_of(again), state_of(whole)) and launched(whole) == [True, True]


def test_copies_count_for_themselves():
    model, generator = attached(launch_step=3), torch.Generator().manual_seed(0)
    step(model, torch.optim.SGD(trained(model), lr=0.1), generator)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(trained(other), lr=0.1)
        step(other, optimizer, generator)
        assert launched(other) == [False, False]
        step(other, optimizer, generator)
        assert launched(other) == [True, True]
    assert [layer.dash_steps["default"].item() for layer in layers(model)] == [1, 1]


def test_a_state_dict_that_does_not_fit():
    model = attached()
    state = model.state_dict()
    del state["0.dash_steps.default"]
    with pytest.raises(RuntimeError, match="Missing key.*0.dash_steps.default"):
        model.load_state_dict(state)
    state = {**model.state_dict(), "0.dash_steps.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key.*0.dash_steps.other"):
        model.load_state_dict(state)
    model = so.attach(mlp(K, D, 2).to("meta"), LoRADashConfig(directions=2, target_modules=["0"]))
    assert "launch after 100 steps" in repr(model)


# --- several processes -----------------------------------------------------------------------------------------------


def train_on_half(rank: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = []
    for wrap in ("ddp", "fsdp2"):
        model = attached(launch_step=2)
        if wrap == "ddp":  # without find_unused_parameters
            net = nn.parallel.DistributedDataParallel(model)
        else:
            net = model
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        results.append(through_four_steps(net, model, slice(rank * 8, rank * 8 + 8)))
    return results


def through_four_steps(net, model, part):
    """Everything about the adapters after four steps, the second of which launches."""
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(16, K, generator=generator)[part], torch.randn(16, 12, generator=generator)[part]
    for _ in range(4):
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for path, layer in so.adapter_layers(model).items():
        assert layer.launched()
        for key in layer.held("default"):
            tensor = dash._whole(getattr(layer, key)["default"])
            found[f"{path}.{key}"] = tensor.detach().tolist()
    return found


@pytest.mark.slow
def test_ranks_choose_alike(tmp_path):
    alone = attached(launch_step=2)
    want = through_four_steps(alone, alone, slice(None))
    results = in_two_processes(train_on_half, tmp_path)
    assert results[0] == results[1]
    for got in results[0]:
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert torch.allclose(torch.tensor(got[key]), torch.tensor(value), atol=1e-5), key
        assert any(map(abs, got["0.dash_delta"]))


# --- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_launch_decomposes_the_dequantised_weight(form):
    pytest.importorskip("bitsandbytes")
    net = nn.Sequential(quantised.quantise(nn.Linear(K, D), form))
    try:
        net(torch.randn(2, K))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this {form} layer does not run on the CPU: {error}")
    layer = perturb(so.attach(net, LoRADashConfig(r=3, directions=4, target_modules=["0"]))[0], 0.3)
    A, B = layer.lora_A["default"].clone(), layer.lora_B["default"].clone()
    layer.launch()
    scores, _, _, Vh = dense_scores(quantised.dequantised(net[0].base_layer), A, B, layer.settings["default"].scaling)
    overlap = (Vh[scores.argsort(descending=True)[:4]] * layer.dash_V["default"]).sum(1).abs()
    assert torch.allclose(overlap, torch.ones(4, dtype=torch.float64), atol=1e-4)


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"launch_step": 0}, r"LoRADashConfig\.launch_step: got 0, wanted at least 1"),
        ({"launch_step": 1.5}, r"launch_step: got 1\.5 \(float\), wanted an integer"),
        ({"directions": 0}, r"directions: got 0, wanted at least 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', wanted True, False"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LoRADashConfig(**fields)


def test_more_directions_than_there_are():
    with pytest.raises(ValueError, match=r"directions: got 15, wanted at most 14 \(a weight \[20, 14\] has no more\)"):
        LoRADashLinear.from_linear(nn.Linear(K, D), LoRADashConfig(directions=15))


def test_the_config_in_a_file(tmp_path):
    pytest.importorskip("safetensors")
    so.save_adapter(attached(launch_step=7), tmp_path)
    config = so.adapter_configs(so.load_adapter(mlp(K, D, 2), tmp_path))["default"]
    assert type(config) is LoRADashConfig and (config.launch_step, config.directions) == (7, 4)
