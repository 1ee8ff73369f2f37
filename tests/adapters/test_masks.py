"""RoSA's masks: top-k, collected gradients beside autograd's, splitting batches, schedules, files, several ranks."""

import copy

import pytest
import torch
from processes import in_two_processes
from torch import nn

import spectral_ops as so
from spectral_ops import MasksSaved, RoSAConfig, RoSASchedule
from spectral_ops.adapters import rosa_schedule
from spectral_ops.adapters.rosa_schedule import load_masks, save_masks
from spectral_ops.init import topk_pattern

pytestmark = pytest.mark.usefixtures("one_thread")


# --- top-k -----------------------------------------------------------------------------------------------------------


def dense(pattern, shape):
    """The pattern as a set of flat places, in order."""
    offsets, columns = pattern
    rows = torch.repeat_interleave(torch.arange(shape[0]), offsets.diff().long())
    return (rows * shape[1] + columns).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "nnz"), [((7, 11), 13), ((1, 5), 5), ((5, 1), 0), ((40, 3), 1), ((0, 4), 0)])
def test_topk_takes_the_largest(shape, nnz, dtype):
    scores = torch.rand(shape).to(dtype)
    offsets, columns = topk_pattern(scores, nnz)
    assert offsets.dtype == columns.dtype == torch.int32 and offsets.shape == (shape[0] + 1,)
    order = sorted(range(scores.numel()), key=lambda i: (-scores.reshape(-1)[i].item(), i))
    assert dense((offsets, columns), shape) == sorted(order[:nnz])
    so.CSR(torch.zeros(nnz), offsets, columns, shape).validate()


def test_among_equals_the_first_win():
    scores = torch.zeros(4, 5)
    scores[2, 3] = scores[0, 4] = 1
    assert dense(topk_pattern(scores, 5), (4, 5)) == [0, 1, 2, 4, 13]
    assert dense(topk_pattern(torch.ones(4, 5), 7), (4, 5)) == list(range(7))


def test_bad_scores():
    with pytest.raises(ValueError, match="scores: got non-finite values"):
        topk_pattern(torch.tensor([[1.0, float("nan")]]), 1)
    with pytest.raises(ValueError, match="nnz: got 3, wanted at least 0 and at most 2"):
        topk_pattern(torch.ones(1, 2), 3)
    with pytest.raises(ValueError, match="scores: got .*, wanted 2 dimensions"):
        topk_pattern(torch.ones(4), 1)


# --- collection ------------------------------------------------------------------------------------------------------


class Siblings(nn.Module):
    """q, k and v read one x, v's output is overwritten in place, and a later layer reads them all."""

    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, 6)

    def forward(self, x):
        v = self.v(x)
        v += x
        return self.o(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + v)


def rosa(model, **fields):
    torch.manual_seed(5)
    return so.attach(model, RoSAConfig(**{"r": 3, "d": 0.1, "target_modules": "all-linear", **fields}))


def batches(n, size=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, width, generator=generator), torch.randn(size, 6, generator=generator)) for _ in range(n)
    ]


def train(model, data, micro=1, schedule=None, optimizer=None):
    for x, target in data:
        for part, wanted in zip(x.chunk(micro), target.chunk(micro), strict=True):
            (nn.functional.mse_loss(model(part), wanted) / micro).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def dense_gradients(data):
    """Each batch's gradient of every weight, by autograd on the bare model."""
    model, found = Siblings(), []
    for x, target in data:
        model.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        found.append({name: getattr(model, name).weight.grad.clone() for name in "qkvo"})
    return found


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
@pytest.mark.parametrize("schedule", ["default", "spa_only"])
def test_siblings_get_the_masks_of_the_dense_computation(mode, schedule):
    data, model = batches(3), rosa(Siblings(), grad_acc_mode=mode, spa_num_grads=3, schedule=schedule)
    taken = RoSASchedule(model)
    assert taken.phase == "collect"
    train(model, data[:2], schedule=taken)
    got = {path: c.scores() * c.batches for path, c in taken.collectors.items()}
    gradients = dense_gradients(data)
    for path, scores in got.items():
        square = mode == "mean_squared"
        want = sum(g[path].square() if square else g[path] for g in gradients[:2])
        assert torch.allclose(scores, want.abs(), rtol=1e-4, atol=1e-9)
    train(model, data[2:], schedule=taken)
    assert taken.phase == "train" and taken.masked
    masks = []
    for path, layer in so.adapter_layers(model).items():
        want = sum(g[path].square() if mode == "mean_squared" else g[path] for g in gradients).abs()
        csr = layer.csr()
        assert csr.nnz == int(0.1 * want.numel())
        assert dense((csr.row_offsets, csr.col_indices), csr.shape) == dense(topk_pattern(want, csr.nnz), csr.shape)
        masks.append(tuple(dense((csr.row_offsets, csr.col_indices), csr.shape)))
    assert len(set(masks)) == 4
    assert not any(layer.collectors for layer in so.adapter_layers(model).values())


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
@pytest.mark.parametrize("batch_count", [1, 2])
def test_the_split_into_micro_batches_changes_nothing(mode, batch_count):
    masks, scores = [], []
    for micro in (1, 4):
        model = rosa(Siblings(), grad_acc_mode=mode, spa_num_grads=batch_count + 1)
        schedule = RoSASchedule(model)
        data = batches(batch_count + 1)
        train(model, data[:-1], micro, schedule)
        scores.append({path: c.scores() for path, c in schedule.collectors.items()})
        train(model, data[-1:], micro, schedule)
        masks.append({path: layer.rosa_col_indices["default"] for path, layer in so.adapter_layers(model).items()})
        masks[-1] |= {f"{p}.": layer.rosa_row_offsets["default"] for p, layer in so.adapter_layers(model).items()}
    assert all(torch.allclose(scores[0][p], scores[1][p], rtol=1e-4, atol=1e-9) for p in scores[0])
    assert all(torch.equal(masks[0][p], masks[1][p]) for p in masks[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_collects_once(reentrant):
    class Checkpointed(Siblings):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)

    scores = []
    for kind in (Siblings, Checkpointed):
        model = rosa(kind(), spa_num_grads=2)
        schedule = RoSASchedule(model)
        [(x, target)] = batches(1)
        nn.functional.mse_loss(model(x.requires_grad_()), target).backward()
        schedule.step()
        scores.append({path: c.scores() for path, c in schedule.collectors.items()})
    assert all(torch.allclose(scores[0][p], scores[1][p], rtol=1e-5) for p in scores[0])


def test_narrow_gradients_are_summed_in_float32():
    """Squares of these gradients underflow in float16, and their sums in bfloat16 lose half of the micro-batches."""
    for dtype, scale in ((torch.float16, 4.0), (torch.bfloat16, 1.0)):
        model = rosa(Siblings().to(dtype), spa_num_grads=2)
        schedule, [(x, target)] = RoSASchedule(model), batches(1, size=256)
        for part, wanted in zip(x.chunk(64), target.chunk(64), strict=True):
            loss = nn.functional.mse_loss(model(part.to(dtype)).float(), wanted) / 64
            (loss * scale).backward()
        schedule.step()
        want = dense_gradients([(x, target)])[0]
        for path, collector in schedule.collectors.items():
            got = collector.scores().sqrt() / scale
            assert got.dtype == torch.float32
            assert (got - want[path].abs()).norm() <= 0.03 * want[path].norm()


def test_one_tile_at_a_time(monkeypatch):
    """Each tile of a gradient is handed over before the next exists, in a buffer they share."""
    from spectral_ops.core import autograd

    monkeypatch.setitem(autograd.TILE_ROWS, "cpu", 5)
    model = rosa(Siblings(), spa_num_grads=2)
    schedule, shapes, addresses = RoSASchedule(model), [], set()
    add = rosa_schedule.HostSums.add

    def watch(self, target, tile):
        shapes.append(tuple(tile.shape))
        addresses.add(tile.data_ptr())
        add(self, target, tile)

    monkeypatch.setattr(rosa_schedule.HostSums, "add", watch)
    train(model, batches(1), schedule=schedule)
    assert max(rows for rows, _ in shapes) == 5 and len(shapes) == 3 * 3 + 2
    assert len(addresses) == 1
    want = dense_gradients(batches(1))[0]
    assert all(torch.allclose(c.scores(), want[p].square(), rtol=1e-4) for p, c in schedule.collectors.items())


def test_a_batch_that_overflowed_is_left_out():
    model = rosa(Siblings(), spa_num_grads=1)
    schedule, data = RoSASchedule(model), batches(2)
    (model(data[0][0]).sum() * float("inf")).backward()
    with pytest.warns(UserWarning, match="non-finite gradients is left out"):
        schedule.step()
    assert schedule.phase == "collect"
    train(model, data[1:], schedule=schedule)
    assert schedule.phase == "train" and schedule.masked


def test_a_layer_without_a_gradient_is_an_error():
    model = rosa(Siblings(), spa_num_grads=1)
    schedule = RoSASchedule(model)
    model.o(torch.randn(3, 12)).sum().backward()
    with pytest.raises(ValueError, match="q: got no gradient in 1 batches, wanted a backward through the layer"):
        schedule.step()


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True])
def test_phases_count_optimizer_steps(hooked):
    model = rosa(Siblings(), schedule="wl3", spa_num_grads=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    schedule = RoSASchedule(model, optimizer if hooked else None)
    values = [layer.rosa_values["default"] for layer in so.adapter_layers(model).values()]
    assert all(v.requires_grad and v in set(optimizer.param_groups[0]["params"]) for v in values)
    phases = []
    for batch in batches(8):
        phases.append(schedule.phase)
        model(batch[0]).square().mean().backward()  # a micro-batch that counts for nothing by itself
        train(model, [batch], 2, None if hooked else schedule, optimizer)
        assert schedule.phase == "train" or all(v.grad is None and not v.any() for v in values)
    assert phases == ["warmup"] * 3 + ["collect"] * 2 + ["train"] * 3
    assert all(v.any() for v in values) and schedule.steps == 8
    schedule.close()
    train(model, batches(1), optimizer=optimizer)
    assert schedule.steps == 8


def test_training_lowers_the_loss_through_all_phases():
    model = rosa(Siblings(), schedule="wl4", d=0.2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule, [batch] = RoSASchedule(model, optimizer), batches(1)
    losses = []
    for _ in range(20):
        losses.append(nn.functional.mse_loss(model(batch[0]), batch[1]).item())
        train(model, [batch], 2, None, optimizer)
    assert schedule.phase == "train" and losses[-1] < 0.5 * losses[5] < losses[0]
    assert losses == sorted(losses, reverse=True)


def test_lora_only_and_zero_density_need_no_mask():
    for fields in ({"schedule": "lora_only"}, {"d": 0.0}):
        model = rosa(Siblings(), **fields)
        schedule = RoSASchedule(model)
        assert schedule.phase == "train"
        train(model, batches(1), schedule=schedule)
        assert not schedule.collectors


def test_density_by_layer():
    model = rosa(Siblings(), d=0.05, density_pattern={"[qk]": 0.25, "o": 1.0})
    train(model, batches(1), schedule=RoSASchedule(model))
    nnz = {path: layer.csr().nnz for path, layer in so.adapter_layers(model).items()}
    assert nnz == {"q": 36, "k": 36, "v": 7, "o": 72}


def test_the_authors_recipe_stop_and_start_again(tmp_path):
    file = tmp_path / "masks" / "rosa.safetensors"
    first = rosa(Siblings(), mask_save_path=str(file), terminate_after_mask_generation=True, spa_num_grads=2)
    data = batches(2)
    with pytest.raises(SystemExit) as ended:
        train(first, data, schedule=RoSASchedule(first))
    assert isinstance(ended.value, MasksSaved) and ended.value.code == 0 and str(file) in str(ended.value)
    assert all(layer.csr() is None for layer in so.adapter_layers(first).values())

    through = rosa(Siblings(), spa_num_grads=2)
    train(through, data, schedule=RoSASchedule(through))
    again = rosa(Siblings(), mask_load_path=str(file))
    schedule = RoSASchedule(again)
    assert schedule.phase == "train" and schedule.masked
    for path, layer in so.adapter_layers(again).items():
        want = so.adapter_layers(through)[path]
        assert torch.equal(layer.rosa_col_indices["default"], want.rosa_col_indices["default"])
        assert torch.equal(layer.rosa_row_offsets["default"], want.rosa_row_offsets["default"])
    warm = rosa(Siblings(), mask_load_path=str(file), schedule="wl1")
    schedule = RoSASchedule(warm)
    assert schedule.phase == "warmup" and not schedule.masked
    train(warm, batches(1), schedule=schedule)
    assert schedule.phase == "train" and schedule.masked


def test_a_schedule_goes_on_after_a_checkpoint():
    model = rosa(Siblings(), schedule="wl2")
    schedule = RoSASchedule(model)
    train(model, batches(1), schedule=schedule)
    state, weights = schedule.state_dict(), copy.deepcopy(model.state_dict())
    again = rosa(Siblings(), schedule="wl2")
    again.load_state_dict(weights)
    resumed = RoSASchedule(again)
    resumed.load_state_dict(state)
    assert (resumed.steps, resumed.phase) == (1, "warmup")
    train(again, batches(2), schedule=resumed)
    assert resumed.phase == "train"
    # and with masks, from the model's state alone
    third = rosa(Siblings(), schedule="wl2")
    third.load_state_dict(again.state_dict())
    late = RoSASchedule(third)
    late.load_state_dict(resumed.state_dict())
    assert late.phase == "train" and late.masked


def test_misuse():
    with pytest.raises(ValueError, match=r"adapter_name: got None, wanted the name of a RoSA adapter"):
        RoSASchedule(nn.Linear(3, 3))
    model = rosa(Siblings())
    with pytest.raises(ValueError, match=r"adapter_name: got 'x', wanted the name of a RoSA adapter \(\['default'\]\)"):
        RoSASchedule(model, adapter_name="x")
    with pytest.raises(TypeError, match="optimizer: got dict"):
        RoSASchedule(model, {})


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path):
    model = rosa(Siblings())
    train(model, batches(1), schedule=RoSASchedule(model))
    save_masks(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def edit(path, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(str(path), framework="pt") as file:
        note = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=note)


DAMAGE = {
    "gone": (lambda p: p.unlink(), FileNotFoundError, "mask_load_path: got '.*m.safetensors'"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:200]), ValueError, "truncated or damaged"),
    "no note": (lambda p: edit_note(p), ValueError, "truncated or damaged"),
    "missing": (lambda p: edit(p, lambda t: t.pop("q.col_indices")), ValueError, "q: got a mask of"),
    "short": (
        lambda p: edit(p, lambda t: t.update({"q.col_indices": t["q.col_indices"][:-1]})),
        ValueError,
        "q: got a",
    ),
    "far": (lambda p: edit(p, lambda t: t["q.col_indices"].fill_(99)), IndexError, "q: col_indices: got columns 99 to"),
    "order": (lambda p: edit(p, lambda t: t["q.row_offsets"].copy_(t["q.row_offsets"].flip(0))), ValueError, "q: row_"),
    "long": (lambda p: edit(p, lambda t: t.update({"q.row_offsets": t["q.row_offsets"].long()})), TypeError, "int32"),
}


def edit_note(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_mask_file(masked, damage):
    break_it, error, message = DAMAGE[damage]
    break_it(masked)
    model = rosa(Siblings(), mask_load_path=str(masked))
    with pytest.raises(error, match=message):
        RoSASchedule(model)
    assert all(layer.csr() is None for layer in so.adapter_layers(model).values())


def test_masks_of_another_model(masked):
    with pytest.raises(
        ValueError, match=r"got masks of 4 layers, wanted those of the model \(\['k', 'q', 'v'\] differ"
    ):
        load_masks(rosa(Siblings(), target_modules=["o"]), masked)
    with pytest.raises(ValueError, match="got a mask of .*, wanted 28 entries"):
        load_masks(rosa(Siblings(), d=0.2), masked)


# --- several ranks ---------------------------------------------------------------------------------------------------


def patterns_of(model):
    return {
        path: (layer.rosa_row_offsets["default"].tolist(), layer.rosa_col_indices["default"].tolist())
        for path, layer in so.adapter_layers(model).items()
    }


def collect(rank: int, mode: str):
    model = rosa(Siblings(), grad_acc_mode=mode, spa_num_grads=2)
    data = [(x.chunk(2)[rank], target.chunk(2)[rank]) for x, target in batches(2)]
    train(model, data, schedule=RoSASchedule(model))
    model(data[0][0])
    layers = so.adapter_layers(model).values()
    return patterns_of(model), [layer.may_reside("default") for layer in layers]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
def test_two_ranks_with_half_the_data_each_get_the_mask_of_one_with_all(mode, tmp_path):
    results = in_two_processes(collect, tmp_path, mode)
    alone = rosa(Siblings(), grad_acc_mode=mode, spa_num_grads=2)
    train(alone, batches(2), schedule=RoSASchedule(alone))
    assert [found for found, _ in results] == [patterns_of(alone)] * 2
    assert not any(any(resident) for _, resident in results)  # W is left alone where it may be sharded
    assert all(layer.may_reside("default") for layer in so.adapter_layers(alone).values())


def through_all_phases(_rank: int, wrapper: str | None) -> list[float]:
    """Losses of LoRA alone, of the collection and with S, on the same batches everywhere."""
    model = rosa(Siblings(), schedule="wl2", spa_num_grads=2, d=0.3)
    net = model
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in so.adapter_layers(model).values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrapper == "ddp":
        net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    schedule, losses = RoSASchedule(net, optimizer), []
    for x, target in batches(7):
        loss = nn.functional.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert schedule.phase == "train"
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [pytest.param("ddp", marks=pytest.mark.thorough), "fsdp2"])
def test_one_run_through_all_phases_in_two_processes(wrapper, tmp_path):
    expected = through_all_phases(0, None)
    for losses in in_two_processes(through_all_phases, tmp_path, wrapper):
        assert losses == pytest.approx(expected, rel=1e-5)
