"""Every CPU operator at every size of its tests, with the extension at argv[1], for `make sanitize` and test_build.py:
under AddressSanitizer and UndefinedBehaviorSanitizer. argv[2:]: dtypes, all of them if left out; or "overrun", for one
call that reads outside an allocation, so that it is seen to end in a report."""

import copy
import ctypes
import importlib.util
import sys
import warnings
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

spec = importlib.util.spec_from_file_location("spectral_ops._C", sys.argv[1])
sys.modules["spectral_ops._C"] = importlib.util.module_from_spec(spec)  # before the package looks for its own

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import cpu_kernels  # noqa: E402
import importance  # noqa: E402
from budget import check_operator  # noqa: E402
from instruments import results  # noqa: E402
from samples import SIZES, layer_samples, samples_of  # noqa: E402
from tensors import DTYPES  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops import _C, _library, _loader  # noqa: E402

assert "sanitizers address,undefined" in _C.build_info and not _loader.EXTENSIONS["cpu"].error, _loader.EXTENSIONS
if sys.argv[2:] == ["overrun"]:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    short = (ctypes.c_float * 4096).from_address(libc.malloc(4000 * 4))
    spectral_ops.block_sum(torch.frombuffer(short, dtype=torch.float32).view(1, 4096), 4)
    sys.exit("nothing was reported")

torch.manual_seed(0)
warnings.simplefilter("ignore")
dtypes = [getattr(torch, name) for name in sys.argv[2:]] or DTYPES
for name in importance.OPS:  # they take lists of tensors, which the samples of the others do not
    operator = _library.OPERATORS[name]
    for dtype in dtypes:
        for arguments in importance.samples(dtype)[name]:
            twin = copy.deepcopy(arguments)
            returned = operator.default(*arguments), operator.reference(*twin)
            got, want = (tree_leaves(part) for part in zip(returned, (arguments, twin), strict=True))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
with torch.random.fork_rng():  # what follows draws its own numbers
    for name in sorted(_loader.EXTENSIONS["cpu"].operators & set(_library.LAYERS)):
        layer = _library.LAYERS[name]
        for dtype in dtypes:
            for arguments in layer_samples(name, dtype):
                got, want = (results(layer, run, arguments) for run in (layer.default, layer.overloads["reference"]))
                assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want], name
for name in sorted(_loader.EXTENSIONS["cpu"].operators & set(_library.OPERATORS) - set(importance.OPS)):
    operator = _library.OPERATORS[name]
    for dtype in dtypes:
        for size in [*SIZES, {"T": 0}]:
            for arguments in samples_of(name, dtype=dtype, **size):
                check_operator(operator, operator.default, arguments)
cpu_kernels.sweep(dtypes)
print("clean:", _C.isa(), *dtypes)
