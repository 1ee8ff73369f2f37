"""examples/trainers: every file is short, is in docs/trainers.md, and those for Python run on a tiny model."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("lightning")

from tiny import ADAPTED, conversations, save_model  # noqa: E402

import spectral_ops  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples/trainers").iterdir() if path.is_file())
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
LIGHTNING = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
SETTINGS = {
    "hf_trainer": SMALL,
    "trl_sft": SMALL,
    "trl_dpo": SMALL,
    "trl_grpo": {**SMALL, "num_generations": 2, "max_completion_length": 4},
    "lightning_module": LIGHTNING,
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data(tmp_path, request):
    """The columns that each kind of trainer reads."""
    rows = []
    for c in conversations(8):
        text = {"text": f"{c['instruction']} {c['output']}"}
        prompt = {"prompt": c["instruction"]}
        choice = {**prompt, "chosen": c["output"], "rejected": "no"}
        rows.append({"trl_dpo": choice, "trl_grpo": prompt}.get(request.node.callspec.params["name"], text))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_documented(path):
    assert len(path.read_text().splitlines()) <= 40
    assert f"examples/trainers/{path.name}" in (ROOT / "docs/trainers.md").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_runs_fused(name, model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / f"examples/trainers/{name}.py"))["main"]
    trained = main(model, data, **SETTINGS[name])
    report = spectral_ops.report(trained)
    assert report.counts["fused"] == ADAPTED and not report.fallbacks(), str(report)
