"""What each of PEFT's slower tuners adds to a layer, as PEFT has it and accelerated, in one interleaved run.

    python -m benchmarks.bench_tuners [NAME...] [--tokens 1024] [--features 2048] [--dtype float32] [--repeats 11]
        [--json FILE]

The rows of convolutions and embeddings have sizes of their own: 320 channels of 64×64 pixels, and 32,000 rows of 1,024.

Time of forward and backward over the frozen layer's, in the same turn; the tax is what is above 1. In MiB: saved is
what stays for backward beside x and the parameters, peak what the allocator held above what it held before. The dtype
is the base's and x's; trained parameters are in float32, as PEFT makes them. A row whose gradients or output are not
PEFT's is RED and has no times; one that does not fit into memory says so. The file is written after every row.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch

from spectral_ops.bench import counting, judge, results
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.tuners import TUNERS, Implementation, layers, over
from spectral_ops.core.scratch import scratch


def step(layer: Implementation, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    for t in (x, *layer.parameters):
        t.grad = None
    y = layer.forward(x)
    if y.requires_grad:
        y.backward(dy)
    return [y.detach(), *(t.grad for t in (x, *layer.parameters) if t.requires_grad)]


def nudge(layer: Implementation) -> None:
    """As an optimizer would: nothing computed from the parameters is good any more."""
    with torch.no_grad():
        for p in layer.parameters:
            p.mul_(1.0)


def linear(name: str, T: int, n: int, options: dict):
    generator = torch.Generator(options["device"]).manual_seed(0)
    x, dy, weight = (torch.randn(rows, n, generator=generator, **options) for rows in (T, T, n))
    return layers(TUNERS[name], weight.mul_(n**-0.5)), x.requires_grad_(), dy


def convolution(kernel: int, last: bool, dora: bool, options: dict, channels: int = 320, side: int = 64):
    base = torch.nn.Conv2d(channels, channels, kernel, padding=kernel // 2, **options).requires_grad_(False)
    x, dy = (torch.randn(1, channels, side, side, **options) for _ in range(2))
    if last:
        base, x, dy = (t.to(memory_format=torch.channels_last) for t in (base, x, dy))
    return over(base, config(dora)), x.requires_grad_(), dy


def embedding(dora: bool, options: dict, rows: int = 32000, features: int = 1024, T: int = 1024):
    base = torch.nn.Embedding(rows, features, **options).requires_grad_(False)
    ids = torch.randint(rows, (1, T), device=options["device"])
    return over(base, config(dora)), ids, torch.randn(1, T, features, **options)


def config(dora: bool):
    return peft.LoraConfig(r=8, use_dora=dora, target_modules=["0"])


OTHERS: dict[str, Callable] = {
    f"{method} {what}": functools.partial(build, *options, method == "DoRA")
    for what, build, *options in (
        ("conv 1x1", convolution, 1, False),
        ("conv 1x1 channels last", convolution, 1, True),
        ("conv 3x3", convolution, 3, False),
        ("conv 3x3 channels last", convolution, 3, True),
        ("embedding", embedding),
    )
    for method in ("LoRA", "DoRA")
}


def measure(name: str, T: int, n: int, repeats: int, options: dict) -> dict:
    found, x, dy = OTHERS[name](options) if name in OTHERS else linear(name, T, n, options)
    expected = step(found["PEFT"], x, dy)
    error = judge.largest_error(step(found["accelerated"], x, dy), expected)
    row = {"name": name, "error": error}
    if judge.wrong(error, judge.LAYER[options["dtype"]]):
        return row
    for kind, layer in found.items():
        held = [*layer.parameters, *layer.forward.parameters(), *layer.forward.buffers()]
        row[f"{kind} saved"] = counting.saved_bytes(layer.forward, x, held)
        row[f"{kind} peak"] = counting.peak_bytes(lambda layer=layer: step(layer, x, dy), x.device)
    row["scratch"] = scratch.nbytes
    calls = {kind: (lambda layer=layer: step(layer, x, dy)) for kind, layer in found.items()}
    times = interleave(calls, lambda kind: nudge(found[kind]), repeats, x.device)
    for kind in found:
        row[f"{kind} seconds"] = statistics.median(times[kind])
        row[f"{kind} ratio"] = statistics.median(a / b for a, b in zip(times[kind], times["frozen"], strict=True))
    return row


HEAD = "| tuner | PEFT | accelerated | of PEFT's tax | saved, PEFT | accelerated | peak, PEFT | accelerated |"


def line(row: dict) -> str:
    if "PEFT ratio" not in row:
        failed = row.get("failed") or f"RED: an error of {row['error']:.1e}"
        return f"| {row['name']} | {failed} |"
    theirs, ours = row["PEFT ratio"], row["accelerated ratio"]
    mib = [f"{row[f'{kind} {what}'] / 2**20:.1f}" for what in ("saved", "peak") for kind in ("PEFT", "accelerated")]
    share = (ours - 1) / (theirs - 1) if theirs > 1 else float("nan")
    return "| " + " | ".join([row["name"], f"{theirs:.2f}", f"{ours:.2f}", f"{share:.2f}", *mib]) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*TUNERS, *OTHERS))}; all without")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=2048, help="in and out")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in judge.LAYER], default="float32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if unknown := set(options.names) - TUNERS.keys() - OTHERS.keys():
        parser.error(f"NAME: got {', '.join(sorted(unknown))}, wanted some of {', '.join((*TUNERS, *OTHERS))}")
    print(HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |", sep="\n", flush=True)
    rows: list[dict] = []
    tensors = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    for name in options.names or (*TUNERS, *OTHERS):
        if name in TUNERS and not TUNERS[name].there():
            continue
        try:
            rows.append(measure(name, options.tokens, options.features, options.repeats, tensors))
        except torch.OutOfMemoryError:
            rows.append({"name": name, "failed": "out of memory"})
        print(line(rows[-1]), flush=True)
        if options.json:
            sizes = {key: getattr(options, key) for key in ("tokens", "features", "dtype")}
            about = {"commit": results.commit(), "device": options.device, "threads": torch.get_num_threads()}
            options.json.write_text(json.dumps({**about, **sizes, "rows": rows}, indent=1) + "\n")
    return 1 if any("PEFT ratio" not in row and "failed" not in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
