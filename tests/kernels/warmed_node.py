"""A compute node that has no GPU: a training step of adapter layers with all of Triton's own steps but loading.

    python tests/kernels/warmed_node.py '{"methods": ["dora"], "tokens": [96], "shape": [256, 128], "arch": 90}'

Layers run on CPU tensors that say they are on a GPU. Every launch goes through the real ``JITFunction.run``, Triton's
NVIDIA driver and its cache; only what loads code into a GPU, starts it, or calls a C compiler is replaced. So results
are rubbish, and which kernels were found, compiled or built is what a node would see. That is printed as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

warnings.filterwarnings("ignore")
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")

import triton  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import build  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops import _library, triton_kernels  # noqa: E402
from spectral_ops.bench import methods  # noqa: E402

asked = json.loads(sys.argv[1])
built: list[str] = []
started: list[str] = []


class OnGPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if func is torch.Tensor.get_device:
            return 0
        if func is torch.mm and (wide := kwargs.pop("out_dtype", None)):  # which torch has on GPUs alone
            args = tuple(t.to(wide) for t in args)
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        return func(*args, **kwargs)


torch.cuda.current_device = lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)
torch.cuda.get_device_properties = lambda _: SimpleNamespace(
    major=asked["arch"] // 10, multi_processor_count=asked.get("processors", 132)
)


class Loaded:
    """What loading a C function gives; which functions Triton asks for goes by its version."""

    def __init__(self, path):
        self.launch = lambda *args: started.append(path)
        self.load_binary = lambda *args: (1, 1, 32, 0, 1024)
        self.get_device_properties = lambda device: {"max_shared_mem": 232448}

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def compiler(name, source, folder, *rest):
    built.append(name)
    path = f"{folder}/{name}"
    open(path, "w").close()
    return path


build._load_module_from_path, build._build = lambda name, path: Loaded(path), compiler
nvidia.libcuda_dirs = lambda: []
if "activate" not in asked or asked["activate"]:
    triton_kernels.launcher("blocksum", "block_sum")  # as the first operator does
node = nvidia.CudaDriver()
node.get_current_device = lambda: 0
node.get_device_capability = lambda device: divmod(asked["arch"], 10)
node.get_current_stream = lambda device: 0
triton.runtime.driver.set_active(node)
hits = []


def call(self, *args):
    with OnGPU():  # backward passes leave the mode
        return self._run_triton(*args) if triton_kernels.has(self.stem, self.name) else self.default(*args)


def call_layer(self, *args):
    with OnGPU():
        return self._compose(None, args)


_library.Operator.__call__, _library.LayerOperator.__call__ = call, call_layer
listen = triton.knobs.compilation.listener


def listener(*, src, cache_hit, **rest):
    hits.append((src.name, cache_hit))
    if listen is not None:
        listen(src=src, cache_hit=cache_hit, **rest)


triton.knobs.compilation.listener = listener

(d, k), dtype = asked["shape"], getattr(torch, asked.get("dtype", "bfloat16"))
for name in asked["methods"]:
    linear = nn.Linear(k, d, bias=asked.get("bias", False), dtype=dtype).requires_grad_(False)
    fields = {"r": asked["rank"]} if "rank" in asked else {}
    if asked.get("dropout") and hasattr(methods.METHODS[name].build(), "lora_dropout"):
        fields["lora_dropout"] = asked["dropout"]
    forward, _ = methods.layer(name, linear, **fields)
    for T in asked["tokens"]:
        with OnGPU():
            x = torch.randn(T, k, dtype=dtype, requires_grad=True)
            y = forward(x)
            y.backward(torch.randn_like(y))
            with torch.no_grad():
                forward(x)
print(json.dumps({
    "hits": sum(hit for _, hit in hits), "compiled": sorted(name for name, hit in hits if not hit),
    "built": built, "started": len(started), "package": spectral_ops.__file__,
}))  # fmt: skip
