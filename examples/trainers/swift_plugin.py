"""ms-swift: swift sft --external_plugins examples/trainers/swift_plugin.py --callbacks spectral_ops ..."""

import spectral_ops.integrations.swift  # noqa: F401
