"""Fused operators inside models that somebody else built. Importing it needs torch alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spectral_ops.integrations.peft_report import Report

__all__ = ["accelerate", "as_peft_model", "report", "restore"]


def accelerate(
    model: torch.nn.Module, *, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
) -> Report:
    """Let the adapter layers of a PEFT model compute with the fused operators, in place.

    Parameters, state_dict, optimizer and numbers stay what they are (the same up to rounding; DoRA's column norm is
    kept in float32 where PEFT rounds it to the weight's dtype). At dropout p = 0 nothing is drawn from torch's
    generator; at p > 0 the mask comes from one seed drawn there, so it is another mask than PEFT's, with the same law.

    Covered: LoRA, rsLoRA, PiSSA, DoRA, AdaLoRA (with its rank allocation and regulariser) on ``nn.Linear`` and
    transformers' ``Conv1D``, MiSS (also mini and bat) on ``nn.Linear``, several active at once, and all of them but bat
    over bitsandbytes 4-bit and 8-bit layers and torchao's weights, whose own forward is called; LoRA over GPTQ, AWQ and
    AQLM as well. A subclass of ``nn.Linear`` is called too, unless it keeps nn.Linear's forward. LoRA and MiSS without
    dropout run over tensor-parallel layers. LoRA, rsLoRA and DoRA on ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and
    ``nn.Embedding``. Of dtypes, whatever mix of base, adapter and x PEFT takes.
    Scalings may be tensors (``prepare_model_for_compiled_hotswap``). Every other adapter layer, and every single call
    of a covered one that the fast path does not fit, runs PEFT's own forward; the report says which and why. Calling it
    again is fine: it also takes in the layers that ``add_adapter`` has created since, and the report counts from then.

    Args:
        model: a PeftModel, or any module that PEFT has injected adapter layers into.
        strict: raise a RuntimeError that lists the layers left to PEFT, now (and change nothing) or at the call that
            would fall back, instead of only reporting them.
        recompute: let DoRA layers save no output for backward and compute it again there. Needed where the model
            overwrites such a layer's output in place, which autograd otherwise refuses; costs a product per layer.
        exact: for MiSS's bat with float32 blocks over a bfloat16 or float16 base. By default the transformed weight is
            rounded to the base's dtype, as PEFT rounds it under autocast; in bfloat16 that takes a third of a change of
            1e-4. With exact the change stays float32, as in PEFT outside autocast, for a float32 product per layer.
            Nothing else is changed by it.
        siblings: from the second call on, form x Aᵀ, and in backward dA, once for LoRA and AdaLoRA layers without
            dropout that are seen to get the same x (q, k, v; gate, up). Only on a GPU and where x has 2²⁴ elements or
            more; off under autocast and torch.compile.

    Returns a :class:`~spectral_ops.integrations.peft_report.Report`: ``print(report)`` shows what runs where, and is
    live; :func:`report` gives it again. The first call that falls back is told to the logger "spectral_ops".
    Raises TypeError for something that is not a module, ValueError for a module without PEFT layers, ImportError
    without PEFT.
    """
    return _peft().accelerate(model, strict=strict, recompute=recompute, exact=exact, siblings=siblings)


def report(model: torch.nn.Module) -> Report:
    """What serves each adapter layer of an accelerated model, from the calls so far: print it.

    Every layer counts the calls that the fused operators served and those that PEFT's own forward served, by reason. A
    layer that no call has reached says so: its parent may read the weights past the layer's forward, as torch's own
    fast paths do in eval. Calls inside graphs of torch.compile are not counted.

    Args:
        model: a module with accelerated layers: what :func:`accelerate` took, a part of it, or a wrapper (DDP, FSDP).

    Returns a :class:`~spectral_ops.integrations.peft_report.Report`.
    Raises TypeError for something that is not a module, ValueError where no layer is accelerated.
    """
    return _peft().report(model)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`accelerate` in place: every layer is PEFT's own class again. Returns ``model``.

    A model that is not accelerated comes back as it is. Raises TypeError for something that is not a module.
    """
    return _peft().restore(model)


def as_peft_model(model: torch.nn.Module) -> torch.nn.Module:
    """A model with native adapters as a ``peft.PeftModel``, whose adapters they are.

    Pass it to a trainer in place of the model. Trainer saves, resumes and reloads the best adapter as it does PEFT's;
    TRL's DPO, KTO, GRPO and RLOO take their reference from this model, with the adapter as it was when the trainer was
    made, instead of loading a second one. ``wrapped.get_base_model()`` is the model again. What a PeftModel offers and
    this one does not raises NotImplementedError or AttributeError by name.

    Args:
        model: what :func:`attach` has given adapters; not copied.

    Raises ValueError where the model has no adapters, or one on its output head, whose weight TRL reads past the layer;
    TypeError for something that is not a module; ImportError without PEFT.
    """
    _peft()
    from spectral_ops.integrations import native

    return native.as_peft_model(model)


def adapted(model: torch.nn.Module) -> bool:
    """Whether the model has an adapter layer of PEFT's."""
    return bool(_peft().tuner_layers(model))


def options_of(model: torch.nn.Module) -> dict[str, bool]:
    """The options that the model's layers were accelerated with; empty where none is."""
    return _peft().options_of(model)


def _peft():
    try:
        from spectral_ops.integrations import peft_accelerate
    except ImportError as error:
        wanted = "accelerate needs PEFT 0.18.1 or later (pip install 'spectral_ops[peft]')"
        raise ImportError(f"{wanted}: {error}") from error
    return peft_accelerate
