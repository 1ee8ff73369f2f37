"""The embedding row (METHODS 1.13): embedding_update against a lookup in the whole table."""

import pytest
import torch
from tensors import randn

import spectral_ops
from spectral_ops import column_norm, embedding_update

V, d, r = 11, 6, 3


def problem(dtype=torch.float64, dora=False, factor=None, adapter_dtype=None):
    E = randn(V, d, dtype=dtype)
    v = {"A": randn(r, V, dtype=adapter_dtype or dtype), "B": randn(d, r, dtype=adapter_dtype or dtype)}
    if dora:
        v["magnitude"] = randn(d, dtype=adapter_dtype or dtype) + 3
    v = {name: t.requires_grad_() for name, t in v.items()}

    def ours(ids, base=lambda y: y, **options):
        out = E[ids] if factor is None else E[ids] * factor
        if dora:
            norm = column_norm(E.t(), v["A"], v["B"], 0.5)
            options |= {"magnitude": v["magnitude"], "norm": norm, "weight": E, "factor": factor}
        B = v["B"] if factor is None else v["B"] * factor
        return embedding_update(base(out), ids, v["A"], B, scale=0.5, **options)

    def whole(ids, padding_idx=None):
        A = v["A"]
        if padding_idx is not None:
            held = torch.arange(V) == padding_idx
            A = torch.where(held, A.detach(), A)
        table = E + 0.5 * (v["B"] @ A).t()
        if dora:
            table = table * (v["magnitude"] / table.detach().norm(dim=0))
        return table[ids] if factor is None else table[ids] * factor

    return v, ours, whole


IDS = {
    "repeated": torch.tensor([[1, 4, 4], [4, 0, 10]]),
    "int32": torch.tensor([3, 3, 7], dtype=torch.int32),
    "one": torch.tensor([5]),
    "a number": torch.tensor(5),
    "strided": torch.arange(10).view(5, 2).t(),
    "none": torch.empty(0, 2, dtype=torch.int64),
}


def agree(v, y, want, exact=1e-12):
    torch.testing.assert_close(y, want, rtol=exact, atol=exact)
    dy = randn(*y.shape, dtype=y.dtype)
    for got, expected in zip(*(torch.autograd.grad(t, list(v.values()), dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("ids", IDS)
def test_the_whole_table(ids, dora, backend):
    for factor in (None, torch.tensor(3.5, dtype=torch.float64)):
        v, ours, whole = problem(dora=dora, factor=factor)
        agree(v, ours(IDS[ids]), whole(IDS[ids]))
        agree(v, ours(IDS[ids], base=lambda y: y.view_as(y)), whole(IDS[ids]))  # a view is not overwritten


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_padding_takes_no_gradient(dora):
    v, ours, whole = problem(dora=dora)
    agree(v, ours(IDS["repeated"], padding_idx=4), whole(IDS["repeated"], padding_idx=4))
    (dA,) = torch.autograd.grad(ours(IDS["repeated"], padding_idx=4).sum(), v["A"])
    assert not dA[:, 4].any() and dA[:, 1].all()


def test_gradcheck_and_a_single_derivative():
    v, ours, _ = problem()

    def function(A, B):
        v.update(A=A, B=B)
        return ours(IDS["repeated"])

    assert torch.autograd.gradcheck(function, list(v.values()))
    (dA,) = torch.autograd.grad(ours(IDS["one"]).square().sum(), v["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dA.sum().backward()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_gradient_is_summed_in_float32(dtype, dora):
    """4,096 times one id: a sum in bfloat16 would stop at 256."""
    for adapter in (dtype, torch.float32):
        v, ours, _ = problem(dtype, dora, adapter_dtype=adapter)
        ids = torch.full((4096,), 7)
        y = ours(ids)
        grads = torch.autograd.grad(y, list(v.values()), torch.full_like(y, 2.0**-8))
        u = 0.5 * 2.0**-8 * v["B"].detach().double()
        assert grads[0].dtype == adapter and torch.isfinite(grads[0]).all()
        assert not grads[0][:, :7].any() and not grads[0][:, 8:].any()
        if not dora:
            want = 4096 * u.sum(0)
            assert (grads[0][:, 7].double() - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()


def test_the_same_bits_every_time():
    v, ours, _ = problem(torch.float32)
    ids = torch.randint(V, (500,), generator=torch.Generator().manual_seed(0))
    first, again = (torch.autograd.grad(ours(ids).square().sum(), list(v.values())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def good():
    return {
        "base_out": torch.zeros(3, d), "ids": torch.zeros(3, dtype=torch.int64), "lora_A": torch.zeros(r, V),
        "lora_B": torch.zeros(d, r),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids: got .* wanted a tensor of int64 or int32"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"base_out: got .* wanted \[4, 'd'\] as ids"),
        ({"lora_B": torch.zeros(r, d)}, ValueError, "lora_B: got .* wanted"),
        ({"norm": torch.ones(d)}, ValueError, "norm: got a tensor, wanted None without a magnitude"),
        ({"magnitude": torch.ones(d)}, TypeError, "norm: got None"),
        ({"magnitude": torch.ones(d), "norm": torch.ones(d), "weight": torch.zeros(d, V)}, ValueError, "weight: got"),
    ],
)
def test_errors(change, error, message):
    spectral_ops.embedding_update(**good())
    with pytest.raises(error, match=message):
        spectral_ops.embedding_update(**{**good(), **change})


def test_an_id_past_the_table_raises():
    with pytest.raises((IndexError, RuntimeError), match="out of (range|DATA bounds)"):
        embedding_update(torch.zeros(1, d), torch.tensor([V]), torch.zeros(r, V), torch.zeros(d, r))
