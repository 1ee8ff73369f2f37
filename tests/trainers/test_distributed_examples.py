"""The examples that several processes run: FSDP, tensor parallelism, DeepSpeed's ZeRO-3, on two processes."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import in_two_processes
from tiny import ADAPTED, LAYERS, conversations, save_model

FOLDER = Path(__file__).parents[2] / "examples/trainers"
MISSING = [name for name in ("peft", "deepspeed", "datasets") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]


def examples(rank: int, model: str, data: str, outputs: str) -> dict[str, dict]:
    from test_deepspeed import here

    import spectral_ops

    here(rank)
    sys.path.insert(0, str(FOLDER))  # as Python does for a script

    def main(name: str, *arguments, **settings):
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](*arguments, **settings)

    counts = {name: spectral_ops.report(main(name, model, data, 2)).counts for name in ("fsdp", "tensor_parallel")}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    trained = main("deepspeed_zero3", model, data, output_dir=outputs, save_strategy="no", **settings)
    return counts | {"deepspeed_zero3": spectral_ops.report(trained).counts}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_they_run_fused(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"{c['instruction']} {c['output']}"} for c in conversations(8)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_model(tmp_path / "model")
    whole = {"fused": ADAPTED, "fused (base-agnostic)": 0, "PEFT": 0}
    parts = {"fused": 0, "fused (base-agnostic)": 3 * LAYERS, "PEFT": 0}
    expected = {"fsdp": whole, "tensor_parallel": parts, "deepspeed_zero3": whole}
    for counts in in_two_processes(examples, tmp_path, str(model), str(data), str(tmp_path / "outputs")):
        assert counts == expected
