"""LLaMA-Factory: python examples/trainers/llamafactory_train.py FILE.yaml, instead of llamafactory-cli train FILE.yaml.

Without a line of code: SPECTRAL_OPS_ACCELERATE=1 llamafactory-cli train FILE.yaml (docs/trainers.md).
"""

from llamafactory.train.tuner import run_exp

from spectral_ops.integrations.transformers import SpectralOpsCallback

if __name__ == "__main__":
    run_exp(callbacks=[SpectralOpsCallback()])
