"""LoRA on the experts of a mixture: PEFT's `target_parameters`, accelerated; then the same natively, for a server.

    python examples/experts.py [MODEL]

MODEL is a mixture on the hub or in a folder (Qwen3-30B-A3B, gpt-oss, Mixtral, ...); without one a small Qwen3-MoE with
random weights is built here.
"""

import sys
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import spectral_ops

SMALL = {"vocab_size": 256, "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base(name: str | None):
    torch.manual_seed(0)
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL))


def train(model, steps: int = 5) -> list[float]:
    torch.manual_seed(1)
    ids = torch.randint(200, (2, 64), device=model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(name: str | None = None) -> None:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": [], "target_parameters": STACKS}
    model = peft.get_peft_model(base(name), peft.LoraConfig(**settings))
    print(spectral_ops.accelerate(model))
    print("PEFT, accelerated:", [f"{loss:.4f}" for loss in train(model)])

    model = spectral_ops.attach(base(name), spectral_ops.LoRAConfig(**settings))
    print("native:           ", [f"{loss:.4f}" for loss in train(model)])
    with tempfile.TemporaryDirectory() as folder:
        spectral_ops.save_adapter(model, f"{folder}/peft")  # PEFT reads this one
        spectral_ops.export_adapter(model, f"{folder}/vllm", layout="vllm")


if __name__ == "__main__":
    main(*sys.argv[1:])
