"""A whole training step of a Llama-shaped model, forward, backward and AdamW on the adapters: ``bench --training``.

For each method the frozen model, its peer (PEFT as it is; plain autograd for RoSA, which PEFT lacks) and spectral_ops
(PEFT after ``accelerate()``; RoSA's native adapters) take turns over one set of weights: eager, under torch.compile,
with and without gradient checkpointing. All three compute the gradient of the input embeddings, so that all pass
through every block. The loss and every gradient are compared with those of the eager peer before anything is timed.
"""

from __future__ import annotations

import statistics

import torch
from torch import nn

from spectral_ops.bench import judge, models
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import peak_bytes
from spectral_ops.bench.peers import FROZEN, OURS
from spectral_ops.bench.results import Training

BACKEND = "inductor"  # of torch.compile
RATE = 1e-4  # AdamW's


class Contender:
    """One model in training on ``ids`` [batch, length]."""

    def __init__(self, model: nn.Module, ids: torch.Tensor):
        self.model, self.ids, self.parameters = model, ids, models.trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE) if self.parameters else None

    def backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward; the loss, and the embeddings with their gradient."""
        embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        loss = self.model(inputs_embeds=embedded, labels=self.ids).loss
        loss.backward()
        return loss.detach(), embedded

    def step(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> list[torch.Tensor]:
        """The loss, and the gradients of the embeddings and of every parameter."""
        loss, embedded = self.backward()
        found = [loss, embedded.grad, *(p.grad for p in self.parameters)]
        for p in self.parameters:
            p.grad = None
        return found

    def peak_bytes(self) -> int:
        """Weights, parameters and optimizer state, and the most that a step holds beside them."""
        self.step()  # the first makes the optimizer's state
        state = [] if self.optimizer is None else [t for s in self.optimizer.state.values() for t in s.values()]
        held = [*self.model.parameters(), *self.model.buffers(), *state]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        return sum(storages.values()) + peak_bytes(self.step, self.ids.device)


def measure(
    method: str,
    model: str,
    base: nn.Module,
    ids: torch.Tensor,
    rank: int,
    *,
    compiled: bool = False,
    checkpointing: bool = False,
    repeats: int = 5,
) -> list[Training]:
    """The frozen model, the method's peer and ours, over the weights of ``base``, a model named ``model``."""
    from torch._dynamo.utils import counters

    candidates = {name: Contender(m, ids) for name, m in models.contenders(method, base, rank).items()}
    peer, dtype = models.peer_of(method), base.dtype
    expected = {name: candidates[name].gradients() for name in (FROZEN, peer)}
    expected[OURS] = expected[peer]
    if compiled:
        torch._dynamo.reset()
    rows = {}
    for name, c in candidates.items():
        if checkpointing:
            models.checkpoint(c.model)
        if compiled:
            models.compile_blocks(c.model, name, BACKEND)
        counters.clear()
        got = c.gradients()
        error = judge.largest_error(got, expected[name]) if name == OURS or compiled or checkpointing else None
        red = judge.wrong(error, judge.STEP[dtype])
        rows[name] = Training(
            model=model, method=method, implementation=name, compiled=compiled, checkpointing=checkpointing,
            dtype=str(dtype).removeprefix("torch."), batch=ids.shape[0], length=ids.shape[1],
            blocks=len(models.blocks_of(c.model)), times=[], tokens_per_second=None, peak_bytes=None,
            loss=float(got[0]), error=error, red=red,
            graphs=counters["stats"]["unique_graphs"], graph_breaks=sum(counters["graph_break"].values()),
        )  # fmt: skip
        del got
    del expected
    for name, row in rows.items():
        if not row.red:
            row.peak_bytes = candidates[name].peak_bytes()
    calls = {name: c.step for name, c in candidates.items() if not rows[name].red}
    for name, seconds in interleave(calls, lambda name: None, repeats, ids.device).items():
        rows[name].times, rows[name].tokens_per_second = seconds, ids.numel() / statistics.median(seconds)
    return list(rows.values())


def mode(compiled: bool, checkpointing: bool) -> str:
    return ("compiled" if compiled else "eager") + (", checkpointing" if checkpointing else "")
