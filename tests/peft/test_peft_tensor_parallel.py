"""LoRA and MiSS over tensor-parallel base layers, two processes on the CPU: the numbers of plain PEFT on one process.

PEFT's own forward is no oracle here: over torch's row-parallel layers it leaves each process with its own part of x Aᵀ.
So everything is held against one process that has the whole model and the same adapters.
"""

from __future__ import annotations

import os

import pytest
import torch
from processes import in_two_processes
from torch import nn

peft = pytest.importorskip("peft")

from tiny import language_model, save_model  # noqa: E402

IDS = torch.arange(24).reshape(2, 12) % 90
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
METHODS = ["lora", "miss", "mini"]


def config(method: str, targets: list[str]):
    if method == "lora":
        return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    if method == "mini":
        return peft.MissConfig(r=5, target_modules=targets, init_weights="mini", mini_r=4)
    return peft.MissConfig(r=5, target_modules=targets, init_weights=False)


def fill(model: nn.Module, whole: dict[str, torch.Tensor], rank: int) -> None:
    """The adapters' values: this process's part where the parameter has it."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                local = p.to_local() if isinstance(p, DTensor) else p
                local.copy_(piece(whole[name], local.shape, rank))


def piece(t: torch.Tensor, shape, rank: int) -> torch.Tensor:
    for dim, size in enumerate(shape):
        if size != t.shape[dim]:
            t = t.narrow(dim, rank * size, size)
    return t


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in sorted(model.named_parameters())
        if p.requires_grad
    }


def results(model: nn.Module, call, rank: int | None = None, whole=None) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    output, inputs = call(model)
    output.square().sum().backward()
    found = {"output": output.detach(), "inputs": inputs.grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            found[name] = grad if grad is None or rank is None else (grad, piece(whole[name], grad.shape, rank).shape)
    return found


def on_net(model):
    x = X.clone().requires_grad_()
    return model(x), x


def on_llama(model):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    return model(inputs_embeds=embedded).logits, embedded


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False))


def close(expected, got, rank: int) -> str:
    """Empty, or the first difference."""
    for name, e in expected.items():
        g = got[name]
        g, e = (g[0], piece(e, g[1], rank)) if isinstance(g, tuple) else (g, e)
        error = ((e - g).norm() / e.norm()).item()
        if not error < 1e-5:
            return f"{name}: off by {error}"
    return ""


def one_case(rank: int, method: str, build, call, targets, parallel, first: bool) -> tuple[str, dict, list]:
    """A model whose base is cut before PEFT sees it (first) or after, against the whole one."""
    import spectral_ops

    reference = peft.get_peft_model(build(), config(method, targets))
    whole = values(reference)
    fill(reference, whole, rank)
    expected = results(reference, call)
    if first:
        model = peft.get_peft_model(parallel(build(), ""), config(method, targets))
    else:
        model = peft.get_peft_model(build(), config(method, targets))
        parallel(model, "base_model.model.")
    fill(model, whole, rank)
    report = spectral_ops.accelerate(model, strict=True)
    before = report.counts
    difference = close(expected, results(model, call, rank, whole), rank)
    operators = {row.operators for row in report.rows}
    assert operators == {"lowrank_update" if method == "lora" else "block_sum, lowrank_update"}, operators
    return difference, {"before": before, "after": report.counts}, report.grouped()


def torch_cases(rank: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plans = {
        "local": (ColwiseParallel(), RowwiseParallel()),
        "gathered": (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())),
    }
    found = {}
    for method in METHODS:
        for first in (True, False):
            for layout, (column, row) in plans.items():
                if first and layout == "gathered":
                    continue  # PEFT sizes the adapter by the shard, which is not what such a layer takes or gives

                def parallel(model, prefix, column=column, row=row, tail="" if first else ".base_layer"):
                    return parallelize_module(model, mesh, {f"{prefix}0{tail}": column, f"{prefix}2{tail}": row})

                key = f"{method}, {'before' if first else 'after'} PEFT, {layout}"
                found[key] = one_case(rank, method, net, on_net, ["0", "2"], parallel, first)
    return found


def refusals(rank: int) -> dict[str, tuple[str, list]]:
    """What is left to PEFT, and why; PEFT refuses some of it itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import spectral_ops

    mesh = init_device_mesh("cpu", (2,))
    local = ColwiseParallel(), RowwiseParallel()
    sequence = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    settings = {
        "tokens in parts": (sequence, {}),
        "DTensors given out": ((ColwiseParallel(use_local_output=False), RowwiseParallel()), {}),
        "dropout": (local, {"lora_dropout": 0.5}),
        "DoRA": (local, {"use_dora": True}),
        "lora_bias": (local, {"lora_bias": True}),
    }
    found = {}
    for name, ((column, row), more) in settings.items():
        model = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=["0", "2"], **more))
        parallelize_module(model, mesh, {f"base_model.model.{n}.base_layer": s for n, s in (("0", column), ("2", row))})
        spectral_ops.accelerate(model)
        try:
            model(X)
            outcome = "served"
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # whichever PEFT raises
            outcome = type(error).__name__
        found[name] = outcome, [reason for reason, _, _ in spectral_ops.report(model).grouped()]
    return found


def llama_cases(rank: int, folder: str):
    from transformers import AutoModelForCausalLM

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    found = {}
    for method in METHODS:

        def parallel(model, prefix):
            return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")

        found[method] = one_case(rank, method, language_model, on_llama, TARGETS, parallel, True)
    return found


def cases(rank: int, folder: str):
    torch.manual_seed(0)
    return torch_cases(rank), llama_cases(rank, folder), refusals(rank)


@pytest.mark.slow
def test_fused_on_the_shards_in_the_numbers_of_one_process(tmp_path):
    folder = save_model(tmp_path / "model")
    sizes = "an adapter's sizes are not those of the tensor-parallel base layer's shards"
    for of_torch, of_llama, refused in in_two_processes(cases, tmp_path, str(folder)):
        for name, (difference, counts, fallbacks) in of_torch.items():
            assert not difference and not fallbacks, (name, difference, fallbacks)
            assert counts["before"]["decided at the first call"] == 2 == counts["after"]["fused (base-agnostic)"], name
        for name, (difference, counts, fallbacks) in of_llama.items():
            assert not difference and not fallbacks, (name, difference, fallbacks)
            assert counts["after"]["fused (base-agnostic)"] == 2 * len(TARGETS), (name, counts)
        assert len(of_torch) == 9 and len(of_llama) == 3
        for name, (_, reasons) in refused.items():
            in_parts = name in ("tokens in parts", "DTensors given out")
            assert reasons[0] == (sizes if in_parts else f"{name} over a tensor-parallel base layer"), (name, reasons)
