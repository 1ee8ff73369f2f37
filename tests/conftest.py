"""Settings every test runs under: a fixed seed, no backend forced from outside, no more threads than cores."""

import os
from importlib import metadata
from importlib.util import find_spec

os.environ.pop("SPECTRAL_OPS_BACKEND", None)  # a forced backend would hide the ones under test
os.environ.pop("SPECTRAL_OPS_ACCELERATE", None)  # stock PEFT would be accelerated too
os.environ["SPECTRAL_OPS_TUNED"] = ""  # the defaults are tested, whatever was measured on this machine
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses deterministic mode

import pytest
import torch

from spectral_ops import _library

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


LONGEST = (
    "test_triton",
    "test_cuda_build",
    "test_gpu_script",
    "test_cuda_host",
    "test_demo",
    "test_native_adapters",
    "test_compile",
)


def pytest_report_header():
    """`make peft` puts another PEFT before the pinned one; importing it here would cost seconds."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("peft", "transformers") if find_spec(name))


def pytest_collection_modifyitems(items):
    """The longest files first, so that two processes that each take the next whole file end together. What is thorough
    is slow too: `-m "not slow"` leaves both out."""
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker("slow")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_generate_tests(metafunc):
    """Classes with a ``families`` list run each of their tests that takes ``family`` on every one of them."""
    if "family" in metafunc.fixturenames and getattr(metafunc.cls, "families", None):
        metafunc.parametrize("family", metafunc.cls.families, ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    assert _library.forced_backend is None, "a test left a backend forced"
    assert torch.is_grad_enabled()


@pytest.fixture(params=["default", "reference"])
def backend(request):
    """Run the test on the dispatcher's choice (the compiled kernels where they are built) and on the references."""
    if request.param == "default":
        yield "default"
        return
    from spectral_ops import use_backend

    with use_backend("reference"):
        yield "reference"


@pytest.fixture
def two_threads():
    """Two intra-op threads, so that rows are split among threads whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Threads spend longer waiting for each other than small layers take, the more so where the machine has other
    work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    """The module peft_tiny, where transformers and PEFT are."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return pytest.importorskip("peft_tiny")
