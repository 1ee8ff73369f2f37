"""Every operator and every method's layer on this machine: time, tax, rates, share of the roofline floor, and memory.

A layer's tax is the median over turns of (its forward and backward / the frozen layer's in the same turn) - 1, beside
its peers in one run. The floor comes from ceilings measured in the same run: the library's product rate and a copy. No
time is printed for a result that fails its numerical check. Ctrl-C keeps what is measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from spectral_ops._table import table
from spectral_ops.bench import compare, growth, layers, models, operators, pictures, results, training
from spectral_ops.bench.clock import measure_ceilings
from spectral_ops.bench.methods import BLOCKS, DTYPES, sizes
from spectral_ops.bench.peers import METHODS, USUAL, missing
from spectral_ops.bench.tables import report
from spectral_ops.cli import cost

Job = tuple[str, Callable[[], None]]  # what it measures, and what adds that to the results

DEFAULTS = {"tokens": [1024], "shape": [2048, 2048], "repeats": 20}
QUICK = {"tokens": [128], "shape": [256, 256], "repeats": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=[*operators.NAMES, "all", "none"], metavar="NAME",
                        help="operators of the grid, all or none (default: all, or none beside --methods)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all", "none"],
                        help=f"methods, all or none (default: {' '.join(USUAL)}, or none beside --ops)")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=[*BLOCKS, "custom"], default=["custom"],
                        help="every projection of these models' blocks, or --shape (the default); operators take the"
                        " first")  # fmt: skip
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), help="default: 2048 2048")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024")
    parser.add_argument("--rank", type=int, help="default: each method's usual one, 16 for operators")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--adapter-dtype", nargs="+", choices=("float32", "same"), default=["float32"],
                        help="of the parameters; same: the layer's (default: float32, as PEFT makes them)")  # fmt: skip
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time the peers as well")
    parser.add_argument("--compiled", action="store_true",
                        help="also PEFT (with --training every model) under torch.compile, which takes longer to"
                        " compile than to measure")  # fmt: skip
    parser.add_argument("--overhead", action="store_true", help="also the host's time per layer, at T=1 and 128")
    parser.add_argument("--growth", action="store_true",
                        help="also each operator's time over tokens, features, rank and density")  # fmt: skip
    parser.add_argument("--repeats", type=int, help="turns; default: 20")
    parser.add_argument("--quick", action="store_true",
                        help=f"whether it works, not how fast: T={QUICK['tokens'][0]}, a layer of"
                        f" {QUICK['shape'][0]}x{QUICK['shape'][1]}, {QUICK['repeats']} turns")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--predict", action="store_true",
                        help="measure nothing: print what Llama-3-8B and 70B would cost on GPUs, on paper")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="start nothing that might not end within so many, going by what was measured")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="keep the results in FILE, written anew after each measurement")
    group = parser.add_argument_group("whole training steps, of a model with random weights")
    group.add_argument("--training", action="store_true",
                       help="in place of single layers: forward, backward and AdamW beside PEFT's")  # fmt: skip
    group.add_argument("--model", choices=models.MODELS, default="smollm2", help="whose dimensions (default: smollm2)")
    group.add_argument("--blocks", type=int, help="default: as many as the model has")
    group.add_argument("--batch", type=int, default=1)
    group.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    group.add_argument("--checkpointing", action="store_true", help="also with every block recomputed in the backward")
    parser.add_argument("--png", type=Path, metavar="DIR", help="draw the results into DIR")
    group = parser.add_argument_group("results that are there, instead of measuring")
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="what is faster or slower in the results file B than in A; exit status 1 on a regression",
    )
    group.add_argument("--draw", metavar="FILE", help="with --png: draw a results file")


def settle(arguments: argparse.Namespace) -> None:
    """Put the defaults in that depend on other arguments."""
    for name, value in (QUICK if arguments.quick else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    alone = (arguments.ops is None) != (arguments.methods is None)
    usual = {"ops": ["none"] if alone else operators.NAMES, "methods": ["none"] if alone else list(USUAL)}
    for name, known in (("ops", operators.NAMES), ("methods", list(METHODS))):
        chosen = getattr(arguments, name) or usual[name]
        setattr(arguments, name, [] if "none" in chosen else known if "all" in chosen else chosen)


def check_training(arguments: argparse.Namespace) -> None:
    """End the process where sizes or methods cannot be measured."""
    for name, least in (("blocks", 1), ("batch", 1), ("length", 2), ("repeats", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise SystemExit(f"bench --{name}: got {value}, wanted at least {least}")
    if unknown := set(arguments.methods) - set(models.METHODS):
        raise SystemExit(
            f"bench --methods: got {', '.join(sorted(unknown))}, wanted some of {', '.join(models.METHODS)}"
        )


def training_plan(arguments: argparse.Namespace, found: results.Results) -> Iterator[Job]:
    """What to measure, each with its label; every job adds to ``found``."""
    check_training(arguments)
    base_model = functools.lru_cache(maxsize=1)(models.base_model)
    shape = (arguments.batch, arguments.length)
    modes = ([False, True] if asked else [False] for asked in (arguments.compiled, arguments.checkpointing))
    for dtype, compiled, checkpointing, method in product(arguments.dtype, *modes, arguments.methods):

        def job(dtype=dtype, method=method, compiled=compiled, checkpointing=checkpointing) -> None:
            base = base_model(arguments.model, arguments.blocks, DTYPES[dtype], arguments.device)
            ids = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            found.training += training.measure(
                method, arguments.model, base, ids.to(arguments.device), arguments.rank or METHODS[method],
                compiled=compiled, checkpointing=checkpointing, repeats=arguments.repeats,
            )  # fmt: skip
            gc.collect()  # PEFT's models are cycles, and hold memory on the device

        how = training.mode(compiled, checkpointing)
        yield f"{arguments.model} with {method}, {dtype}, {shape[0]}x{shape[1]} tokens, {how}", job


def plan(arguments: argparse.Namespace, found: results.Results, note: Callable[[str], None]) -> Iterator[Job]:
    """Everything to measure, the first token count whole before the next; every job adds to ``found``."""
    options = {"repeats": arguments.repeats, "peers": arguments.peers, "note": note}
    chosen = sizes(arguments.shapes, tuple(arguments.shape))
    adapter_dtypes = [
        (dtype, adapters)
        for dtype in arguments.dtype
        for adapters in dict.fromkeys(dtype if a == "same" else a for a in arguments.adapter_dtype)
    ]
    for T in arguments.tokens:
        for method, (dtype, adapters), (d, k) in product(arguments.methods, adapter_dtypes, chosen):

            def layer(method=method, dtype=dtype, adapters=adapters, T=T, d=d, k=k) -> None:
                size = (T, d, k, arguments.rank or METHODS[method], DTYPES[dtype], arguments.device)
                also = {"adapter_dtype": DTYPES[adapters], "compiled": arguments.compiled}
                found.layers += layers.measure(method, *size, found.ceilings[dtype], **also, **options)

            yield f"{method} {dtype}, adapters {adapters}, T={T} {d}x{k}", layer
        for name, dtype in product(arguments.ops, arguments.dtype):

            def operator(name=name, dtype=dtype, T=T) -> None:
                size = (T, *chosen[0], arguments.rank or 16, DTYPES[dtype], arguments.device)
                found.operators += operators.measure(name, *size, found.ceilings[dtype], **options)

            yield f"{name} {dtype} T={T} {chosen[0][0]}x{chosen[0][1]}", operator
    for method in (arguments.methods or USUAL) if arguments.overhead else ():

        def host(method=method) -> None:
            found.overhead += layers.measure_overhead(
                method, arguments.device, seconds=0.02 if arguments.quick else 0.2, peers=arguments.peers
            )

        yield f"host overhead of {method}", host
    for name, dtype in product(arguments.ops or operators.NAMES, arguments.dtype) if arguments.growth else ():

        def over(name=name, dtype=dtype) -> None:
            found.growth += growth.measure([name], [DTYPES[dtype]], arguments.device, found.ceilings)

        yield f"growth of {name} {dtype}", over


def perform(jobs: list[Job], keep: Callable[[], None], seconds: float = float("inf")) -> list[str]:
    """Run the jobs, saying what is left; ``keep`` is called after each. Returns what failed.

    A job is left out if, taking as long as the longest before it, it would not end within ``seconds``.
    """
    began, failed, longest = time.monotonic(), [], 0.0
    for i, (label, job) in enumerate(jobs):
        spent = time.monotonic() - began
        if spent + longest > seconds:
            print(f"[{i + 1}/{len(jobs)}] {label}: left out, for it might not end within {seconds:g} s", flush=True)
            continue
        left = f", about {spent / i * (len(jobs) - i):.0f} s left" if i else ""
        print(f"[{i + 1}/{len(jobs)}] {label}{left}", flush=True)
        try:
            job()
        except (RuntimeError, ValueError) as error:  # no memory, or a size that a method does not take
            failed.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[-1]}")
        longest = max(longest, time.monotonic() - began - spent)
        keep()
    return failed


def draw(found: results.Results, directory: Path) -> None:
    """Draw, and say what was drawn."""
    files = pictures.draw(found, directory)
    print(
        "\n".join(f"drawn: {path}" for path in files) or "nothing drawn: no layers, operators or growth were measured"
    )


def review(arguments: argparse.Namespace) -> int | None:
    """Do what was asked of results files, and return the exit status; None where it was nothing."""
    if arguments.draw and not arguments.png:
        raise SystemExit("bench --draw: got no --png, wanted the directory to draw into")
    if arguments.draw:
        draw(results.read(arguments.draw), arguments.png)
    if arguments.compare:
        text, worse = compare.report(*map(results.read, arguments.compare))
        print(text)
        return 1 if worse else 0
    return 0 if arguments.draw else None


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, keep the results; exit status 1 where anything is red or failed, 130 after Ctrl-C."""
    if (status := review(arguments)) is not None:
        return status
    if arguments.predict:
        print(cost.predictions())
        print("\nOne block of llama3-8b, 8192 tokens, sm_90, by the routes that its products may take:\n")
        print(table(*cost.joined()))
        return 0
    settle(arguments)
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise SystemExit(f"bench --json: got {arguments.json}, wanted a file in a directory that exists")
    warnings.filterwarnings("ignore", message=".*[Ss]parse", category=UserWarning)  # torch's, of CSR tensors in general
    found = results.Results(results.meta(arguments.device))
    notes: list[str] = []
    jobs = list(training_plan(arguments, found) if arguments.training else plan(arguments, found, notes.append))
    print("{device}, {threads} threads, torch {torch}; {kernels}".format(**found.meta))
    if arguments.peers and (absent := missing()):
        print("not installed: " + ", ".join(absent))
    failed, interrupted = [], False

    def keep() -> None:
        if arguments.json:
            results.write(arguments.json, found)

    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a timeout keeps what Ctrl-C keeps
    try:
        if not arguments.training:
            print("measuring the ceilings", flush=True)
            found.ceilings = measure_ceilings(arguments.device, {name: DTYPES[name] for name in arguments.dtype})
        failed = perform(jobs, keep, arguments.seconds)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what was measured so far follows")
    finally:
        signal.signal(signal.SIGTERM, terminated)
    keep()
    print("\n" + report(found, arguments.shapes))
    if arguments.png:
        draw(found, arguments.png)
    for text in dict.fromkeys((*notes, *(f"FAILED {text}" for text in failed))):
        print(text)
    return 130 if interrupted else 1 if found.red or failed else 0
