"""Counts optimizer steps: what was worked out from trained weights is stale after one, whatever ``_version`` says."""

from __future__ import annotations

from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
_hook = None


def _count(*_args) -> None:
    global _steps
    _steps += 1


def watch() -> None:
    """Start counting, if nothing has yet."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_count)


def current() -> int:
    """Steps that any optimizer has taken since :func:`watch`."""
    return _steps
