"""Layer operators: one call for a whole layer in each direction, the same numbers from every implementation."""

from __future__ import annotations

import inspect

import pytest
import torch
from instruments import ROOT, extension_loaded, opchecks, results
from samples import layer_samples
from tensors import DTYPES, HALF, copied, ids
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops import _library, _loader
from spectral_ops._library import LAYERS, OPERATORS

NAMES = sorted(LAYERS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def tensors(value) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_schema(name):
    """Functional, or overwriting nothing but its first argument; composed of operators that exist."""
    layer = LAYERS[name]
    assert layer.schema.startswith(f"{name}(") and layer.mutated == ([0] if name.endswith("_") else [])
    assert set(layer.pieces) <= set(OPERATORS)
    assert all(r.alias_info is None for r in layer.default._schema.returns)
    for function in (layer.reference, layer.fake):
        parameters = inspect.signature(function).parameters.values()
        assert any(p.kind is p.VAR_POSITIONAL for p in parameters) or [p.name for p in parameters] == [
            a.name for a in layer.default._schema.arguments
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_composed_agree(name, dtype):
    if not extension_loaded():
        pytest.skip(_loader.EXTENSIONS["cpu"].error)
    layer = LAYERS[name]
    if not (ROOT / "csrc" / "layers" / f"{layer.stem}.h").exists():
        pytest.skip(f"{layer.stem} is composed in Python alone")
    assert name in _loader.EXTENSIONS["cpu"].operators, "it was not bound"
    for args in layer_samples(name, dtype):
        got, want = (results(layer, run, args) for run in (layer.default, layer.overloads["reference"]))
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
            scale = b.double().norm().clamp_min(1e-3 * max(b.numel(), 1) ** 0.5)
            assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize(
    "name", [name for name in NAMES if LAYERS[name].stem in ("hadamard", "kron", "randlora", "rotation", "vera")]
)
def test_a_size_that_does_not_fit_is_an_error(name):
    """Of any tensor, told before memory beyond it is read."""
    arguments = [a.name for a in LAYERS[name].default._schema.arguments]
    for args in layer_samples(name):
        given = dict(zip(arguments, args, strict=True))
        for i, (argument, t) in enumerate(given.items()):
            for dim in range(t.dim() if isinstance(t, torch.Tensor) else 0):
                free = (
                    (argument == "x" and name.endswith("forward") and dim < t.dim() - 1)  # tokens
                    or (argument == "blocks" and t.dim() == 4 and dim == 0)  # factors
                    or (name == "vera_linear_backward" and argument == "A" and dim == 1 and given["weight"] is None)
                )
                if t.shape[dim] > 1 and not free:
                    shorter = t.narrow(dim, 0, t.shape[dim] - 1).contiguous()
                    with pytest.raises(RuntimeError):
                        LAYERS[name].default(*copied((*args[:i], shorter, *args[i + 1 :])))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_fresh(name):
    """No result shares memory with an argument or another result, and no argument changes that may not."""
    layer = LAYERS[name]
    for run in (layer.default, layer.overloads["reference"]):
        for args in layer_samples(name):
            args = copied(args)
            before = [t.clone() for t in tensors(args)]
            out = tensors(run(*args))
            memory = [t.untyped_storage().data_ptr() for t in out if t.numel()]
            assert len(set(memory)) == len(memory)
            assert not set(memory) & {t.untyped_storage().data_ptr() for t in tensors(args) if t.numel()}
            written = tensors([args[i] for i in layer.mutated])
            for t, old in zip(tensors(args), before, strict=True):
                assert torch.equal(t, old) or any(t is w for w in written)
            assert all(w._version > 0 for w in written), "autograd is not told what was overwritten"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("name", NAMES)
def test_fake_and_meta_tensors(name, dtype):
    layer = LAYERS[name]
    for args in layer_samples(name, dtype):
        real = tensors(layer.default(*copied(args)))
        with FakeTensorMode() as mode:
            fake = tensors(layer.default(*tree_map_only(torch.Tensor, mode.from_tensor, args)))
        meta = tensors(layer.default(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)))
        for r, f, m in zip(real, fake, meta, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()) == (m.shape, m.dtype, m.stride())
            assert f.device == r.device and m.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for args in layer_samples(name):
        utilities = {"test_schema", "test_faketensor"}.intersection(opchecks(args))
        torch.library.opcheck(LAYERS[name].default, copied(args), test_utils=tuple(utilities))


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_pieces(name):
    """torch's counter sees the same work whether it meets the layer or what it is composed of."""
    layer = LAYERS[name]
    for args in layer_samples(name)[:6]:
        if layer.stem == "experts":  # a count reads no offsets, so it takes no row to be nobody's
            args = copied(args)
            offsets = next(t for t in tensors(args) if t.dtype == torch.int32)
            offsets[-1] = layer.fake(*args)[0].shape[0] if name.endswith("forward") else args[0].shape[0]
        with FlopCounterMode(display=False) as whole:
            layer.default(*copied(args))
        with FlopCounterMode(display=False) as parts, torch.no_grad():
            layer.reference(*copied(args))
        assert whole.get_total_flops() == parts.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_bit_reproducible(name):
    for dtype in (torch.float32, *HALF):
        for args in layer_samples(name, dtype):
            first, again = (results(LAYERS[name], LAYERS[name].default, args) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_layer_belongs_to_the_schemas_an_extension_is_built_for(monkeypatch):
    before = _library.schema_hash()
    monkeypatch.delitem(LAYERS, NAMES[0])
    assert _library.schema_hash() != before


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("linear_forward") and "base_out" in LAYERS[n].schema])
def test_a_forward_is_over_a_weight_or_over_a_base(name):
    if not extension_loaded():
        pytest.skip(_loader.EXTENSIONS["cpu"].error)
    args = next(a for a in layer_samples(name) if a[1] is not None)
    both, neither = list(args), list(args)
    both[2], neither[1] = torch.zeros(1), None
    for wrong in (both, neither):
        with pytest.raises(RuntimeError, match="weight and base_out: wanted exactly one of them"):
            LAYERS[name].default(*wrong)


@pytest.mark.parametrize("name", ["lowrank_linear_backward", "dora_linear_backward", "rosa_linear_backward",
                                  "segmented_linear_backward"])  # fmt: skip
def test_h_is_needed_where_it_is_read(name):
    """A gradient that is made of h is never one of uninitialised memory."""
    layer = LAYERS[name]
    place = [a.name for a in layer.default._schema.arguments].index("h")
    args = list(next(a for a in layer_samples(name) if a[place] is not None))
    args[place] = None
    for run in (layer.default, layer.overloads["reference"]):
        with pytest.raises((RuntimeError, ValueError), match="h: got None"):
            run(*args)
