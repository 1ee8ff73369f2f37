"""torch.compile without a graph break, in a fresh process: forward and backward, fixed and dynamic shapes."""

from __future__ import annotations

import pytest
from instruments import fresh_python

PROGRAM = """
import torch
import spectral_ops
from spectral_ops import NormCache

BACKEND, DYNAMIC = {backend!r}, {dynamic!r}
torch.set_num_threads(1)
torch.manual_seed(0)
k, d, r = 24, 40, 5
W, b = torch.randn(d, k) / k**0.5, torch.randn(d, requires_grad=True)
A, B = (torch.randn(r, k) / k**0.5).requires_grad_(), torch.randn(d, r, requires_grad=True)
C, g = torch.randn(r, r, requires_grad=True), 1 + 0.1 * torch.randn(d)
m, D = torch.rand(d, requires_grad=True), torch.randn(r, d, requires_grad=True)
mini = torch.randn(r, d // 2, requires_grad=True)
blocks = (0.2 * torch.randn(d // 8, 8, 8)).requires_grad_()
row_blocks = (0.2 * torch.randn(k // 8, 8, 8)).requires_grad_()
large_blocks = (0.1 * torch.randn(1, 24, 24)).requires_grad_()
W24 = torch.randn(24, k) / k**0.5
mask = torch.rand(d, k) < 0.2
v = torch.randn(int(mask.sum()), requires_grad=True)
S = spectral_ops.CSR.from_dense(mask).with_values(v)
turned = spectral_ops.CSR(
    v, S.row_offsets, torch.cat([c.flip(0) for c in S.col_indices.split(S.row_offsets.diff().tolist())]), (d, k),
    sorted=False).validate()
head = torch.randn(7, k, requires_grad=True)
W2, A2, B2 = torch.randn(d + 2, k), torch.randn(3, k, requires_grad=True), torch.randn(d + 2, 3, requires_grad=True)
A3, B3, ids = torch.randn(3, k, requires_grad=True), torch.randn(d, 3, requires_grad=True), torch.arange(8) % 3 - 1
cache = NormCache()

FUNCTIONS = {{
    "lowrank_linear": (lambda x: spectral_ops.lowrank_linear(x, W, A, B, b, scale=0.5), [A, B, b]),
    "lowrank_linear-everything": (
        lambda x: spectral_ops.lowrank_linear(x, W, A, B, b, scale=0.5, core=C, out_scale=g), [A, B, C, b]),
    "lowrank_update": (lambda x: spectral_ops.lowrank_update(x @ W.t(), x, A, B, scale=0.5), [A, B]),
    "lowrank_linear_group": (
        lambda x: torch.cat(spectral_ops.lowrank_linear_group(x, [(W, A, B, b, 0.5), (W2, A2, B2, None, 1.0)]), -1),
        [A, B, b, A2, B2]),  # no tensor shared: Dynamo traces no Function that is given one twice
    "dora_linear": (lambda x: spectral_ops.dora_linear(x, W, A, B, m, b, scale=0.5), [A, B, m, b]),
    "dora_linear-cached": (
        lambda x: spectral_ops.dora_linear(x, W, A, B, m, b, scale=0.5, norm=cache.get(W, A, B, 0.5)), [A, B, m, b]),
    "dora_linear-recompute": (lambda x: spectral_ops.dora_linear(x, W, A, B, m, scale=0.5, recompute=True), [A, B, m]),
    "bone_linear": (lambda x: spectral_ops.bone_linear(x, W, D, b), [D, b]),
    "bone_linear-mini": (lambda x: spectral_ops.bone_linear(x, W, mini), [mini]),
    "bone_update": (lambda x: spectral_ops.bone_update(x @ W.t(), x, D), [D]),
    "disha_linear": (lambda x: spectral_ops.disha_linear(x, W, D, [20, 1, 1, 1, 1]), [D]),
    "block_sum": (lambda x: spectral_ops.block_sum(x, r), []),
    "bat_linear": (lambda x: spectral_ops.bat_linear(x, W, blocks, b), [blocks, b]),
    "bat_linear-few": (lambda x: spectral_ops.bat_linear(x, W24, large_blocks), [large_blocks]),
    "bat_linear-row": (lambda x: spectral_ops.bat_linear(x, W, row_blocks, b, mode="row"), [row_blocks, b]),
    "bat_weight": (lambda x: x @ spectral_ops.bat_weight(W, blocks).t(), [blocks]),
    "rosa_linear": (lambda x: spectral_ops.rosa_linear(x, W, S, A, B, b, scale=0.5), [v, A, B, b]),
    "rosa_linear-spmm": (
        lambda x: spectral_ops.rosa_linear(x, W, S, A, B, b, route="spmm", gradient_route="sampled"), [v, A, B, b]),
    "rosa_linear-scatter": (
        lambda x: spectral_ops.rosa_linear(x, W, S, route="scatter", gradient_route="dense"), [v]),
    "rosa_linear-unsorted": (
        lambda x: spectral_ops.rosa_linear(x, W, turned, route="spmm", gradient_route="compact"), [v]),
    "rosa_update": (lambda x: spectral_ops.rosa_update(x @ W.t(), x, S), [v]),
    "csr_spmm": (lambda x: spectral_ops.csr_spmm(x, S), [v]),
    "csr_sddmm": (lambda x: spectral_ops.csr_sddmm(x @ W.t(), x, S), []),
    "segmented_lowrank_linear": (
        lambda x: spectral_ops.segmented_lowrank_linear(x, W, [A, A3], [B, B3], ids[: x.shape[0]], b, scales=[0.5, 2]),
        [A, B, A3, B3, b]),
    "segmented_lowrank_linear-grouped": (
        lambda x: spectral_ops.segmented_lowrank_linear(
            x, W, [A, A3], [B, B3], ids[: x.shape[0]], b, scales=[0.5, 2.0], route="grouped"), [A, B, A3, B3, b]),
    "segmented_lowrank_update": (
        lambda x: spectral_ops.segmented_lowrank_update(x @ W.t(), x, [A, A3], [B, B3], ids[: x.shape[0]]),
        [A, B, A3, B3]),
    "csr_add": (lambda x: x @ spectral_ops.csr_add(W, S).t(), [v]),
    "token_logprobs": (
        lambda x: spectral_ops.token_logprobs(x, head, x[..., 0].long() % 7, chunk=5, temperature=0.5), [head]),
    "token_logprobs-one-chunk": (lambda x: spectral_ops.token_logprobs(x, head, x[..., 0].long() % 7), [head]),
    "token_logprobs-frozen": (
        lambda x: spectral_ops.token_logprobs(x, head.detach(), x[..., 0].long() % 7, chunk=5, temperature=0.5), []),
    "kl_to_anchor": (lambda x: spectral_ops.kl_to_anchor(x, x.detach().flip(0)), []),
    "preference_loss": (lambda x: spectral_ops.preference_loss(x[0], x[1]), []),
}}
DROPOUT = {{
    "lowrank_linear": (lambda x: spectral_ops.lowrank_linear(x, W, A, B, dropout_p=0.4, training=True), [A, B]),
    "dora_linear": (lambda x: spectral_ops.dora_linear(x, W, A, B, m, dropout_p=0.4, training=True), [A, B, m]),
    "rosa_linear": (
        lambda x: spectral_ops.rosa_linear(x, W, S, A, B, route="spmm", dropout_p=0.4, training=True), [v, A, B]),
    "bone_linear": (lambda x: spectral_ops.bone_linear(x, W, D, dropout_p=0.4, training=True), [D]),
}}

def run(function, shape, parameters):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, k, generator=generator).requires_grad_()
    torch.manual_seed(2)
    y = function(x)
    dy = torch.randn(y.shape, generator=generator)
    return y, *torch.autograd.grad(y, [x, *parameters], dy)

for name in {names!r}:
    table = DROPOUT if {dropout!r} else FUNCTIONS
    function, parameters = table[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=BACKEND, dynamic=DYNAMIC)
    for shape in ([(3, 4), (5, 7), (2, 9)] if DYNAMIC else [(3, 4)]):
        for change in (False, True):  # another step's parameters: nothing of the first may be baked in
            got, want = run(compiled, shape, parameters), run(function, shape, parameters)
            assert [t.shape for t in got] == [t.shape for t in want]
            for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda m: f"{{name}}[{{i}}]: {{m}}")
            for p in (A, B, D, mini, m, blocks, row_blocks, large_blocks, v, head):
                p.data.mul_(1.25)
    if DYNAMIC:
        torch._dynamo.config.error_on_recompile = True
        try:
            run(compiled, (4, 11), parameters)  # as many tokens again: T > 2 k takes another route
        finally:
            torch._dynamo.config.error_on_recompile = False
    print("same", name, flush=True)
"""

FUNCTIONS = [
    "lowrank_linear", "lowrank_linear-everything", "lowrank_update", "lowrank_linear_group", "dora_linear",
    "dora_linear-cached", "dora_linear-recompute", "bone_linear", "bone_linear-mini", "bone_update", "disha_linear",
    "block_sum", "bat_linear", "bat_linear-few", "bat_linear-row", "bat_weight", "rosa_linear", "rosa_linear-spmm",
    "rosa_linear-scatter", "rosa_linear-unsorted", "rosa_update", "csr_spmm", "csr_sddmm", "csr_add",
    "segmented_lowrank_linear", "segmented_lowrank_linear-grouped", "segmented_lowrank_update",
    "token_logprobs", "token_logprobs-one-chunk", "token_logprobs-frozen", "kl_to_anchor", "preference_loss",
]  # fmt: skip


def compile_and_compare(names, backend, dynamic, dropout=False):
    code = PROGRAM.format(backend=backend, dynamic=dynamic, names=names, dropout=dropout)
    done = fresh_python(code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("same ")] == names


@pytest.mark.slow
def test_every_function():
    compile_and_compare(FUNCTIONS, "aot_eager", False)


@pytest.mark.thorough
def test_dynamic_shapes():
    names = ["lowrank_linear", "lowrank_update", "dora_linear", "dora_linear-cached", "bone_linear", "block_sum"]
    names += ["bat_linear", "bat_linear-row", "rosa_linear", "csr_spmm", "token_logprobs-one-chunk"]
    names += ["segmented_lowrank_linear"]
    compile_and_compare(names, "aot_eager", True)


@pytest.mark.slow
def test_dropout():
    compile_and_compare(
        ["lowrank_linear", "dora_linear", "bone_linear", "rosa_linear"], "aot_eager", False, dropout=True
    )


@pytest.mark.slow
def test_inductor():
    names = ["lowrank_linear", "dora_linear-cached", "bone_linear", "bat_linear", "rosa_linear-spmm"]
    compile_and_compare(names, "inductor", False)
