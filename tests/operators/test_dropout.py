"""The dropout row: the generator, its mask, and the products that regenerate it (METHODS 1.1, trap 1)."""

from __future__ import annotations

import pytest
import torch
from instruments import saved_tensors
from problems import FAMILIES
from tensors import DTYPES, ids, randn

from spectral_ops import lowrank_linear, use_backend
from spectral_ops.core import autograd, philox
from spectral_ops.functional import dropout


def philox_by_hand(counter: int, seed: int) -> list[int]:
    """Philox4x32-10 in plain Python integers, from the paper (Salmon et al., SC 2011)."""
    c = [counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        even, odd = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [odd >> 32 ^ c[1] ^ key[0], odd & 0xFFFFFFFF, even >> 32 ^ c[3] ^ key[1], even & 0xFFFFFFFF]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def test_generator_against_the_papers_known_answers():
    """Random123's kat_vectors for philox4x32-10 with a zero counter and key."""
    words = philox.philox(torch.tensor([0]), torch.tensor([0]))[0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**62 - 1])
def test_generator_against_plain_integers(seed):
    counters = [0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
    got = philox.philox(torch.tensor(counters), torch.tensor([seed])).tolist()
    assert got == [philox_by_hand(c, seed) for c in counters]


def test_mask_is_a_function_of_seed_and_element():
    """Element e takes word e mod 4 at counter e div 4, whatever the shape."""
    seed = torch.tensor([987654321])
    flat = philox.keep_mask(1, 60, seed, 0.3).flatten()
    assert torch.equal(philox.keep_mask(6, 10, seed, 0.3).flatten(), flat)
    assert torch.equal(philox.keep_mask(60, 1, seed, 0.3).flatten(), flat)
    by_hand = [(philox_by_hand(e // 4, 987654321)[e % 4] >> 8) / 2**24 >= 0.3 for e in range(60)]
    assert flat.tolist() == by_hand
    assert philox.keep_mask(0, 10, seed, 0.3).shape == (0, 10)
    assert philox.keep_mask(3, 5, seed, 0.0).all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_is_binomial(p):
    """Over 2·10⁵ elements the share kept is 1 - p to five standard deviations; so it is in each row and column."""
    rows, columns = 400, 500
    for seed in (3, 2**61 + 11):
        kept = philox.keep_mask(rows, columns, torch.tensor([seed]), p).double()
        for share, n in ((kept.mean(), rows * columns), (kept.mean(0), rows), (kept.mean(1), columns)):
            deviation = (share - (1 - p)).abs().max().item() / (p * (1 - p) / n) ** 0.5
            assert deviation < 5, deviation
        centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
        for shift in (1, 2, 3, 4, 8, columns):  # neighbours do not know of each other
            flat = centred.flatten()
            correlation = (flat[shift:] * flat[:-shift]).mean().item() * flat.numel() ** 0.5
            assert abs(correlation) < 5, (shift, correlation)


def test_seeds_give_independent_masks():
    masks = [philox.keep_mask(100, 100, torch.tensor([s]), 0.5).double() - 0.5 for s in (0, 1, 2, 2**32, 2**33)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a * b).sum().item()) < 5 * 0.25 * 100


def test_expected_value_of_the_layer():
    """Inverted dropout: averaged over masks, the layer with dropout is the layer without."""
    x, W, A, B = randn(2, 12), randn(5, 12), randn(3, 12), randn(5, 3)
    n = 2000
    total = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(n):
        total += lowrank_linear(x, W, A, B, dropout_p=0.3, training=True)
    variance = (x[:, None, :] * (B @ A)).square().sum(-1) * 0.3 / 0.7  # of one call: that of each term, summed
    error = (total / n - lowrank_linear(x, W, A, B)).abs() / (variance / n).sqrt()
    assert error.max() < 5, error


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_products_use_the_same_mask(dtype, p, backend):
    """Forward, dA and dx: mask read off each product separately is the definition's."""
    T, k = 9, 15
    seed = torch.tensor([42])
    want = philox.keep_mask(T, k, seed, p)
    eye, ones = torch.eye(k, dtype=dtype), torch.ones(T, k, dtype=dtype)
    forward = dropout.dropout_project_op(ones, eye, seed, p) != 0
    outer = dropout.dropout_outer_op(torch.eye(T, dtype=dtype), ones, seed, p) != 0
    lifted = torch.zeros(T, k, dtype=dtype)
    dropout.dropout_lift_op(lifted, ones[:, :1].contiguous(), torch.ones(1, k, dtype=dtype), seed, p)
    plain = dropout.seeded_dropout_op(ones, seed, p) != 0
    for name, mask in {"project": forward, "outer": outer, "lift": lifted != 0, "plain": plain}.items():
        assert torch.equal(mask, want), name


def test_kept_elements_are_scaled(backend):
    seed = torch.tensor([5])
    x = randn(20, 30)
    got = dropout.seeded_dropout_op(x, seed, 0.25)
    keep = philox.keep_mask(20, 30, seed, 0.25)
    torch.testing.assert_close(got, x * keep / 0.75)


def test_dropped_nan_is_dropped():
    """Zero where the mask says so, not NaN · 0."""
    seed = torch.tensor([5])
    got = philox.dropout(torch.full((8, 8), float("nan")), seed, 0.5)
    keep = philox.keep_mask(8, 8, seed, 0.5)
    assert torch.equal(got.isnan(), keep)
    assert not got[~keep].any()


def test_seed_comes_from_torchs_generator():
    x = torch.zeros(2, 3)
    torch.manual_seed(9)
    first = autograd.draw_seed(x, 0.5, True)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    second = autograd.draw_seed(x, 0.5, True)
    assert first != second
    torch.manual_seed(9)
    assert autograd.draw_seed(x, 0.5, True) == first
    state = torch.get_rng_state()
    assert autograd.draw_seed(x, 0.0, True) is None
    assert autograd.draw_seed(x, 0.5, False) is None
    assert torch.equal(torch.get_rng_state(), state), "a seed was drawn that nobody needs"
    seeds = torch.cat([autograd.draw_seed(x, 0.5, True) for _ in range(200)])
    assert seeds.unique().numel() == 200
    assert (seeds >= 0).all()
    assert (seeds > 2**32).any(), "the high word of the key is never used"


def test_forked_generator_replays():
    problem = FAMILIES["lora-dropout"].build()
    torch.manual_seed(1)
    with torch.random.fork_rng():
        first = problem.function(problem.inputs)
    assert torch.equal(problem.function(problem.inputs), first)


@pytest.mark.parametrize("name", ["lora-dropout", "lora-core-scaled-dropout", "lora-update-everything", "bone-dropout"])
def test_evaluation_ignores_dropout(name):
    """training=False is p = 0, bit for bit, and draws nothing."""
    problem, same = FAMILIES[name].build(), FAMILIES[name].build(p=0.0)
    same.inputs = problem.inputs
    import spectral_ops

    real = {f: getattr(spectral_ops, f) for f in ("lowrank_linear", "lowrank_update", "bone_linear")}
    state = torch.get_rng_state()
    try:
        for f, call in real.items():
            setattr(spectral_ops, f, lambda *a, call=call, **kw: call(*a, **{**kw, "training": False}))
        got = problem.function(problem.inputs)
    finally:
        for f, call in real.items():
            setattr(spectral_ops, f, call)
    assert torch.equal(got, same.function(same.inputs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["lora-dropout", "dora-dropout", "bone-dropout"])
def test_no_mask_is_kept(name):
    """What backward keeps of the mask is one number."""
    problem = FAMILIES[name].build(((6, 8), 24, 40, 5))
    with saved_tensors() as kept:
        problem.call()
    assert not [t for t in kept if t.dtype == torch.bool]
    assert [t.numel() for t in kept if t.dtype == torch.int64] == [1]


def test_mask_is_the_same_on_every_backend():
    problem = FAMILIES["lora-dropout"].build(dtype=torch.float64)
    default = problem.call()
    with use_backend("reference"):
        torch.testing.assert_close(problem.call(), default, rtol=1e-12, atol=1e-12)


def test_zero_p_and_tiny_p_agree():
    """p so small that no 24-bit fraction falls below it keeps everything."""
    seed = torch.tensor([1])
    assert philox.keep_mask(100, 100, seed, 2.0**-30).sum() >= 10_000 - 2
    x = randn(3, 8)
    torch.testing.assert_close(dropout.seeded_dropout_op(x, seed, 0.0), x)
