"""PEFT's config object of one of ours."""

from __future__ import annotations

import dataclasses
from typing import Any


def to_peft(config: Any) -> Any:
    """See :meth:`AdapterConfig.to_peft`."""
    ours = type(config).__name__
    try:
        import peft
    except ImportError as error:
        wanted = "needs PEFT 0.18.1 or later (pip install 'spectral_ops[peft]')"
        raise ImportError(f"{ours}.to_peft: {wanted}: {error}") from error
    fields = config.peft_fields()
    method = fields.pop("peft_type")
    kind = {str(name.value): kind for name, kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(method)
    here = f"PEFT {peft.__version__}"
    if kind is None:
        raise ValueError(
            f"{ours}: got {method}, wanted a method that {here} has: spectral_ops.attach(model, config) takes this one"
        )
    known = {field.name for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), None
        if field.name not in known and value != _default(field):
            wanted = repr(_default(field))
        elif field.name == "init_lora_weights" and str(value).startswith("milora"):
            wanted = "another initialisation"
        elif fields.get("target_parameters") and field.name == "lora_dropout" and value:
            wanted = "0.0 beside target_parameters"
        elif fields.get("target_parameters") and field.name == "init_lora_weights" and isinstance(value, str):
            wanted = None if value == "gaussian" else 'True, False or "gaussian" beside target_parameters'
        if wanted is not None:
            raise ValueError(
                f"{ours}.{field.name}: got {value!r}, wanted {wanted} for {here}, which has no counterpart:"
                " spectral_ops.attach(model, config) takes it"
            )
    return kind(**{name: value for name, value in fields.items() if name in known})


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
