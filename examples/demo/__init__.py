"""The parts of `examples/finetune.py`: the model and corpus, the training, the measuring, the reporting.

Importing it switches the Hugging Face libraries offline: the demo downloads nothing while it runs.
"""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")  # the demo shows its own progress
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they warn of optional kernels that nothing here uses
    logging.getLogger(name).setLevel(logging.ERROR)
