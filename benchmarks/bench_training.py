"""A whole training step of a small Llama: spectral_ops beside its peer and the frozen model, and our step by itself."""

import pytest
import torch

from spectral_ops.bench import models, tables, training
from spectral_ops.bench.peers import METHODS, OURS

LENGTH, BLOCKS = 128, 2


@pytest.fixture(scope="module")
def base():
    return models.base_model("smollm2", BLOCKS, torch.float32, "cpu")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("method", models.METHODS)
def test_step(benchmark, base, method, checkpointing):
    pytest.importorskip("peft")
    ids = torch.randint(base.config.vocab_size, (1, LENGTH))
    rows = training.measure(method, "smollm2", base, ids, METHODS[method], checkpointing=checkpointing, repeats=5)
    print("\n" + tables.training_table(rows))
    assert not any(row.red for row in rows), "red: a loss or gradient differs from the peer's"
    ratios = {row.implementation: round(tables.training_ratio(row, rows[0]), 4) for row in rows}
    benchmark.extra_info.update(ratios=ratios, peak_bytes={row.implementation: row.peak_bytes for row in rows})
    model = models.contenders(method, base, METHODS[method])[OURS]
    if checkpointing:
        models.checkpoint(model)
    benchmark.pedantic(training.Contender(model, ids).step, rounds=5, warmup_rounds=1)
