"""`make methods` on a tiny Llama: every method trains, merges, and leaves the base as it found it."""

import argparse

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import every_method  # noqa: E402
from demo import data  # noqa: E402
from tiny_llama import Bytes, tiny_llama  # noqa: E402

from spectral_ops.bench import methods  # noqa: E402


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return tiny_llama(128, 192)


@pytest.mark.parametrize("name", methods.METHODS)
def test_trains_merges_and_leaves_no_trace(name, base):
    options = argparse.Namespace(steps=12, batch=2, length=24, rounds=1, seed=0, device=torch.device("cpu"))
    blocks = data.token_blocks(Bytes(), data.corpus()[:2000], 24) % 32  # few tokens, so that little training shows
    before = {key: value.clone() for key, value in base.state_dict().items()}
    result = every_method.prove(name, base, options, blocks[:4], blocks[:4], lambda note: None)
    assert result["held_out"][1] < result["held_out"][0]
    assert len(result["losses"]) == 12 and result["merged_difference"] < 1e-4
    assert result["trained"] > 0 and result["seconds"] > 0
    after = base.state_dict()
    assert set(after) == set(before)
    exact = not methods.METHODS[name].build().changes_base
    assert all(torch.equal(after[k], v) if exact else torch.allclose(after[k], v, atol=1e-6) for k, v in before.items())


def test_table_and_picture(tmp_path):
    result = {
        "method": "lora", "trained": 12, "rate": 1e-3, "init_seconds": 0.1, "losses": [3.0, 2.0, 1.5, 1.0],
        "held_out": [3.0, 2.0], "merged_difference": 1e-6, "seconds": 2.0, "frozen_seconds": 1.0, "saved": 2**20,
        "held": 2**21,
    }  # fmt: skip
    assert every_method.table([result], "t").row_count == 1
    every_method.picture([result], tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").stat().st_size > 5000
