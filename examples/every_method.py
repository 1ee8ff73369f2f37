"""Train every method on a real model and real text for the same number of steps: one table, one picture.

`make methods` runs it: SmolLM2-135M-Instruct, Python's own documentation, the same batches in the same order, AdamW
with the learning rate named in the table. Per method: trained parameters, bytes held by what the method adds to the
model (trained or frozen), the loss of every step and on held-out text
before and after, seconds to initialise and per step (taking turns with the frozen model), bytes saved for backward
beyond the frozen model's, and how far merged and unmerged logits are apart.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from demo import data, measure, report
from rich.console import Console
from rich.table import Table

import spectral_ops
from spectral_ops.bench import methods
from spectral_ops.bench.results import commit

ROOT = Path(__file__).resolve().parents[1]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 5e-4
RATES = {  # where a method's few or unscaled parameters ask for another
    "pica": 2e-3,
    "mini": 2e-4,
    "vera": 5e-3,
    "dvora": 5e-3,
    "spectral": 5e-5,
    "spectral_rotation": 3e-4,
    "adalora": 5e-3,
    "adalora_dash": 5e-3,
    "bat": 2e-4,
    "bat_row": 2e-4,
}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of the frozen model and the method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep what outputs/methods.json has of the other methods")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    options = parser.parse_args(argv)
    if min(options.steps, options.batch, options.rounds) < 1 or options.length < 2:
        parser.error("--steps, --batch and --rounds must be at least 1, --length at least 2")
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return options


def schedule(model, optimizer, config) -> None:
    """What a method needs to be told of the optimizer; both end with the optimizer."""
    if isinstance(config, spectral_ops.RoSAConfig):
        spectral_ops.RoSASchedule(model, optimizer)
    elif type(config).__name__.startswith("AdaLoRA"):
        spectral_ops.AdaLoRASchedule(model, optimizer)


def config_of(name: str, steps: int) -> spectral_ops.AdapterConfig:
    """The usual configuration, its schedule fitted to a short run."""
    method = methods.METHODS[name]
    fields = {"target_modules": PROJECTIONS}
    if method.config == "RoSAConfig":
        fields["schedule"] = f"wl{max(steps // 6, 1)}"
    if "Dash" in method.config:
        fields["launch_step"] = max(steps // 3, 1)
    if "AdaLoRA" in method.config:
        fields |= {"total_step": steps, "tinit": max(steps // 6, 1), "tfinal": max(steps // 4, 1), "deltaT": 1}
    return method.build(**fields)


def held_bytes(model) -> int:
    """Bytes of a model's parameters and buffers, those of one storage counted once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@torch.no_grad()
def held_out_loss(model, blocks: torch.Tensor) -> float:
    model.eval()
    losses = [model(row[None], labels=row[None], use_cache=False).loss.item() for row in blocks]
    model.train()
    return statistics.fmean(losses)


@torch.no_grad()
def merged_difference(model, ids: torch.Tensor) -> float:
    """Largest difference between the logits before and after a merge, relative to the largest logit; then unmerged."""
    model.eval()
    before = model(ids).logits
    spectral_ops.merge(model, keep_base=True)
    after = model(ids).logits
    spectral_ops.unmerge(model)
    restored = model(ids).logits
    model.train()
    if not torch.equal(restored, before):
        raise RuntimeError("unmerge(keep_base) did not give the model back")
    return ((after - before).abs().max() / before.abs().max()).item()


def prove(name: str, base, options, train_blocks, test_blocks, advance) -> dict:
    """Everything the table says of one method; leaves ``base`` as it was."""
    frozen_saved = measure.saved_bytes(base.train(), train_blocks[: options.batch])
    frozen_held = held_bytes(base)
    torch.manual_seed(options.seed)
    config = config_of(name, options.steps)
    began = time.perf_counter()
    model = spectral_ops.attach(base, config, progress=False)
    init_seconds = time.perf_counter() - began
    trained = [p for p in model.parameters() if p.requires_grad]
    held = held_bytes(model) - frozen_held
    rate = RATES.get(name, RATE)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule(model, optimizer, config)
    first = held_out_loss(model, test_blocks)
    model.train()
    losses = []
    for step in range(options.steps):
        rows = [(step * options.batch + i) % len(train_blocks) for i in range(options.batch)]
        ids = train_blocks[rows]
        loss = objective = model(ids, labels=ids, use_cache=False).loss
        if type(config).__name__.startswith("AdaLoRA"):
            objective = loss + config.orth_reg_weight * spectral_ops.orthogonality_loss(model)
        objective.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        advance(f"{name} loss {losses[-1]:.3f}")
    result = {
        "method": name,
        "trained": sum(p.numel() for p in trained),
        "held": held,
        "rate": rate,
        "init_seconds": init_seconds,
        "losses": losses,
        "held_out": [first, held_out_loss(model, test_blocks)],
        "merged_difference": merged_difference(model, test_blocks[:1]),
    }
    ids = train_blocks[: options.batch]

    def frozen():
        with spectral_ops.disabled(model):
            measure.forward(model, ids).backward()

    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    steps = {"frozen": frozen, name: measure.stepper(model, ids, optimizer)}
    seconds, _ = measure.interleave(steps, rounds=options.rounds, min_block_s=0.1)
    saved = measure.saved_bytes(model, ids) - frozen_saved
    spectral_ops.detach(model)
    return result | {"seconds": seconds[name], "frozen_seconds": seconds["frozen"], "saved": saved}


def table(results: list[dict], title: str) -> Table:
    out = Table(title=title, title_justify="left")
    heads = "method, trained, held, lr, init s, first → last loss, held out, s/step, tax, saved, merged differs"
    for head in heads.split(", "):
        out.add_column(head, justify="left" if head == "method" else "right")
    for r in results:
        ends = [statistics.fmean(part) for part in (r["losses"][:4], r["losses"][-4:])]
        out.add_row(
            r["method"], f"{r['trained']:,}", report.mib(r["held"]), f"{r['rate']:g}", f"{r['init_seconds']:.1f}",
            f"{ends[0]:.3f} → {ends[1]:.3f}", f"{r['held_out'][0]:.3f} → {r['held_out'][1]:.3f}", f"{r['seconds']:.3g}",
            f"{r['seconds'] / r['frozen_seconds'] - 1:+.0%}", report.mib(r["saved"]), f"{r['merged_difference']:.1e}",
        )  # fmt: skip
    return out


def picture(results: list[dict], path: Path, title: str) -> None:
    """Loss of every method against LoRA's, and held-out gain beside the tax."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), width_ratios=[1.5, 1], layout="constrained")
    colors = plt.get_cmap("tab20")
    for i, r in enumerate(results):
        window = max(len(r["losses"]) // 8, 1)
        smooth = [statistics.fmean(r["losses"][max(0, j - window + 1) : j + 1]) for j in range(len(r["losses"]))]
        dashes = "--" if i >= 10 else "-"
        left.plot(range(1, len(smooth) + 1), smooth, color=colors(i % 20), ls=dashes, label=r["method"])
    left.set(xlabel="step", ylabel="training loss (running mean)", title=title)
    left.legend(ncol=3, fontsize=8, frameon=False)
    order = sorted(results, key=lambda r: r["held_out"][1])
    gain = [r["held_out"][0] - r["held_out"][1] for r in order]
    right.barh([r["method"] for r in order], gain, color="#1f6fb2")
    for y, r in enumerate(order):
        right.text(max(gain[y], 0), y, f"  {r['seconds'] / r['frozen_seconds'] - 1:+.0%}", va="center", fontsize=8)
    right.set(xlabel="held-out loss before minus after; text: step time beyond the frozen model")
    right.invert_yaxis()
    figure.savefig(path, dpi=130)


def run(options, console: Console) -> list[dict]:
    base = data.load_base(options.device, torch.float32)
    blocks = data.token_blocks(data.load_tokenizer(), data.corpus(), options.length).to(options.device)
    train_blocks, test_blocks = blocks[:-8], blocks[-8:]
    results = []
    with report.progress(console, "train", options.steps * len(options.methods)) as advance:
        for name in options.methods:
            results.append(prove(name, base, options, train_blocks, test_blocks, advance))
    return results


def main(argv=None) -> int:
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    began = time.monotonic()
    gpu = options.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    title = f"SmolLM2-135M, {options.steps} steps of {options.batch}×{options.length} tokens, float32, {device}"
    path, kept = options.output / "methods.json", []
    if options.keep and path.exists():
        old = json.loads(path.read_text())
        if old["meta"]["title"] != title:
            raise SystemExit(f"{path}: got {old['meta']['title']!r}, wanted {title!r} to keep its methods")
        kept = old["methods"]
    results = {r["method"]: r for r in [*kept, *run(options, console)]}
    results = [results[name] for name in methods.METHODS if name in results]
    console.print(table(results, title))
    meta = {"title": title, "commit": commit(), "torch": torch.__version__, "seconds": time.monotonic() - began}
    path.write_text(json.dumps({"meta": meta, "methods": results}, indent=1) + "\n")
    picture(results, options.output / "methods.png", title)
    fell = {r["method"]: r["held_out"][1] < r["held_out"][0] and math.isfinite(r["losses"][-1]) for r in results}
    worse = [name for name, falls in fell.items() if not falls]
    console.print(f"held-out loss falls for every method: {'yes' if not worse else f'no, not for {worse}'}")
    console.print(f"done in {meta['seconds']:.0f} s; outputs/methods.json, outputs/methods.png")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
