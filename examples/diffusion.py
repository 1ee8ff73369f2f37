"""Train a small diffusion UNet's adapter with PEFT as it is, then accelerated: time, memory, losses, one picture.

`make demo METHOD=diffusion` runs it. The UNet is diffusers' UNet2DConditionModel with random weights, the images are
disks and squares drawn here, told what they show by one vector per kind. LoRA or DoRA goes on attention and
convolutions, from the same weights, seed and data in both runs; then PEFT as it is reads the accelerated run's file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import torch
import torch.nn.functional as F
from demo import measure, report, training
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console

import spectral_ops

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("frozen", "peft", "spectral_ops")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "conv"]
WIDTH, KINDS, TIMES = 64, 6, 1000  # of a description; of images; steps of the noise


def parse(argv=None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=("dora", "lora"), default="dora")
    parser.add_argument("--steps", type=int, default=200 if gpu else 20, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=9 if gpu else 5, help="timed blocks of each variant")
    parser.add_argument("--batch", type=int, default=16 if gpu else 2)
    parser.add_argument("--size", type=int, default=64 if gpu else 32, help="of an image, in pixels")
    parser.add_argument("--channels", type=int, default=192 if gpu else 96, help="of the UNet's first block")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    parser.add_argument("--probe", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.steps, options.rounds, options.batch) < 1 or options.size % 8 or options.channels % 32:
        parser.error("--steps, --rounds, --batch: at least 1; --size a multiple of 8, --channels of 32")
    options.device = torch.device("cuda" if gpu else "cpu")
    return options


def unet(options):
    """A frozen UNet of two resolutions, with attention at the lower one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=options.size, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=16,
        block_out_channels=(options.channels, 2 * options.channels), cross_attention_dim=WIDTH, attention_head_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model.to(options.device).requires_grad_(False)


def adapted(options) -> PeftModel:
    base = unet(options)
    torch.manual_seed(options.seed)
    # the last convolution is trained whole, since everything else of this UNet starts at random
    settings = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "modules_to_save": ["conv_out"]}
    return get_peft_model(base, LoraConfig(use_dora=options.adapter == "dora", **settings))


def images(options, step: int) -> dict[str, torch.Tensor]:
    """A batch: noised images, their times, their descriptions and the noise. Three colours of disks and of squares."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    n, size = options.batch, options.size
    kind = torch.randint(KINDS, (n,), generator=generator)
    centre = size * (0.3 + 0.4 * torch.rand(n, 2, 1, 1, generator=generator))
    across = (torch.arange(size).view(1, size, 1) - centre[:, 0]).abs()
    down = (torch.arange(size).view(1, 1, size) - centre[:, 1]).abs()
    disk = (kind < 3).view(n, 1, 1)
    inside = torch.where(disk, across**2 + down**2 < (size / 4) ** 2, torch.maximum(across, down) < size / 5)
    clean = torch.where(F.one_hot(kind % 3, 3).view(n, 3, 1, 1).bool(), inside.unsqueeze(1).float(), 0.0) * 2 - 1
    times = torch.randint(TIMES, (n,), generator=generator)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES), 0)[times].view(n, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    told = torch.randn(KINDS, 1, WIDTH, generator=torch.Generator().manual_seed(0))[kind]
    batch = {"sample": kept.sqrt() * clean + (1 - kept).sqrt() * noise, "timestep": times,
             "encoder_hidden_states": told, "noise": noise}  # fmt: skip
    return {name: t.to(options.device) for name, t in batch.items()}


def loss_of(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the noise that the UNet sees. Its input is a leaf, so that all variants compute one dX."""
    inputs = {name: t for name, t in batch.items() if name != "noise"}
    inputs["sample"] = inputs["sample"].detach().requires_grad_()
    return F.mse_loss(model(**inputs).sample, batch["noise"])


def stepper(model, batch, optimizer=None):
    def step() -> None:
        loss_of(model, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if batch["sample"].is_cuda:
            torch.cuda.synchronize()

    return step


def optimizer_of(model, lr: float):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model, options, advance) -> list[float]:
    optimizer, losses = optimizer_of(model.train(), options.lr), []
    for step in range(options.steps):
        began = time.perf_counter()
        loss = loss_of(model, images(options, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        advance(f"loss {losses[-1]:.3f}  {time.perf_counter() - began:.2f} s/step")
    return losses


def probe(options) -> dict[str, int]:
    """What one variant holds in memory, in this process."""
    model = unet(options) if options.probe == "frozen" else adapted(options)
    if options.probe == "spectral_ops":
        spectral_ops.accelerate(model)
    batch = images(options, 0)
    optimizer = None if options.probe == "frozen" else optimizer_of(model, 1e-5)
    with measure.saved_for_backward(model.train()) as total:
        loss = loss_of(model, batch)
        saved = total()
    del loss
    step = stepper(model, batch, optimizer)
    step()
    with measure.peak_memory(options.device) as peak:
        step()
        return {"saved": saved, "peak": peak()}


def enter(model, name: str):
    if name == "spectral_ops":
        return spectral_ops.accelerate(model)
    return spectral_ops.restore(model)


def run(options, console: Console) -> dict:
    model = adapted(options)
    initial, losses = training.snapshot(model), {}
    title = f"a small UNet, {options.adapter}, float32, {options.batch} images of {options.size}×{options.size}"
    console.print(f"[bold]1/4[/] {title}: two runs of {options.steps} steps")
    for name in VARIANTS[1:]:
        training.rewind(model, initial)
        found = enter(model, name)
        with report.progress(console, f"train, {report.LABELS[name]}", options.steps) as advance:
            losses[name] = train(model, options, advance)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)

    console.print("[bold]2/4[/] the saved adapter in plain PEFT")
    batch = images(options, -1)
    inputs = {name: t for name, t in batch.items() if name != "noise"}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        theirs = PeftModel.from_pretrained(unet(options), folder).eval()(**inputs).sample
        ours = model.eval()(**inputs).sample
    difference = ((ours - theirs).norm() / theirs.norm()).item()

    console.print("[bold]3/4[/] seconds per step, the three variants taking turns")
    steps = {"frozen": stepper(unet(options).train(), batch)}
    model.train()
    steps |= {name: stepper(model, batch, optimizer_of(model, 1e-5)) for name in VARIANTS[1:]}
    with report.progress(console, "time, interleaved", 3 * options.rounds) as advance:
        seconds, block = measure.interleave(
            steps,
            rounds=options.rounds,
            enter=lambda name: enter(model, name) if name != "frozen" else None,
            on_block=lambda name, s: advance(f"{report.LABELS[name]} {s:.2f} s/step"),
        )
    console.print("[bold]4/4[/] memory, each variant in a process of its own")
    same = [f"--{key}={getattr(options, key)}" for key in ("adapter", "batch", "size", "channels", "seed")]
    probes = {name: measure.probe_in_subprocess(__file__, [f"--probe={name}", *same]) for name in VARIANTS}
    gpu = options.device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return {
        "title": f"{title}, {where}", "losses": losses, "seconds": seconds, "steps_per_block": block,
        "loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)), "rounds": options.rounds,
        "saved": {name: probes[name]["saved"] for name in VARIANTS}, "output_difference": difference,
        "peak": {name: probes[name]["peak"] for name in VARIANTS}, "left_to_peft": found.counts["PEFT"],
    }  # fmt: skip


def main(argv=None) -> int:
    options = parse(argv)
    try:
        import diffusers  # noqa: F401
    except ImportError:
        print("diffusers: not installed, wanted `pip install -r requirements/demo.txt`", file=sys.stderr)
        return 2
    if options.probe:
        print(json.dumps(probe(options)))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110)
    result = run(options, console)
    console.print(report.table(result))
    agrees = result["output_difference"] <= 1e-3 and result["loss_difference"] <= 1e-2
    console.print(
        f"plain PEFT with the saved adapter {'agrees' if agrees else 'DISAGREES'}: outputs within"
        f" {result['output_difference']:.1e} of their norm",
        style="green" if agrees else "bold red",
    )
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "demo-diffusion"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report.picture(result, stem.with_suffix(".png"))
    console.print(f"picture {os.path.relpath(stem)}.png", highlight=False)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
