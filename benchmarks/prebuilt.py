"""Whether the compiled extensions that lie here serve: they load, have this package's schemas, and run on this device.

    python -m benchmarks.prebuilt cpu|cuda

Prints what is there, or why it does not serve, and then ends with status 1.
"""

from __future__ import annotations

import sys

import torch

from spectral_ops import _library, _loader
from spectral_ops.bench.samples import arguments


def reasons(device: str) -> list[str]:
    """Why the extensions do not serve ``device``: what the loader says, or what a first kernel says."""
    wanted = [e for name, e in _loader.EXTENSIONS.items() if name in ("cpu", device)]
    found = [e.error for e in wanted if e.error]
    if found:
        return found
    operator = _library.OPERATORS["block_sum"]
    try:
        operator.default(*next(arguments(operator.name, 8, 64, 64, 8, torch.float32, device)))
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:  # compiled for another architecture
        return [f"{operator.name} does not run on {device}: {str(error).splitlines()[0]}"]
    return []


def main(device: str) -> int:
    found = reasons(device)
    for line in found or [f"{e.module}: {e.info}" for e in _loader.EXTENSIONS.values() if not e.error]:
        print(f"prebuilt: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
