"""``bench --training``: every method's step beside its peer, on a model that takes a moment."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import spectral_ops  # noqa: E402
from spectral_ops import cli  # noqa: E402
from spectral_ops.bench import models, results, tables, training
from spectral_ops.bench.peers import OURS  # noqa: E402

TINY = ["--model", "tiny", "--length", "12", "--rank", "8", "--dtype", "float32", "--device", "cpu", "--repeats", "2"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base():
    return models.base_model("tiny", 2, torch.float32, "cpu")


@pytest.fixture(scope="module")
def ids():
    return torch.arange(24).view(2, 12)


def test_every_method_beside_its_peer(tmp_path, capsys):
    file = tmp_path / "results.json"
    assert cli.main(["bench", "--training", *TINY, "--blocks", "1", "--checkpointing", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "RED" not in out
    rows = results.read(file).training
    assert [(r.checkpointing, r.method) for r in rows[::3]] == [(c, m) for c in (False, True) for m in models.METHODS]
    for frozen, peer, ours in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        names = [frozen.implementation, peer.implementation, ours.implementation]
        assert names == [models.FROZEN, models.peer_of(ours.method), OURS]
        assert frozen.peak_bytes < min(peer.peak_bytes, ours.peak_bytes)
        assert 0 < ours.error < 1e-5 and ours.loss == pytest.approx(peer.loss, rel=1e-6)
        assert all(len(r.times) == 2 and r.tokens_per_second > 0 and r.blocks == 1 for r in (frozen, peer, ours))


@pytest.mark.parametrize("method", models.METHODS)
def test_recomputing_changes_memory_and_nothing_else(method, base, ids):
    for name, model in models.contenders(method, base, 8).items():
        contender = training.Contender(model, ids)
        kept, peak = contender.gradients(), training.peak_bytes(contender.gradients, ids.device)
        models.checkpoint(model)
        recomputed = contender.gradients()
        assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True)), name
        assert training.peak_bytes(contender.gradients, ids.device) < peak, name


@pytest.mark.slow
def test_blocks_share_what_is_compiled(base, ids, monkeypatch):
    monkeypatch.setattr(training, "BACKEND", "aot_eager")
    rows = training.measure("dora", "tiny", base, ids, 8, compiled=True, checkpointing=True, repeats=1)
    assert not any(row.red for row in rows)
    ours = rows[-1]
    assert (ours.implementation, ours.graphs, ours.graph_breaks) == (OURS, 1, 0)  # whatever PEFT's DoRA does before it
    assert "2 blocks: 1 graphs, 0 breaks" in tables.training_table(rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bat", "rosa"])
def test_our_blocks_compile_whole(method, base, ids):
    model = models.contenders(method, base, 8)[OURS]
    models.compile_blocks(model, method, "eager", fullgraph=True)
    training.Contender(model, ids).gradients()


def test_no_time_beside_a_wrong_gradient(monkeypatch, capsys, tmp_path):
    right, file = spectral_ops.accelerate, tmp_path / "results.json"

    def wrong(model, **options):
        right(model, **options)
        model.get_submodule("base_model.model.lm_head").register_forward_hook(lambda module, x, y: 1.01 * y)

    monkeypatch.setattr(spectral_ops, "accelerate", wrong)
    arguments = [*TINY, "--blocks", "1", "--methods", "bone", "--json", str(file)]
    assert cli.main(["bench", "--training", *arguments]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bone") and OURS in line)
    assert line.count("RED") == 5
    red = results.read(file).training[-1]
    assert red.red and red.times == [] and red.tokens_per_second is None and red.peak_bytes is None


def test_what_was_measured_survives_an_interrupt(monkeypatch, capsys, tmp_path):
    whole, calls, file = training.measure, [], tmp_path / "results.json"

    def measure(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(training, "measure", measure)
    assert cli.main(["bench", "--training", *TINY, "--blocks", "1", "--json", str(file)]) == 130
    assert {row["method"] for row in json.loads(file.read_text())["training"]} == {"lora"}
    assert "interrupted" in capsys.readouterr().out


def test_no_time_left(capsys):
    assert cli.main(["bench", "--training", *TINY, "--blocks", "1", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("left out") == len(models.METHODS)


@pytest.mark.parametrize("option", ["--blocks 0", "--batch 0", "--length 1"])
def test_sizes_are_checked(option):
    with pytest.raises(SystemExit, match=f"bench {option.split()[0]}: got {option.split()[1]}, wanted at least"):
        cli.main(["bench", "--training", *TINY, *option.split()])
