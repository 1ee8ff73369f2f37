"""ms-swift: a file for ``--external_plugins`` that imports this module makes ``--callbacks spectral_ops`` known.

ms-swift builds its callbacks with (args, trainer) before the trainer's own ``__init__``, so the callback sees
``on_init_end``, where it accelerates. Its wrapper around lora_A and lora_B (``keep_device_forward``) is no hook where x
and the adapter are on one device: see peft_plan.py.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from spectral_ops.integrations.transformers import SpectralOpsCallback

NAME = "spectral_ops"


def register(**options: Any) -> None:
    """Makes ``--callbacks spectral_ops`` known; options are those of SpectralOpsCallback, the default is none."""
    callbacks_map[NAME] = lambda args, trainer: SpectralOpsCallback(**options)


register()
