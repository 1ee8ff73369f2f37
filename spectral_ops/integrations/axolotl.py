"""axolotl's plugin: ``plugins: [spectral_ops.integrations.axolotl.SpectralOpsPlugin]`` in the yaml.

axolotl's own LoRA kernels read A and B past the layer's forward, so the layers they serve would never be called.
axolotl switches them on by itself, in validating the yaml, where none of the flags is set; so they are switched off
before that, in ``register``. The model is accelerated once the trainer exists: for reinforcement learning it is the
trainer that makes the adapter.
"""

from __future__ import annotations

import logging

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict

from spectral_ops.integrations.transformers import SpectralOpsCallback

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

log = logging.getLogger("spectral_ops")


class Options(BaseModel):
    """``spectral_ops:`` in the yaml, all optional: what :func:`spectral_ops.accelerate` takes."""

    model_config = ConfigDict(extra="forbid")
    strict: bool = False
    recompute: bool = False
    exact: bool = False
    siblings: bool = True


class SpectralOpsArgs(BaseModel):
    """The key that the plugin adds to axolotl's yaml."""

    spectral_ops: Options | None = None


def switched_on(cfg) -> list[str]:
    return [flag for flag in KERNELS if cfg.get(flag)]


class SpectralOpsPlugin(BasePlugin):
    """Accelerates the model that axolotl trains, and keeps axolotl's LoRA kernels off."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SpectralOpsArgs.__name__}"

    def register(self, cfg) -> None:
        """The yaml as the user wrote it: the last moment at which switching a kernel off leaves nothing patched."""
        if flags := switched_on(cfg):
            what = f"{', '.join(flags)}: axolotl's kernels read A and B past the layers that spectral_ops accelerates"
            if (cfg.get("spectral_ops") or {}).get("strict"):
                raise ValueError(f"{what}; set them to false, or take the plugin out")
            log.warning("%s; switched off", what)
        for flag in KERNELS:
            cfg[flag] = False  # where all are unset, axolotl sets them to true

    def pre_model_load(self, cfg) -> None:
        if flags := switched_on(cfg):  # the attention classes are patched by now
            raise ValueError(f"{', '.join(flags)}: switched on after spectral_ops had switched them off")

    def post_trainer_create(self, cfg, trainer) -> None:
        callback = SpectralOpsCallback(**(cfg.get("spectral_ops") or {}))
        trainer.add_callback(callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
