"""A callback for transformers' Trainer and everything built on it: ``Trainer(..., callbacks=[SpectralOpsCallback()])``.

It changes the model once the trainer holds it, so it does not matter who made the PEFT model: you, or the trainer from
a ``peft_config``.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn
from transformers import TrainerCallback

from spectral_ops import integrations, triton_kernels
from spectral_ops.integrations.peft_report import BASE_AGNOSTIC, FUSED, NEVER, PEFT, Report

logger = logging.getLogger("spectral_ops")


def say(line: str) -> None:
    """A line for the user, who asked for it with the callback: on stderr where nobody has set the logger up."""
    if logger.level == logging.NOTSET and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
        print(line, file=sys.stderr)
    else:
        logger.info(line)


class SpectralOpsCallback(TrainerCallback):
    """Accelerates the trainer's model, and says after the first optimizer step what really ran.

    It acts at the end of the trainer's ``__init__``, and again when training begins, for adapters that came between
    and for a model that ``model_init`` has made anew.
    The line after the first step says how many layers ran fused, and for the rest how many and why. It is a warning
    where no layer ran fused, or some layers were never called.

    Args:
        strict: raise a RuntimeError where a layer would be left to PEFT, where a call would fall back, where the model
            has no adapter, and after the first step where a layer was never called.
        recompute, exact, siblings: as for :func:`spectral_ops.accelerate`. One that is not given stays what it is in a
            model that is accelerated already.

    Attributes:
        report: the :class:`~spectral_ops.integrations.peft_report.Report`, live; None before the model was seen.
    """

    def __init__(
        self,
        strict: bool = False,
        *,
        recompute: bool | None = None,
        exact: bool | None = None,
        siblings: bool | None = None,
    ):
        self.strict = strict
        given = {"recompute": recompute, "exact": exact, "siblings": siblings}
        self.options = {name: value for name, value in given.items() if value is not None}
        self.report = None
        self.told = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has not seen a model: the report belongs to this one's."""
        return {**vars(self), "report": None, "told": False}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None and integrations.adapted(model):
            self.report = self.accelerated(model)

    def accelerated(self, model: nn.Module) -> Report:
        return integrations.accelerate(model, **integrations.options_of(model) | self.options | {"strict": self.strict})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.told = False  # train() may come again, for another model too
        try:  # always: the trainer may have made the model anew (model_init), or adapters may have come
            self.report = self.accelerated(model)
        except ValueError as nothing:  # it has no layer of PEFT's: the message says what it is
            if self.strict:
                raise
            self.report = None
            logger.warning("nothing was accelerated: %s", nothing)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.told or self.report is None:
            return
        self.told = True
        counts, remarks = self.report.counts, self.report.remarks()
        lines = "\n  ".join([f"spectral_ops: {self.report.headline()}", *remarks])
        ran = counts[FUSED] + counts[BASE_AGNOSTIC]
        if self.strict and (not ran or NEVER in counts or counts[PEFT]):
            raise RuntimeError(f"strict=True, and not every layer ran fused\n{lines}")
        if not state.is_world_process_zero:
            return
        if not ran or NEVER in counts:
            logger.warning(lines)
        else:
            say(lines)
        if line := triton_kernels.use():
            say(f"spectral_ops: {line}")
