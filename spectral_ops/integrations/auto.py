"""Every PEFT model that is built in this process accelerated, from one place: ``BaseTuner.inject_adapter``.

get_peft_model, from_pretrained, add_adapter and transformers' and TRL's own ways all pass it, under whichever name a
trainer has imported them. PEFT is not imported for it: where it is not there yet, a finder waits for the one submodule
that holds the class. Probes such as ``find_spec("peft")`` do not meet that finder.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
from typing import Any

from spectral_ops import integrations
from spectral_ops._imports import Finder

__all__ = ["auto"]

logger = logging.getLogger("spectral_ops")
VARIABLE = "SPECTRAL_OPS_ACCELERATE"
TUNERS = "peft.tuners.tuners_utils"

lock = threading.RLock()
settings: dict[str, Any] | None = None  # accelerate's options; None: off
under_way = threading.local()  # .depth: injections that this thread is inside of


class Switch:
    """What :func:`auto` returns. As a context manager it puts back, when it is left, what was before the call."""

    def __init__(self, before: dict[str, Any] | None) -> None:
        self.before = before

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *exception: Any) -> None:
        switch(self.before)


def auto(
    enabled: bool = True, *, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
) -> Switch:
    """From now on :func:`accelerate` every PEFT model that anybody builds in this process, in every thread.

    It acts whenever PEFT injects an adapter: in get_peft_model, from_pretrained, add_adapter and load_adapter, and in
    transformers' and TRL's own ways, also where those names were imported before. Models that are there already stay
    as they are, and models built meanwhile stay accelerated after ``auto(False)``. Prompt and prefix tuning inject
    nothing and are not touched. PEFT is not imported by it, and need not be installed. The environment variable
    ``SPECTRAL_OPS_ACCELERATE=1`` (or ``strict``) has ``import spectral_ops`` call it.

    Args:
        enabled: False switches it off: PEFT's method is again the very function that it was.
        strict: raise a RuntimeError from the call that builds the model where a layer would be left to PEFT, and from
            a model's call that would fall back.
        recompute, exact, siblings: as for :func:`accelerate`.

    Returns a context manager: leaving it puts back what was before the call. The logger "spectral_ops" has a line
    (info) for every adapter injected. Raises TypeError for an ``enabled`` that is not a bool.
    """
    if not isinstance(enabled, bool):
        kind = type(enabled).__name__
        raise TypeError(f"enabled: got a {kind}, wanted True or False; for one model there is accelerate(model)")
    options = {"strict": strict, "recompute": recompute, "exact": exact, "siblings": siblings}
    return Switch(switch(options if enabled else None))


def from_environment() -> None:
    """Do as the environment variable says."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "1", "strict"):
        raise ValueError(f"{VARIABLE}: got {value!r}, wanted 1, strict, or nothing")
    if value:
        auto(strict=value == "strict")


def switch(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Make these the settings; returns those before."""
    global settings
    with lock:
        before, settings = settings, options
        if options is None:
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
            uninstall()
            return before
        if finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)
    if TUNERS in sys.modules:
        importlib.import_module(TUNERS)  # waits, without our lock, for a thread that is just importing it
        install()
    return before


def tuner_class() -> type | None:
    return getattr(sys.modules.get(TUNERS), "BaseTuner", None)


def install() -> None:
    with lock:
        tuner = tuner_class()
        if settings is not None and tuner is not None and not hasattr(tuner.inject_adapter, "_spectral_ops"):
            tuner.inject_adapter = wrapped(tuner.inject_adapter)


def uninstall() -> None:
    """Where somebody has wrapped our wrapper it stays, and only calls on."""
    tuner = tuner_class()
    if tuner is not None and getattr(tuner.inject_adapter, "_spectral_ops", None) is tuner.inject_adapter:
        tuner.inject_adapter = tuner.inject_adapter.__wrapped__


def wrapped(inject_adapter):
    @functools.wraps(inject_adapter)
    def inject(self, *args: Any, **kwargs: Any) -> Any:
        depth = getattr(under_way, "depth", 0)
        under_way.depth = depth + 1
        try:
            result = inject_adapter(self, *args, **kwargs)
        finally:
            under_way.depth = depth
        if depth == 0 and (options := settings) is not None:
            take(self, options)
        return result

    inject._spectral_ops = inject  # functools.wraps hands it on to the wrappers of others: they lead here
    return inject


def take(tuner: Any, options: dict[str, Any]) -> None:
    """Accelerate what a tuner has just injected. AdaLoRA's is not complete yet: it takes over at its first use."""
    try:
        if not integrations.adapted(tuner):
            return
    except ImportError as error:  # another PEFT than we know
        if options["strict"]:
            raise
        logger.warning("auto: nothing is accelerated: %s", error)
        return
    kind = type(tuner).__name__
    # what somebody chose for this model goes before what holds for all
    report = integrations.accelerate(tuner, **options | integrations.options_of(tuner))
    logger.info("auto: %s in %s: %s", kind, type(tuner.model).__name__, report.headline())


finder = Finder(TUNERS, install)
