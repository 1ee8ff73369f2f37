"""examples/diffusion.py on a UNet as small as diffusers makes one: PEFT and accelerated train alike."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def diffusion():
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements/demo.txt")
    import diffusion

    return diffusion


def small(diffusion, *more):
    return diffusion.parse(["--steps=3", "--rounds=1", "--batch=1", "--size=16", "--channels=32", *more])


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_two_runs_agree(diffusion, adapter):
    options = small(diffusion, f"--adapter={adapter}")
    model = diffusion.adapted(options)
    initial, losses = diffusion.training.snapshot(model), []
    for name in ("peft", "spectral_ops"):
        diffusion.training.rewind(model, initial)
        report = diffusion.enter(model, name)
        losses.append(diffusion.train(model, options, lambda note: None))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert report.counts["PEFT"] == 0 and report.counts["fused"] > 30 and not report.fallbacks(), str(report)
    assert any(row.peft_class == "lora.Conv2d" and row.calls for row in report.rows)


def test_images_show_their_kinds():
    import diffusion

    options = small(diffusion, "--batch=64")
    batch = diffusion.images(options, 0)
    assert batch["sample"].shape == (64, 3, 16, 16) and batch["timestep"].max() < diffusion.TIMES
    assert len({tuple(t.flatten().tolist()) for t in batch["encoder_hidden_states"]}) == diffusion.KINDS
    assert all(torch.equal(a, b) for a, b in zip(batch.values(), diffusion.images(options, 0).values(), strict=True))


def test_probe(diffusion, capsys):
    arguments = ["--probe=spectral_ops", "--batch=1", "--size=16", "--channels=32"]
    assert diffusion.main(arguments) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"saved", "peak"}


def test_without_diffusers(monkeypatch, capsys):
    import sys

    import diffusion

    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert diffusion.main([]) == 2
    assert "diffusers: not installed, wanted" in capsys.readouterr().err
