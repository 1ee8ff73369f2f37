"""Decompositions that are kept: in memory by what a weight holds, in a file for the next start of the same job."""

import dataclasses
import functools

import pytest
import torch
from models import mlp as two_layers
from torch import nn

import spectral_ops as so
from spectral_ops import DoRAConfig, LoRAConfig, PiCaConfig, SpectralConfig
from spectral_ops.init import SVDFile, clear_svd_cache, svd, svd_cache, truncated_svd

FILE = "svd.safetensors"
mlp = functools.partial(two_layers, 18, 24, 3)


@pytest.fixture(autouse=True)
def empty():
    clear_svd_cache()
    yield
    clear_svd_cache()


@pytest.fixture
def decomposed(monkeypatch):
    """(shape, r, niter) of every decomposition that was really computed."""
    calls, decompose = [], svd._decompose
    monkeypatch.setattr(
        svd, "_decompose", lambda w, r, niter: (calls.append((*w.shape, niter)), decompose(w, r, niter))[1]
    )
    return calls


def on(init, **fields):
    return LoRAConfig(**{"r": 3, "init_lora_weights": init, "target_modules": ["0", "2"], **fields})


def start(model, name="default"):
    layers = so.adapter_layers(model).values()
    return [getattr(layer, key)[name].detach() for layer in layers for key in ("lora_A", "lora_B")]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what tells weights apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_is_of_every_value_at_its_place(dtype, monkeypatch):
    weight = torch.randn(30, 20).to(dtype)
    mark = svd_cache.fingerprint(weight)
    assert mark == svd_cache.fingerprint(weight.clone()) == svd_cache.fingerprint(weight.t().contiguous().t())
    monkeypatch.setattr(svd_cache, "TILE", 45)  # two rows at a time
    assert mark == svd_cache.fingerprint(weight)
    others = [
        weight.t(),
        weight.flip(0),
        weight.flip(1),
        weight.roll(1, 0),
        weight[:, :19],
        -weight,
        weight.view(20, 30),
    ]
    for i in (0, 299, 599):
        others.append(weight.clone())
        others[-1].view(-1)[i] *= 1.01
    marks = {mark, *map(svd_cache.fingerprint, others)}
    assert len(marks) == 1 + len(others)
    assert svd_cache.fingerprint(weight.to(torch.float32)) != mark or dtype == torch.float32


# --- in memory -------------------------------------------------------------------------------------------------------


def test_methods_that_ask_for_one_weight_decompose_it_once(decomposed):
    weight = torch.randn(20, 30)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    for mode, part in (("max", slice(0, 4)), ("min", slice(16, 20)), ("mid", slice(8, 12)), ("max", slice(0, 9))):
        got = truncated_svd(weight, part.stop - part.start, mode=mode)
        assert same(got, (U[:, part], S[part], Vh[part]))
        got[0].zero_()  # the caller's own
    truncated_svd(weight, 5, mode="random")
    truncated_svd(weight.clone(), 5)
    assert decomposed == [(20, 30, None)]
    for r, niter in ((5, 2), (5, 2), (5, 3), (6, 2)):
        truncated_svd(weight, r, niter=niter)
    assert len(decomposed) == 4
    weight.data[0, 0] += 1  # which leaves the version alone
    truncated_svd(weight, 5)
    clear_svd_cache()
    assert svd_cache.cache.nbytes == 0
    truncated_svd(weight, 5)
    assert len(decomposed) == 6


def test_pissa_then_milora_then_dora_of_one_model(decomposed):
    want = {init: start(so.attach(mlp(), on(init))) for init in ("milora", "pissa")}
    assert len(decomposed) == 2
    clear_svd_cache()
    assert same(start(so.attach(mlp(), on("milora"))), want["milora"])
    model = so.attach(mlp(), on("pissa"))
    assert same(start(model), want["pissa"]) and len(decomposed) == 4
    so.attach(mlp(), DoRAConfig(r=5, init_lora_weights="pissa", target_modules=["0"]))
    assert len(decomposed) == 4
    so.attach(nn.Sequential(model[0].base_layer), on("pissa", target_modules=["0"]))  # the rest, another weight
    assert len(decomposed) == 5


def test_memory_is_bounded(monkeypatch):
    cache = svd_cache.Cache(1000)

    def triplets(n):
        return torch.randn(n, 1), torch.randn(1), torch.randn(1, n)

    def size(n):
        return 4 * (2 * n + 1)

    cache.put("large", triplets(200))
    assert cache.nbytes == 0
    kept = triplets(40)
    cache.put("a", kept)
    cache.put("b", triplets(40))
    assert cache.nbytes == 2 * size(40)
    assert same(cache.get("a"), kept) and cache.get("a")[0].data_ptr() != kept[0].data_ptr()
    cache.put("c", triplets(70))  # too much for three: b has been unused for longest
    assert cache.get("b") is None and cache.get("a") is not None and cache.nbytes == size(40) + size(70)
    monkeypatch.setattr(svd_cache.cache, "limit", 0)
    truncated_svd(torch.randn(8, 8), 2)
    assert svd_cache.cache.nbytes == 0


def test_a_randomized_decomposition_depends_on_the_weight_alone():
    weight = torch.randn(40, 30)
    state = torch.get_rng_state()
    first = truncated_svd(weight, 4, niter=2)
    assert torch.equal(torch.get_rng_state(), state)
    clear_svd_cache()
    torch.manual_seed(99)
    assert same(truncated_svd(weight, 4, niter=2), first)
    U, S, Vh = truncated_svd(weight, 4, niter=40)  # by way of M Mᵀ
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose((U * S @ Vh).double(), exact.U[:, :4] * exact.S[:4] @ exact.Vh[:4], atol=1e-4)
    assert torch.allclose(U.T @ U, torch.eye(4), atol=1e-5) and torch.allclose(Vh @ Vh.T, torch.eye(4), atol=1e-5)
    assert all(t.is_meta for t in truncated_svd(weight.to("meta"), 4, niter=2))


# --- in a file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [PiCaConfig(r=3), PiCaConfig(r=3, niter=2), SpectralConfig(r=3), SpectralConfig(r=3, mode="rotation")]
)
def test_methods_that_freeze_directions_use_the_file_and_the_progress_line(config, decomposed, tmp_path):
    pytest.importorskip("safetensors")
    config = dataclasses.replace(config, target_modules=["0", "2"])
    assert config.slow_init
    models = []
    for _ in range(2):
        models.append(so.attach(mlp(), config, svd_cache_dir=tmp_path))
        assert len(decomposed) == 2
        clear_svd_cache()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "milora", "milora_random"])
def test_the_second_start_decomposes_nothing(init, decomposed, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(8)
    models = []
    for computed in (2, 2):
        base = mlp()
        torch.manual_seed(5)
        models.append(so.attach(base, on(init), svd_cache_dir=tmp_path / "svd"))
        assert len(decomposed) == computed
        clear_svd_cache()  # as in another process
    assert same(start(models[0]), start(models[1]))
    assert same([m.weight for m in (models[0][0], models[0][2])], [m.weight for m in (models[1][0], models[1][2])])
    assert [path.name for path in (tmp_path / "svd").iterdir()] == [FILE]
    # U [d, 3], S [3], Vᵀ [3, k] of both layers and no more
    assert (tmp_path / "svd" / FILE).stat().st_size < 4 * 3 * (18 + 24 + 1 + 24 + 12 + 1) + 1500
    so.attach(mlp(), on(init, r=4), svd_cache_dir=tmp_path / "svd")
    assert len(decomposed) == 4
    clear_svd_cache()
    so.attach(mlp(), on(init, r=4), svd_cache_dir=tmp_path / "svd")
    so.attach(mlp(), on(init), svd_cache_dir=tmp_path / "svd")  # still there
    assert len(decomposed) == (4 if init != "milora_random" else 6)  # which draws other triplets


def test_another_base_is_an_error_and_changes_nothing(tmp_path):
    pytest.importorskip("safetensors")
    so.attach(mlp(), on("pissa"), svd_cache_dir=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] += 1e-3
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"2: svd_cache_dir: got .* made from another weight .* float32 12x24"):
        so.attach(model, on("pissa"), svd_cache_dir=tmp_path)
    assert isinstance(model[0], nn.Linear) and torch.equal(model[0].weight, weight)
    assert (tmp_path / FILE).read_bytes() == before
    with pytest.raises(ValueError, match="bfloat16 24x18"):
        so.attach(mlp().bfloat16(), on("pissa"), svd_cache_dir=tmp_path)


def test_a_damaged_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    so.attach(mlp(), on("pissa"), svd_cache_dir=tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="svd_cache_dir: got a truncated or damaged"):
        so.attach(mlp(), on("pissa"), svd_cache_dir=tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="svd_cache_dir: got a truncated or damaged"):
        SVDFile(tmp_path)
    save_file({}, tmp_path / FILE, metadata={"spectral_ops_svd": '{"format": 9, "weights": {}}'})
    with pytest.raises(ValueError, match="in format 9, wanted at most 1"):
        SVDFile(tmp_path)
    (tmp_path / FILE).unlink()
    so.attach(mlp(), on(True), svd_cache_dir=tmp_path)  # nothing to store
    assert not list(tmp_path.iterdir())
