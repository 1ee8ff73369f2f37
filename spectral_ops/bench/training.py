"""A whole training step of a Llama-shaped model, forward, backward and AdamW on the adapters: ``bench --training``.

For each method the frozen model, its peer (PEFT as it is; plain autograd for RoSA, which PEFT lacks) and spectral_ops
(PEFT after ``accelerate()``; RoSA's native adapters) take turns over one set of weights: eager, under torch.compile,
with and without gradient checkpointing. All three compute the gradient of the input embeddings, so that all pass
through every block. The loss and every gradient are compared with those of the eager peer before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import nn

from spectral_ops._table import table
from spectral_ops.bench import models, results
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import peak_bytes
from spectral_ops.bench.models import FROZEN, METHODS, MODELS
from spectral_ops.bench.peers import METHODS as RANKS
from spectral_ops.bench.peers import OURS
from spectral_ops.bench.results import Training
from spectral_ops.bench.shapes import DTYPES
from spectral_ops.cli.check import largest_error

BACKEND = "inductor"  # of torch.compile
RATE = 1e-4  # AdamW's
# Relative. In bfloat16 PEFT's own gradients are 3e-2 from float64's after two blocks.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


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
        error = largest_error(got, expected[name]) if name == OURS or compiled or checkpointing else None
        red = (error or 0.0) > TOLERANCE[dtype]
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


def beside_frozen(rows: list[Training]) -> Iterator[tuple[Training, Training]]:
    """Every row with the frozen model's of the same turns, which comes before it."""
    frozen = None
    for row in rows:
        if row.implementation == FROZEN:
            frozen = row
        yield row, frozen


def ratio(row: Training, frozen: Training) -> float | None:
    """The median over turns of the step's time over the frozen model's; None where either is red."""
    if row.red or frozen.red:
        return None
    return statistics.median(a / b for a, b in zip(row.times, frozen.times, strict=True))


def training_table(rows: list[Training]) -> str:
    """A line per implementation; RED stands in place of every figure of one whose loss or gradients are wrong."""
    header = ["method", "dtype", "mode", "implementation", "s/step", "x frozen", "tokens/s", "peak MiB"]
    header += ["beyond frozen", "loss", "error", "compiled"]
    lines = []
    for row, frozen in beside_frozen(rows):
        figures = ["RED"] * 5
        if not row.red:
            over = ratio(row, frozen)
            beyond = "-" if frozen.red else f"{(row.peak_bytes - frozen.peak_bytes) / 2**20:.1f}"
            figures = [f"{row.seconds:.4g}", "-" if over is None else f"{over:.3f}", f"{row.tokens_per_second:.0f}",
                       f"{row.peak_bytes / 2**20:.1f}", beyond]  # fmt: skip
        graphs = f"{row.blocks} blocks: {row.graphs} graphs, {row.graph_breaks} breaks" if row.compiled else "-"
        error = "-" if row.error is None else f"{row.error:.1e}"
        how = mode(row.compiled, row.checkpointing)
        lines.append([row.method, row.dtype, how, row.implementation, *figures, f"{row.loss:.4f}", error, graphs])
    return table(header, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whole training steps, of a model with random weights")
    group.add_argument("--training", action="store_true",
                       help="in place of single layers: forward, backward and AdamW beside PEFT's")  # fmt: skip
    group.add_argument("--model", choices=MODELS, default="smollm2", help="whose dimensions (default: smollm2)")
    group.add_argument("--blocks", type=int, help="default: as many as the model has")
    group.add_argument("--batch", type=int, default=1)
    group.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    group.add_argument("--checkpointing", action="store_true", help="also with every block recomputed in the backward")


def check(arguments: argparse.Namespace) -> None:
    """End the process where sizes or methods cannot be measured."""
    for name, least in (("blocks", 1), ("batch", 1), ("length", 2), ("repeats", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise SystemExit(f"bench --{name}: got {value}, wanted at least {least}")
    if unknown := set(arguments.methods) - set(METHODS):
        raise SystemExit(f"bench --methods: got {', '.join(sorted(unknown))}, wanted some of {', '.join(METHODS)}")


def plan(arguments: argparse.Namespace, found: results.Results) -> Iterator[tuple[str, Callable[[], None]]]:
    """What to measure, each with its label; every job adds to ``found``."""
    check(arguments)
    base_model = functools.lru_cache(maxsize=1)(models.base_model)
    shape = (arguments.batch, arguments.length)
    modes = ([False, True] if asked else [False] for asked in (arguments.compiled, arguments.checkpointing))
    for dtype, compiled, checkpointing, method in product(arguments.dtype, *modes, arguments.methods):

        def job(dtype=dtype, method=method, compiled=compiled, checkpointing=checkpointing) -> None:
            base = base_model(arguments.model, arguments.blocks, DTYPES[dtype], arguments.device)
            ids = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            found.training += measure(
                method, arguments.model, base, ids.to(arguments.device), arguments.rank or RANKS[method],
                compiled=compiled, checkpointing=checkpointing, repeats=arguments.repeats,
            )  # fmt: skip
            gc.collect()  # PEFT's models are cycles, and hold memory on the device

        how = mode(compiled, checkpointing)
        yield f"{arguments.model} with {method}, {dtype}, {shape[0]}x{shape[1]} tokens, {how}", job
