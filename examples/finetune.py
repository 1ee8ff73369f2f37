"""Fine-tune a real model with Hugging Face `Trainer` + `peft`, then again through spectral_ops' fused operators.

`make demo` runs it. The same adapter, from the same initial weights and the same seed, is trained twice: with PEFT as
it is, and after `spectral_ops.accelerate(model)`. Then both are timed against each other and against the frozen model,
and the adapter that spectral_ops trained is loaded into plain PEFT. RoSA, which PEFT lacks, is compared with the same
mathematics in plain PyTorch, and its adapter is loaded onto a fresh model. `--method experts` adapts the experts of a
small mixture that is built here, with random weights.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device: Trainer would split the batch over several

from demo import contenders, data, measure, report, training  # noqa: I001  (first: it switches the hub off)

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
READERS = {"peft": "plain PEFT", "plain": "a fresh model"}  # who reads the saved adapter


def parse(argv=None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=contenders.METHODS, default="dora")
    parser.add_argument("--steps", type=int, default=100 if gpu else 16, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=9 if gpu else 5, help="timed blocks of each variant")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1)
    parser.add_argument("--length", type=int, default=1024 if gpu else 512, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="bf16" if gpu else "float32")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    parser.add_argument("--probe", choices=measure.VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 1 or options.rounds < 1 or options.batch < 1 or options.length < 2:
        parser.error("--steps, --rounds and --batch must be at least 1, --length at least 2")
    options.device = torch.device("cuda" if gpu else "cpu")
    options.torch_dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    return options


def load_base(options):
    return data.load_base(options.device, options.torch_dtype, options.method)


def probe(options) -> dict:
    """What one variant holds in memory, in this process; the parent asks for it with --probe."""
    model = load_base(options)
    if options.probe != "frozen":
        model = contenders.alone(options, model, options.probe)
    model.train()
    ids = torch.randint(model.config.vocab_size, (options.batch, options.length), device=options.device)
    return measure.probe(model, ids)


def train_twice(pair, names, blocks, options, console) -> dict[str, list[float]]:
    """Losses of the two runs `names` of `pair`, spectral_ops' last, whose weights it then has."""
    losses = {}
    for name in names:
        model, after_optimizer = pair.start(name)
        with report.progress(console, f"train, {report.LABELS[name]}", options.steps) as advance:
            losses[name] = training.train(
                model,
                blocks,
                steps=options.steps,
                batch=options.batch,
                lr=options.lr,
                seed=options.seed,
                on_step=lambda loss, s, advance=advance: advance(f"loss {loss:.3f}  {s:.2f} s/step"),
                after_optimizer=after_optimizer,
            )
    return losses


def time_variants(pair, names, frozen, ids, options, console) -> tuple[dict[str, float], int]:
    """Seconds per step of the frozen model and of the runs `names` of `pair`, interleaved."""
    steps = {"frozen": measure.stepper(frozen.train(), ids)}
    for name in names:
        model = pair.enter(name).train()
        weights = [p for p in model.parameters() if p.requires_grad]
        steps[name] = measure.stepper(model, ids, torch.optim.AdamW(weights, lr=1e-5))
    with report.progress(console, "time, interleaved", 3 * options.rounds) as advance:
        return measure.interleave(
            steps,
            rounds=options.rounds,
            enter=lambda name: pair.enter(name) if name in names else None,
            on_block=lambda name, s: advance(f"{report.LABELS[name]} {s:.2f} s/step"),
        )


@torch.no_grad()
def compare_logits(pair, path: Path, ids, options) -> dict[str, float]:
    """Logits of the trained model beside those of the adapter saved at `path`, loaded onto a fresh base model."""
    base = load_base(options).eval()
    untuned = base(ids).logits.float()
    theirs = pair.reload(base, path).eval()(ids).logits.float()
    ours = pair.model.eval()(ids).logits.float()
    return {
        "difference": (ours - theirs).abs().max().item(),
        "largest": theirs.abs().max().item(),
        "argmax_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "moved_by_training": (theirs - untuned).abs().max().item(),
    }


def run(options, console: Console) -> dict:
    began = time.monotonic()
    console.print(
        f"[bold]1/5[/] {data.model_name(options.method)}, {options.method}, {options.dtype} on {options.device.type}"
    )
    if options.method != "experts" and not data.CACHE.exists():
        console.print("    unpacking the GGUF to float32: about 20 s, once")
    blocks = data.token_blocks(data.load_tokenizer(options.method), data.corpus(), options.length)
    train_blocks, held_out = blocks[:-1], blocks[-1:].to(options.device)
    pair = contenders.contenders(options, lambda: load_base(options))
    names = (contenders.peer_of(options.method), contenders.OURS)
    adapted = sum(p.numel() for p in training.trainable(pair.model).values())
    console.print(f"    {adapted / 1e6:.1f} M trainable weights; {blocks.numel():,} tokens of Python's documentation")
    initial = None
    if options.method == "pissa":
        initial = options.output / "demo-pissa-initial"
        pair.model.save_pretrained(initial)

    console.print(f"[bold]2/5[/] two runs of {options.steps} steps, {options.batch}×{options.length} tokens each")
    losses = train_twice(pair, names, train_blocks, options, console)
    console.print(str(pair), markup=False, highlight=False, soft_wrap=True)

    console.print(f"[bold]3/5[/] the saved adapter in {READERS[names[0]]}")
    adapter = options.output / f"demo-{options.method}-adapter"
    pair.save(adapter, initial)
    logits = compare_logits(pair, adapter, held_out, options)

    console.print("[bold]4/5[/] seconds per step, the three variants taking turns")
    ids = train_blocks[: options.batch].to(options.device)
    seconds, block = time_variants(pair, names, load_base(options), ids, options, console)
    del pair
    console.print("[bold]5/5[/] memory, each variant in a process of its own")
    probes = {}
    variants = ("frozen", *names)
    with report.progress(console, "memory", len(variants)) as advance:
        for name in variants:
            same = [f"--{key}={getattr(options, key)}" for key in ("method", "batch", "length", "dtype", "seed")]
            probes[name] = measure.probe_in_subprocess(str(Path(__file__)), [f"--probe={name}", *same])
            advance(f"{report.LABELS[name]}: peak {report.mib(probes[name]['peak'])}")

    gpu = options.device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return {
        "title": ", ".join(
            (
                data.model_name(options.method),
                options.method,
                options.dtype,
                f"{options.batch}×{options.length} tokens",
                where,
            )
        ),
        "losses": losses,
        "loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "seconds": seconds,
        "steps_per_block": block,
        "rounds": options.rounds,
        "saved": {name: probes[name]["saved"] for name in probes},
        "peak": {name: probes[name]["peak"] for name in probes},
        "logits": logits,
        "adapter": str(adapter),
        "total_seconds": time.monotonic() - began,
    }


def show(result: dict, options, console: Console) -> bool:
    """Print the table and the verdict, write the JSON and the picture; False when the numbers disagree."""
    stem = options.output / f"demo-{options.method}"
    console.print()
    console.print(report.table(result))
    memory = "CUDA's allocator" if options.device.type == "cuda" else "resident set, weights and libraries included"
    console.print(
        f"time: medians of {result['rounds']} rounds; each times {result['steps_per_block']} step(s) of every variant, "
        "in rotating order after a warm-up.\n"
        "      frozen: forward, and backward to the input embeddings; the others also step AdamW.\n"
        "saved: distinct storages that autograd holds after the forward pass, parameters excluded.\n"
        f"peak: during one step, in a process of its own ({memory}).",
        style="dim",
        highlight=False,
    )
    logits = result["logits"]
    exact = options.dtype == "float32"
    agrees = (
        logits["difference"] <= (1e-3 if exact else 5e-2) * logits["largest"]
        and logits["argmax_agreement"] >= (0.99 if exact else 0.9)
        and result["loss_difference"] <= (1e-2 if exact else 1e-1)
    )
    reader = READERS[report.peer_in(result)]
    console.print(
        f"{reader} with the saved adapter {'agrees' if agrees else 'DISAGREES'}: argmax equal on "
        f"{logits['argmax_agreement']:.1%} of the tokens, logits within {logits['difference']:.2g}\n"
        f"      (largest {logits['largest']:.3g}; training moved them by up to {logits['moved_by_training']:.2g})",
        style="green" if agrees else "bold red",
        highlight=False,
    )
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report.picture(result, stem.with_suffix(".png"))
    console.print(f"adapter {os.path.relpath(result['adapter'])}, picture {os.path.relpath(stem)}.png", highlight=False)
    console.print(f"done in {result['total_seconds']:.0f} s")
    return agrees


def main(argv=None) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = parse(argv)
    if options.probe:
        print(json.dumps(probe(options)))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 110)
    return 0 if show(run(options, console), options, console) else 1


if __name__ == "__main__":
    sys.exit(main())
