"""TRL's trainers with one line: the losses and files of stock PEFT, every layer fused."""

import logging

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from peft import get_peft_model  # noqa: E402
from tiny import ADAPTED  # noqa: E402
from training import (  # noqa: E402
    CONFIGS,
    STEPS,
    arguments,
    judged,
    preferences,
    prompts,
    run,
    texts,
    the_same_with_the_callback,
)
from transformers import LlamaForSequenceClassification  # noqa: E402

from spectral_ops import auto, report  # noqa: E402
from spectral_ops.integrations.transformers import SpectralOpsCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def sft(folder, model, words, callbacks, config):
    from trl import SFTConfig, SFTTrainer

    args = arguments(SFTConfig, folder, max_length=64)
    return SFTTrainer(
        model, args, train_dataset=texts(), processing_class=words, peft_config=config, callbacks=callbacks
    )


def dpo(folder, model, words, callbacks, config):
    from trl import DPOConfig, DPOTrainer

    args = arguments(DPOConfig, folder, max_length=64)
    return DPOTrainer(
        model, args=args, train_dataset=preferences(), processing_class=words, peft_config=config, callbacks=callbacks
    )


def kto(folder, model, words, callbacks, config):
    from trl import KTOConfig, KTOTrainer

    args = arguments(KTOConfig, folder, max_length=64)
    return KTOTrainer(
        model, args=args, train_dataset=judged(), processing_class=words, peft_config=config, callbacks=callbacks
    )


def reward(folder, model, words, callbacks, config):
    from trl import RewardConfig, RewardTrainer

    model.config.num_labels = 1
    scorer = LlamaForSequenceClassification(model.config)
    scorer.model.load_state_dict(model.model.state_dict())
    scorer.score.weight.data.fill_(0.1)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    args = arguments(RewardConfig, folder, max_length=64)
    return RewardTrainer(
        scorer, args=args, train_dataset=preferences(), processing_class=words, peft_config=config, callbacks=callbacks
    )


def length(completions, **kwargs):
    return [float(len(completion) % 7) for completion in completions]


def grpo(folder, model, words, callbacks, config):
    from trl import GRPOConfig, GRPOTrainer

    args = arguments(GRPOConfig, folder, num_generations=2, max_completion_length=6, beta=0.1)
    return GRPOTrainer(
        model, length, args=args, train_dataset=prompts(), processing_class=words, peft_config=config,
        callbacks=callbacks,
    )  # fmt: skip


def rloo(folder, model, words, callbacks, config):
    from trl import RLOOConfig, RLOOTrainer

    args = arguments(RLOOConfig, folder, num_generations=2, max_completion_length=6, beta=0.1)
    return RLOOTrainer(
        model, length, args=args, train_dataset=prompts(), processing_class=words, peft_config=config,
        callbacks=callbacks,
    )  # fmt: skip


CASES = [(sft, method) for method in CONFIGS] + [(trainer, "lora") for trainer in (dpo, kto, reward, grpo, rloo)]


@pytest.mark.parametrize(("trainer", "method"), CASES, ids=[f"{t.__name__}-{m}" for t, m in CASES])
def test_same_as_stock_peft(trainer, method, tmp_path, caplog):
    caplog.set_level(logging.INFO, "spectral_ops")

    def build(*args):
        return trainer(*args, CONFIGS[method]())

    the_same_with_the_callback(build, tmp_path, lambda: caplog.text)


@pytest.mark.parametrize("way", ["auto", "callback"])
def test_the_reference_adapter_that_trl_adds_is_served(way, tmp_path):
    """From a model that is adapted already DPO makes a second adapter, "ref", to measure against."""

    def build(folder, model, words, callbacks):
        return dpo(folder, get_peft_model(model, CONFIGS["lora"]()), words, callbacks, None)

    losses, adapter, _ = run(build, tmp_path / "plain")
    with auto(way == "auto", strict=True):
        callbacks = [SpectralOpsCallback(strict=True)] if way == "callback" else []
        fused_losses, fused_adapter, model = run(build, tmp_path / "fused", *callbacks)
    assert fused_losses == pytest.approx(losses, rel=1e-5) and "ref" in model.peft_config
    for name, tensor in adapter.items():
        torch.testing.assert_close(fused_adapter[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    now = report(model)
    assert now.counts["fused"] == ADAPTED and min(row.calls for row in now.rows) >= 2 * STEPS  # both adapters'
