"""PE-RLHF, the parts of `make rlhf`, on a tiny random Llama."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import rlhf as script  # noqa: E402
from demo import data, rlhf  # noqa: E402
from tiny_llama import Bytes  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCABULARY, PROMPT, NEW = 128, 8, 12


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="module")
def blocks():
    return data.token_blocks(Bytes(VOCABULARY), data.corpus()[:40_000], PROMPT + NEW)


@pytest.fixture(scope="module")
def trained(blocks):
    torch.manual_seed(0)
    roles = rlhf.Roles(tiny_llama(), r=4)
    before = {n: p.clone() for n, p in roles.model.named_parameters() if "lora_" not in n}
    reward = rlhf.train_reward(roles, blocks[:-128], blocks[-128:], prompt=PROMPT, steps=40, batch=32, lr=1e-2)
    policy = rlhf.train_policy(roles, blocks[:, :PROMPT], new=NEW, steps=30, batch=32, lr=1e-2)
    return roles, before, reward, policy


def test_the_reward_tells_pairs_apart(trained):
    _, _, reward, _ = trained
    first, last = rlhf.ends(reward["losses"])
    assert last < first - 0.05
    assert reward["accuracy"] > 0.6


def test_reward_rises_and_kl_stays_bounded(trained):
    _, _, _, policy = trained
    first, last = rlhf.ends(policy["reward"])
    assert last > first + 0.5
    assert policy["kl"][0] < 1e-6, "the policy does not start as its anchor"
    assert all(-1e-6 <= kl < 1.5 for kl in policy["kl"])


def test_the_base_stays_what_it_was(trained):
    """The anchor is the base: nothing but adapters and heads may have moved, and every adapter has."""
    roles, before, _, _ = trained
    moved = {n: p for n, p in roles.model.named_parameters() if "lora_B" in n}
    assert all(torch.equal(p, before[n]) for n, p in roles.model.named_parameters() if n in before)
    for name in rlhf.ADAPTERS:
        assert any(p.any() for n, p in moved.items() if n.endswith(f".{name}")), name


def test_rejected_continuations_keep_their_prompts(blocks):
    worse = rlhf.rejected(blocks[:50], PROMPT, blocks.unique())
    assert torch.equal(worse[:, :PROMPT], blocks[:50, :PROMPT])
    changed = (worse != blocks[:50])[:, PROMPT:].float().mean(1)
    assert changed[::2].mean() > 0.7 and 0.2 < changed[1::2].mean() < 0.6


def test_one_base_computes_what_four_copies_do(trained, blocks):
    roles = trained[0]
    roles.parameters("policy", "value")
    roles.model.zero_grad()
    tokens = blocks[:6]
    separate = rlhf.Separate(roles)
    shared, apart = rlhf.shared_loss(roles, tokens, PROMPT, 0.05), separate.loss(tokens, PROMPT, 0.05)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    shared.backward()
    apart.backward()
    ours, theirs = dict(roles.model.named_parameters()), separate.models
    for role in ("policy", "value"):
        mine = {n: p.grad for n, p in ours.items() if n.endswith(f".{role}") or f".{role}." in n}
        assert mine
        for name, p in theirs[role].named_parameters():
            if name in mine:
                torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-5)
    roles.model.zero_grad()


def test_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "corpus", lambda: "the quick brown fox jumps over the lazy dog. " * 60)
    options = script.parse(
        ["--steps", "2", "--reward-steps", "2", "--rounds", "1", "--batch", "3", "--prompt", "6", "--new", "4",
         "--held-out", "4"]
    )  # fmt: skip
    result = script.run(tiny_llama(), Bytes(VOCABULARY), options, script.Console(quiet=True))
    assert json.loads(json.dumps(result)) == result
    assert len(result["policy"]["reward"]) == len(result["policy"]["kl"]) == 2
    parameters = result["compared"]["parameters"]
    assert parameters["one base"] < parameters["four copies"] / 2
    assert [table.row_count for table in script.tables(result)] == [2, 4]
    script.picture(result, tmp_path / "rlhf.png")
    assert (tmp_path / "rlhf.png").read_bytes().startswith(b"\x89PNG")
