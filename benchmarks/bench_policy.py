"""Log-probabilities of tokens: each operator of the row, and forward and backward with SmolLM2's head (k = 576,
V = 49,152), frozen and trained, beside torch's log_softmax over all logits, with the bytes that each makes at its
largest."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from spectral_ops import token_logprobs

TOKENS, K, V = 512, 576, 49_152


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("policy"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)


def by_log_softmax(hidden, head, targets):
    return torch.log_softmax((hidden @ head.t()).float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("function", [token_logprobs, by_log_softmax])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_forward_and_backward(benchmark, trained, function, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, K, dtype=getattr(torch, dtype), requires_grad=True)
    head = (torch.randn(V, K, dtype=hidden.dtype) * 3 * K**-0.5).requires_grad_(trained)
    leaves = [hidden, head] if trained else [hidden]
    targets, dlogp = torch.randint(0, V, (TOKENS,)), torch.randn(TOKENS)

    def step():
        return torch.autograd.grad(function(hidden, head, targets), leaves, dlogp)[0]

    with Largest() as largest:
        gradient = step()
    (want,) = torch.autograd.grad(by_log_softmax(hidden, head, targets), hidden, dlogp)
    error = (gradient.double() - want.double()).norm() / want.double().norm()
    assert error < (1e-5 if dtype == "float32" else 2e-2), f"red: {error}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(largest_mib=round(largest.bytes / 2**20, 1))
