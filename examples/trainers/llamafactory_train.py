"""LLaMA-Factory: python examples/trainers/llamafactory_train.py FILE.yaml, instead of llamafactory-cli train FILE.yaml.

Without this file, in one process: python -m spectral_ops run -m llamafactory.cli train FILE.yaml
"""

from llamafactory.train.tuner import run_exp

from spectral_ops.integrations.transformers import SpectralOpsCallback

if __name__ == "__main__":
    run_exp(callbacks=[SpectralOpsCallback()])
