"""Hugging Face `Trainer` + `peft`, as people use them; nothing in this file knows spectral_ops."""

import tempfile
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
METHODS = ("dora", "lora", "rslora", "pissa", "miss", "bat", "experts")


def peft_config(method: str, *, plain_init: bool = False):
    """The adapter of `method` on all seven projections, or on the stacked weights of experts.

    `plain_init` skips PiSSA's decomposition of the weights.
    """
    common = {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    if method == "miss":
        return MissConfig(r=64, **common)
    if method == "bat":  # its blocks are square, and 64 divides every layer's sizes
        return MissConfig(r=64, init_weights="bat", **common)
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **common}
    if method == "dora":
        return LoraConfig(use_dora=True, **lora)
    if method == "rslora":
        return LoraConfig(use_rslora=True, **{**lora, "lora_alpha": 8})  # 8/√16: LoRA's scale of 2
    if method == "pissa":
        return LoraConfig(init_lora_weights=plain_init or "pissa_niter_4", **{**lora, "lora_alpha": 16})
    if method == "experts":  # with the head, which starts at random as everything else of that model does
        return LoraConfig(**lora | {"target_modules": [], "target_parameters": EXPERTS, "modules_to_save": ["lm_head"]})
    if method == "lora":
        return LoraConfig(**lora)
    raise ValueError(f"method: got {method!r}, wanted one of {', '.join(METHODS)}")


def add_adapter(base, method: str, seed: int, *, plain_init: bool = False) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base, peft_config(method, plain_init=plain_init))


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights, so that two runs start from the same point."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


@torch.no_grad()
def rewind(model, weights: dict[str, torch.Tensor]) -> None:
    for name, p in trainable(model).items():
        p.copy_(weights[name])
        p.grad = None


class ObservedTrainer(Trainer):
    """A Trainer that hands each step's loss, unrounded, and its seconds to `on_step`."""

    def __init__(self, *args, on_step: Callable[[float, float], None], **kwargs):
        super().__init__(*args, **kwargs)
        self.on_step = on_step
        self.losses: list[float] = []
        self.last = time.perf_counter()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        now = time.perf_counter()
        self.on_step(self.losses[-1], now - self.last)
        self.last = now
        return loss


class AfterOptimizer(TrainerCallback):
    """Calls `call` once the optimizer has taken a step."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_optimizer_step(self, *args, **kwargs):
        self.call()


def train(
    model, blocks: torch.Tensor, *, steps: int, batch: int, lr: float, seed: int, on_step, after_optimizer=None
) -> list[float]:
    """Fine-tune the adapter of `model` on `blocks` [n, length]; returns the loss of every step."""
    rows = [{"input_ids": row, "labels": row} for row in blocks]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            seed=seed,
            data_seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = ObservedTrainer(model=model, args=arguments, train_dataset=rows, on_step=on_step)
        trainer.remove_callback(PrinterCallback)
        if after_optimizer is not None:
            trainer.add_callback(AfterOptimizer(after_optimizer))
        trainer.train()
    return trainer.losses
