"""The experts row (METHODS 1.10): experts_lowrank, experts_mlp and their operators."""

import pytest
import torch
import torch.nn.functional as F
from budget import check_batched_gradients
from contract import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import allocations, saved_tensors
from problems import EXPERTS, FAMILIES
from samples import layer_samples
from tensors import DTYPES, copied, ids, randn, storage

import spectral_ops
from spectral_ops import _library
from spectral_ops.functional import experts
from spectral_ops.functional.experts import grouped_mm_takes, swiglu
from spectral_ops.functional.routing import sort_by_expert


class TestExperts(Contract):
    families = EXPERTS


@pytest.mark.parametrize("family", [family.name for family in EXPERTS])
def test_batched_gradients(family, backend):
    check_batched_gradients(FAMILIES[family].build())


# --- one projection --------------------------------------------------------------------------------------------------


def stack(E=4, d=12, k=8, r=3, dtype=torch.float64, bias=True):
    """weight, A, B and bias of E experts."""
    weight, A, B = randn(E, d, k, dtype=dtype), randn(E, r, k, dtype=dtype), randn(E, d, r, dtype=dtype)
    return weight, A.requires_grad_(), B.requires_grad_(), randn(E, d, dtype=dtype).requires_grad_() if bias else None


def one_by_one(x, weight, ends, A, B, bias, scale):
    """Every expert's rows through its own linear layer; rows past the last end become zero."""
    parts, first = [], 0
    for e, end in enumerate(ends):
        y = F.linear(x[first:end], weight[e] + scale * B[e] @ A[e], None if bias is None else bias[e])
        parts.append(y)
        first = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - first, weight.shape[1])])


ENDS = {
    "even": [3, 6, 9, 12],
    "empty ones": [0, 5, 5, 12],
    "the last alone": [0, 0, 0, 12],
    "the first alone": [12, 12, 12, 12],
    "no row": [0, 0, 0, 0],
    "some of nobody": [2, 2, 7, 8],
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_offsets(name, transposed, backend):
    """Rows that are nobody's hold NaN, in x and in dy: what comes of them is zero, and nothing else sees them."""
    ends = ENDS[name]
    weight, A, B, bias = stack()
    x = randn(12, 8)
    x[ends[-1] :] = float("nan")
    x.requires_grad_()
    stored = weight.mT.contiguous() if transposed else weight
    offsets = torch.tensor(ends, dtype=torch.int64 if transposed else torch.int32)
    y = spectral_ops.experts_lowrank(x, stored, offsets, A, B, bias, scale=0.5, transposed=transposed)
    want = one_by_one(x, weight, ends, A, B, bias, 0.5)
    torch.testing.assert_close(y, want)
    dy = randn(*y.shape)
    dy[ends[-1] :] = float("nan")
    got = torch.autograd.grad(y, [x, A, B, bias], dy)
    for a, b in zip(got, torch.autograd.grad(want, [x, A, B, bias], dy.nan_to_num(0.0)), strict=True):
        torch.testing.assert_close(a, b)
    assert not got[0][ends[-1] :].any()


def test_one_expert_is_a_linear_layer(backend):
    weight, A, B, bias = stack(E=1)
    x = randn(9, 8)
    y = spectral_ops.experts_lowrank(x, weight, torch.tensor([9]), A, B, bias, scale=0.5)
    torch.testing.assert_close(y, spectral_ops.lowrank_linear(x, weight[0], A[0], B[0], bias[0].detach(), scale=0.5))


def test_the_frozen_layer(backend):
    """Without factors: the base product, and a gradient of x alone."""
    weight, _, _, bias = stack()
    x = randn(12, 8).requires_grad_()
    y = spectral_ops.experts_lowrank(x, weight, torch.tensor([2, 5, 5, 12]), None, None, bias.detach())
    zero = torch.zeros(4, 1, 8, dtype=x.dtype), torch.zeros(4, 12, 1, dtype=x.dtype)
    want = one_by_one(x, weight, [2, 5, 5, 12], *zero, bias.detach(), 1.0)
    torch.testing.assert_close(y, want)
    dy = randn(12, 12)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, want)))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_factors_packed_as_peft_does(dtype, backend):
    """lora_A.weight [r E, k] is expert slowest, lora_B.weight [d, r E] expert fastest: views, read as they lie."""
    E, d, k, r = 4, 12, 8, 3
    weight, _, _, _ = stack(E, d, k, r, dtype)
    lora_A, lora_B = randn(r * E, k, dtype=dtype).requires_grad_(), randn(d, r * E, dtype=dtype).requires_grad_()
    A, B = lora_A.view(E, r, k), lora_B.view(d, r, E).permute(2, 0, 1)
    x, ends = randn(12, k, dtype=dtype), [1, 4, 4, 12]
    y = spectral_ops.experts_lowrank(x, weight, torch.tensor(ends), A, B)
    delta = torch.einsum("ore,eri->eoi", lora_B.double().view(d, r, E), lora_A.double().view(E, r, k))
    first, parts = 0, []
    for e, end in enumerate(ends):
        parts.append(x[first:end].double() @ (weight[e].double() + delta[e]).T)
        first = end
    want, tolerance = torch.cat(parts), {"rtol": 8 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), want, **tolerance)
    dy = randn(12, d, dtype=dtype)
    got = torch.autograd.grad(y, [lora_A, lora_B], dy)
    for a, b in zip(got, torch.autograd.grad(want, [lora_A, lora_B], dy.double()), strict=True):
        assert (a.double() - b.double()).norm() <= 8 * torch.finfo(dtype).eps * b.double().norm()


def test_a_large_scale_overflows_nothing_in_float16(backend):
    """γ h is past float16 where γ h Bᵀ is not: so γ must not be in h."""
    weight, A, B, _ = stack(dtype=torch.float16, bias=False)
    x, ends = torch.full((12, 8), 50.0, dtype=torch.float16), [3, 6, 9, 12]
    with torch.no_grad():
        A.fill_(55.0)  # h = 22,000
        B.fill_(1e-4)
    y = spectral_ops.experts_lowrank(x, 0 * weight, torch.tensor(ends), A, B, scale=16.0)
    want = 16 * (x.double() @ A[0].double().T) @ B[0].double().T
    torch.testing.assert_close(y.double(), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("route", ["forward", "backward"])
def test_no_tensor_of_the_stacks_size(route):
    E, d, k, r, T = 16, 64, 48, 4, 40
    weight, A, B, _ = stack(E, d, k, r, torch.float32, bias=False)
    x = randn(T, k, dtype=torch.float32).requires_grad_()
    offsets = torch.arange(1, E + 1) * T // E

    def step():
        y = spectral_ops.experts_lowrank(x, weight, offsets, A, B)
        return y if route == "forward" else torch.autograd.grad(y, [x, A, B], torch.ones_like(y))

    made = allocations(step)
    assert made and max(made) < weight.numel() * 4 // 4, max(made)


class OnGPU(torch.Tensor):
    """Says that it is."""

    is_cuda = True


@pytest.mark.parametrize(
    ("capability", "hip", "takes"),
    [((8, 0), None, False), ((8, 9), None, False), ((9, 0), None, True), ((10, 0), None, True), ((12, 0), None, False),
     ((9, 4), "7.0", False)],
)  # fmt: skip
def test_where_torchs_product_waits_ours_is_taken(capability, hip, takes, monkeypatch):
    """torch's grouped_mm has its kernel for two architectures; elsewhere it copies the offsets to the host."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    x, weight = torch.empty(24, 64, dtype=torch.bfloat16), torch.empty(4, 32, 64, dtype=torch.bfloat16)

    assert grouped_mm_takes(x.as_subclass(OnGPU), weight) is takes
    assert not grouped_mm_takes(x[1:, 1:].as_subclass(OnGPU), weight[..., 1:])  # rows begin anywhere
    assert not grouped_mm_takes(x.as_subclass(OnGPU), weight[:, :30])  # nor would y's, which it pads
    assert not grouped_mm_takes(x.as_subclass(OnGPU), weight[:1].expand(1024, -1, -1).contiguous())
    assert not grouped_mm_takes(x.float().as_subclass(OnGPU), weight.float())
    assert not grouped_mm_takes(x, weight)


def grouped(x, weight, offs):
    """What torch's grouped_mm is on a GPU: rows past the last end are memory as it was."""
    y = x.new_full((x.shape[0], weight.shape[2]), float("nan"))
    first = 0
    for e, end in enumerate(offs.tolist()):
        y[first:end] = x[first:end] @ weight[e]
        first = end
    return y


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["experts_forward", "experts_backward"])
def test_the_composition_around_torchs_product(name, whole, monkeypatch):
    """The way of a GPU, run here: a bias rides on the update, and rows of nobody become zero where they must."""
    operator = _library.LAYERS[name]
    for args in layer_samples(name, torch.float64):
        args = (*args[:-1], whole)
        want = operator.default(*copied(args))
        with monkeypatch.context() as patch:
            patch.setattr(experts, "grouped_mm_takes", lambda x, weight: True)
            patch.setattr(F, "grouped_mm", grouped)
            got = operator.reference(*copied(args))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            sorted_rows = name == "experts_forward" or args[6] is None  # else dx is summed over a row's places
            if i == 0 and not whole and sorted_rows and b.numel():
                end = int(next(t for t in args if isinstance(t, torch.Tensor) and t.dtype == torch.int32)[-1])
                assert a[end:].isnan().all()
                a, b = a[:end], b[:end]
            torch.testing.assert_close(a, b)


# --- bad offsets -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, 20), min_size=4, max_size=4), st.sampled_from([torch.int32, torch.int64]))
def test_any_offsets_are_an_error_or_right(ends, dtype):
    weight, A, B, bias = stack()
    x = randn(12, 8)
    call = lambda: spectral_ops.experts_lowrank(x, weight, torch.tensor(ends, dtype=dtype), A, B, bias)  # noqa: E731
    if all(a <= b for a, b in zip([0, *ends], [*ends, 12], strict=True)):
        torch.testing.assert_close(call(), one_by_one(x, weight, ends, A, B, bias, 1.0))
    else:
        with pytest.raises(ValueError, match="offsets: got .*wanted int32 or int64"):
            call()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5))
def test_operators_called_directly_never_crash(begins):
    weight, A, B, _ = stack()
    x, offsets = randn(12, 8), torch.tensor(begins, dtype=torch.int32)
    forward = torch.ops.spectral_ops.experts_forward.default
    good = all(a <= b for a, b in zip([0, *begins], [*begins, 12], strict=True))
    call = lambda: forward(x, weight, None, A, B, None, offsets, None, 1.0, 0.0, True)  # noqa: E731
    if good:
        assert call()[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="offsets: got"):
            call()


BAD = {
    "x": lambda c: c | {"x": randn(2, 12, 8)},
    "weight": lambda c: c | {"weight": randn(12, 8)},
    "offsets": lambda c: c | {"offsets": torch.tensor([1, 2, 12])},
    "lora_A": lambda c: c | {"lora_A": randn(4, 3, 7)},
    "lora_B": lambda c: c | {"lora_B": randn(4, 12, 2)},
    "lora_B, experts": lambda c: c | {"lora_B": randn(3, 12, 3)},
    "lora_B, missing": lambda c: c | {"lora_B": None},
    "bias": lambda c: c | {"bias": randn(12)},
    "scale": lambda c: c | {"scale": float("nan")},
    "dropout_p": lambda c: c | {"dropout_p": 1.0},
    "offsets, floats": lambda c: c | {"offsets": randn(4)},
    "weight, trained": lambda c: c | {"weight": randn(4, 12, 8).requires_grad_()},
    "weight, dtype": lambda c: c | {"weight": randn(4, 12, 8, dtype=torch.float32)},
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    weight, A, B, bias = stack()
    call = {"x": randn(12, 8), "weight": weight, "offsets": torch.tensor([1, 2, 3, 12]), "lora_A": A, "lora_B": B,
            "bias": bias}  # fmt: skip
    spectral_ops.experts_lowrank(**call)
    with pytest.raises((TypeError, ValueError), match=rf"^{name.partition(',')[0]}: got .*wanted"):
        spectral_ops.experts_lowrank(**BAD[name](call))


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (1, 1, 1), (50, 2, 7), (9, 4, 4), (3, 2, 300)])
def test_sort_by_expert(T, K, E, dtype):
    index = torch.randint(-1, E + 2, (T, K), generator=torch.Generator().manual_seed(T), dtype=dtype)
    index[-1:] = torch.iinfo(dtype).min
    order, places, offsets = sort_by_expert(index, E)
    begins = offsets.tolist()
    assert offsets.dtype == torch.int32 and len(begins) == E + 1 and begins[0] == 0
    assert begins[-1] == int(((index >= 0) & (index < E)).sum())
    for t in range(T):
        for j in range(K):
            place, e = int(places[t, j]), int(index[t, j])
            assert order[place] == t
            if 0 <= e < E:
                assert begins[e] <= place < begins[e + 1]
            else:
                assert place >= begins[-1]
    assert sorted(places.flatten().tolist()) == list(range(T * K))


# --- the whole layer -------------------------------------------------------------------------------------------------


def clamped(gate_up):
    """gpt-oss's kind of gate: interleaved, clamped."""
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


LAYERS = {
    "both": {},
    "up alone": {"down_lora": None},
    "down alone": {"up_lora": None},
    "frozen": {"up_lora": None, "down_lora": None},
    "transposed with biases": {"transposed": True, "biases": True, "activation": clamped},
    "another rank's experts": {"beyond": True, "biases": True},
    "normalised": {"post_norm": lambda y: F.normalize(y, dim=-1), "beyond": True},
    "no gate": {"activation": F.gelu, "width": 1},
}


def layer(T=23, K=2, E=5, k=12, f=8, r=3, dtype=torch.float64, transposed=False, biases=False, activation=swiglu,
          beyond=False, width=2, post_norm=None, **loras):  # fmt: skip
    """The arguments of experts_mlp, and the same as one loop over tokens and their experts."""
    x = randn(T, k, dtype=dtype).requires_grad_()
    routing = torch.rand(T, E + beyond, generator=torch.Generator().manual_seed(1))
    index, weights = routing.argsort(1)[:, :K], routing[:, :K].to(dtype).requires_grad_()
    up, down = randn(E, width * f, k, dtype=dtype, fan=k), randn(E, k, f, dtype=dtype, fan=f)
    factors = {}
    for name, w in (("up_lora", up), ("down_lora", down)):
        A, B = randn(E, r, w.shape[2], dtype=dtype), randn(E, w.shape[1], r, dtype=dtype, fan=r)
        factors[name] = A.requires_grad_(), B.requires_grad_(), 0.5
    factors |= loras
    given = {"activation": activation, "post_norm": post_norm, "transposed": transposed, **factors}
    if biases:
        given |= {"up_bias": randn(E, width * f, dtype=dtype).requires_grad_(),
                  "down_bias": randn(E, k, dtype=dtype).requires_grad_()}  # fmt: skip
    stored = [w.mT.contiguous() if transposed else w for w in (up, down)]

    def looped():
        out = []
        for t in range(T):
            total = x.new_zeros(k)
            for j in range(K):
                e = int(index[t, j])
                if e >= E:
                    continue
                h = x[t : t + 1]
                for name, w in (("up", up), ("down", down)):
                    lora, bias = given[f"{name}_lora"], given.get(f"{name}_bias")
                    W = w[e] if lora is None else w[e] + lora[2] * lora[1][e] @ lora[0][e]
                    h = F.linear(h, W, None if bias is None else bias[e])
                    h = activation(h) if name == "up" else h
                total = total + weights[t, j] * (h if post_norm is None else post_norm(h))[0]
            out.append(total)
        return torch.stack(out)

    leaves = [x, weights, *(t for name in ("up_lora", "down_lora") for t in (given[name] or ())[:2])]
    leaves += [given[name] for name in ("up_bias", "down_bias") if name in given]
    return (x, index, weights, *stored), given, looped, leaves


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, backend):
    arguments, given, looped, leaves = layer(**LAYERS[name])
    out, want = spectral_ops.experts_mlp(*arguments, **given), looped()
    torch.testing.assert_close(out, want)
    dout = randn(*out.shape)
    got = torch.autograd.grad(out, leaves, dout)
    for a, b in zip(got, torch.autograd.grad(want, leaves, dout), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(spectral_ops.experts_mlp(*arguments, **given), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_layer_in_half_precision(dtype):
    arguments, given, looped, leaves = layer(dtype=dtype)
    out = spectral_ops.experts_mlp(*arguments, **given)
    assert out.dtype == dtype
    want = looped().double()
    assert (out.double() - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()
    dout = randn(*out.shape, dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(t, leaves, dout) for t in (out, looped())), strict=True):
        assert (a.double() - b.double()).norm() <= 16 * torch.finfo(dtype).eps * b.double().norm()


def test_another_rank_is_never_read():
    """Its weights make no number: NaN in a token all of whose experts are elsewhere stays there."""
    arguments, given, looped, leaves = layer(beyond=True)
    x, index, weights, up, down = arguments
    index[3] = torch.tensor([5, 99])
    index[4] = torch.tensor([-1, 5])
    x.data[3:5] = float("nan")
    out = spectral_ops.experts_mlp(*arguments, **given)
    assert not out[3:5].any() and out.isfinite().all()
    dx, dweights, *rest = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not dx[3:5].any() and not dweights[3:5].any()
    assert all(t.isfinite().all() for t in (dx, dweights, *rest))


def test_what_the_layer_keeps():
    """x as it came, of each projection's input the second one, every h; nothing gathered, nothing of a stack's size."""
    T, K, E, k, f, r = 64, 4, 16, 32, 16, 4
    arguments, given, _, leaves = layer(T, K, E, k, f, r, torch.float32)
    with saved_tensors() as kept:
        out = spectral_ops.experts_mlp(*arguments, **given)
    own = {storage(t) for t in [*arguments, *leaves]}
    sizes = sorted(
        t.untyped_storage().nbytes() for t in {storage(t): t for t in kept if storage(t) not in own}.values()
    )
    S = T * K
    # h twice; gate and up together, silu(gate) and the input of down; y; int64 places and order; offsets
    assert sizes == sorted(
        [S * r * 4, S * r * 4, S * 2 * f * 4, S * f * 4, S * f * 4, S * k * 4, S * 8, S * 8, (E + 1) * 4]
    )
    made = allocations(lambda: torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert max(made) <= S * 2 * f * 4 < arguments[3].numel() * 4


def test_dropout_of_the_layer():
    """One mask for a token's experts, the same again under checkpointing, and none in evaluation."""
    arguments, given, _, leaves = layer(T=50)
    call = lambda **more: spectral_ops.experts_mlp(*arguments, **given, dropout_p=0.5, **more)  # noqa: E731
    plain = spectral_ops.experts_mlp(*arguments, **given)
    assert torch.equal(call(), plain)
    torch.manual_seed(3)
    first = call(training=True)
    torch.manual_seed(3)
    second = torch.utils.checkpoint.checkpoint(lambda: call(training=True), use_reentrant=False)
    assert torch.equal(first, second) and not torch.allclose(first, plain)
    for a, b in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (first, second)), strict=True):
        assert torch.equal(a, b)


def test_layer_compiles_whole():
    arguments, given, _, leaves = layer(dtype=torch.float32)
    call = lambda x, index, weights: spectral_ops.experts_mlp(x, index, weights, *arguments[3:], **given)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, want = compiled(*arguments[:3]), call(*arguments[:3])
    torch.testing.assert_close(out, want)
    for a, b in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (out, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["layer", "rows"])
def test_one_program_serves_any_number_of_tokens(what):
    """The second size is compiled for all others: no check and no search may make a constant of it."""
    _, given, _, _ = layer(dtype=torch.float32)
    weight, A, B, bias = stack(dtype=torch.float32)
    programs = []

    def backend(graph, _):
        programs.append(graph)
        return graph.forward

    def call(T):
        arguments, _, _, _ = layer(T, dtype=torch.float32)
        if what == "layer":
            return compiled(*arguments[:3], *arguments[3:], **given)
        return compiled(randn(T, 8, dtype=torch.float32), weight, torch.tensor([1, 2, 2, 5]), A, B, bias)

    function = spectral_ops.experts_mlp if what == "layer" else spectral_ops.experts_lowrank
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for T in (23, 40, 57, 90):
        assert call(T).shape[0] == T
    assert len(programs) == 2


BAD_LAYERS = {
    "top_k_index": {1: torch.zeros(23, 2)},
    "top_k_index, shape": {1: torch.zeros(22, 2, dtype=torch.int64)},
    "top_k_weights": {2: torch.zeros(23, 3, dtype=torch.float64)},
    "up": {3: torch.zeros(16, 12, dtype=torch.float64)},
    "down": {4: torch.zeros(4, 12, 8, dtype=torch.float64)},
    "activation": {4: torch.zeros(5, 12, 9, dtype=torch.float64), "down_lora": None},
    "activation, nothing": {"activation": lambda rows: None},
    "activation, rows": {"activation": lambda rows: rows[1:, :8]},
    "post_norm": {"post_norm": lambda rows: rows[1:]},
    "post_norm, columns": {"post_norm": lambda rows: torch.cat([rows, rows], 1)},
    "up_lora": {"up_lora": [1, 2]},
    "up_lora_A": {
        "up_lora": (torch.zeros(5, 3, 9, dtype=torch.float64), torch.zeros(5, 16, 3, dtype=torch.float64), 1.0)
    },
    "down_bias": {"down_bias": torch.zeros(5, 11, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_errors_of_the_layer(name):
    arguments, given, _, _ = layer()
    arguments = [BAD_LAYERS[name].get(i, a) for i, a in enumerate(arguments)]
    given |= {key: value for key, value in BAD_LAYERS[name].items() if isinstance(key, str)}
    with pytest.raises((TypeError, ValueError), match=rf"^{name.partition(',')[0]}: got .*wanted"):
        spectral_ops.experts_mlp(*arguments, **given)
