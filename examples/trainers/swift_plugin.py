r"""ms-swift: importing the module makes the callback known, and --callbacks chooses it.

swift sft --external_plugins examples/trainers/swift_plugin.py --callbacks spectral_ops \
    --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset tatsu-lab/alpaca --tuner_type lora

With options, for instance strict: spectral_ops.integrations.swift.register(strict=True) below the import.
"""

import spectral_ops.integrations.swift  # noqa: F401
