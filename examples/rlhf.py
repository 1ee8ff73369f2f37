"""RLHF with one frozen base: a reward model, then a policy held near its anchor, all of them LoRA adapters.

`make rlhf` runs it. On Python's documentation, a reward adapter learns to tell true continuations from spoiled ones;
then a policy and its value baseline train against it: J = E[(1-β) r - β KL(policy‖anchor)]. At the end the same step
is timed beside four copies of the model. Table, JSON and picture go to outputs/.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from demo import data, report, rlhf
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ONE, FOUR = "one base", "four copies"


def parse(argv=None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200 if gpu else 30, help="steps of the policy")
    parser.add_argument("--reward-steps", type=int, default=100 if gpu else 30)
    parser.add_argument("--rounds", type=int, default=5 if gpu else 2, help="timed steps on one base and on four")
    parser.add_argument("--batch", type=int, default=64 if gpu else 8)
    parser.add_argument("--prompt", type=int, default=32 if gpu else 12, help="tokens")
    parser.add_argument("--new", type=int, default=32 if gpu else 12, help="tokens sampled after the prompt")
    parser.add_argument("--held-out", type=int, default=64 if gpu else 32, help="pairs that the reward is judged on")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    options = parser.parse_args(argv)
    counts = ("steps", "reward_steps", "rounds", "batch", "prompt", "new", "held_out", "r")
    if any(getattr(options, name) < 1 for name in counts) or options.held_out < 2:
        parser.error("counts must be at least 1, --held-out at least 2")
    if not 0 <= options.beta < 1:
        parser.error("--beta must be in [0, 1)")
    options.device = torch.device("cuda" if gpu else "cpu")
    return options


def run(base, tokenizer, options, console: Console) -> dict:
    """Train both stages on ``base``, compare, and return what outputs/rlhf.json holds."""
    began = time.monotonic()
    torch.manual_seed(options.seed)
    blocks = data.token_blocks(tokenizer, data.corpus(), options.prompt + options.new)
    blocks = blocks[torch.randperm(len(blocks))]
    held_out, blocks = blocks[: options.held_out], blocks[options.held_out :]
    roles = rlhf.Roles(base, options.r)
    shared = {"batch": options.batch, "lr": options.lr}
    console.print("[bold]1/3[/] reward: a continuation beside a spoiled one")
    with report.progress(console, "reward", options.reward_steps) as advance:
        reward = rlhf.train_reward(
            roles, blocks, held_out, prompt=options.prompt, steps=options.reward_steps, on_step=advance, **shared
        )
    console.print(f"    it prefers the true one in {reward['accuracy']:.0%} of {reward['pairs']} held-out pairs")
    console.print("[bold]2/3[/] policy and value, on the same base")
    with report.progress(console, "policy", options.steps) as advance:
        policy = rlhf.train_policy(
            roles, blocks[:, : options.prompt], new=options.new, steps=options.steps, beta=options.beta,
            on_step=advance, **shared,
        )  # fmt: skip
    console.print("[bold]3/3[/] beside four copies of the model")
    tokens = roles.sample(held_out[: options.batch, : options.prompt].to(options.device), options.new)
    compared = rlhf.compare(roles, tokens, options.prompt, options.beta, options.rounds)
    sizes = f"{options.batch} × ({options.prompt} + {options.new}) tokens"
    return {
        "title": f"PE-RLHF, r = {options.r}, β = {options.beta}, {sizes}",
        "reward": reward,
        "policy": policy,
        "compared": compared,
        "minutes": (time.monotonic() - began) / 60,
    }


def tables(result: dict) -> list[Table]:
    policy, compared = result["policy"], result["compared"]
    learned = Table(title=result["title"], title_justify="left")
    for name in ("", "first quarter", "last quarter", "largest"):
        learned.add_column(name, justify="right" if name else "left")
    for label, key, form in (("reward", "reward", "+.2f"), ("KL to the anchor, nats per token", "kl", ".3f")):
        first, last = rlhf.ends(policy[key])
        learned.add_row(label, f"{first:{form}}", f"{last:{form}}", f"{max(policy[key]):{form}}")
    beside = Table(title="scoring and one training pass, all four roles", title_justify="left")
    for name in ("", ONE, FOUR):
        beside.add_column(name, justify="right" if name else "left")
    beside.add_row("parameters", *(report.mib(compared["parameters"][n]) for n in (ONE, FOUR)))
    beside.add_row("peak memory", *(report.mib(compared["peak"][n]) for n in (ONE, FOUR)))
    beside.add_row("seconds", *(f"{compared['seconds'][n]:.3g}" for n in (ONE, FOUR)))
    beside.add_row("loss", *(f"{compared['losses'][n]:.5f}" for n in (ONE, FOUR)))
    return [learned, beside]


def picture(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "font.size": 10})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    figure.suptitle(result["title"], x=0.01, ha="left", fontweight="bold")
    policy, compared, losses = result["policy"], result["compared"], result["reward"]["losses"]
    left.plot(range(1, len(losses) + 1), losses, color="#9aa5b1")
    left.set(xlabel="step", title=f"reward: loss; {result['reward']['accuracy']:.0%} of held-out pairs right")
    at = range(1, len(policy["reward"]) + 1)
    middle.plot(at, policy["reward"], color="#1f6fb2")
    middle.set(xlabel="step", title="policy")
    middle.set_ylabel("reward", color="#1f6fb2")
    beside = middle.twinx()
    beside.plot(at, policy["kl"], color="#e08e45")
    beside.set_ylabel("KL to the anchor, nats per token", color="#e08e45")
    beside.set_ylim(bottom=0)
    for i, key in enumerate(("parameters", "peak")):
        for j, name in enumerate((ONE, FOUR)):
            bars = right.bar(
                i + 0.4 * j, compared[key][name] / 2**20, 0.38, color=("#1f6fb2", "#9aa5b1")[j], label=name
            )
            right.bar_label(bars, fmt="{:,.0f}")
            if i:
                bars.set_label("_")
    right.set_xticks([0.2, 1.2], ["parameters", "peak"])
    seconds = compared["seconds"]
    right.set(title=f"MiB; {seconds[ONE]:.2g} s beside {seconds[FOUR]:.2g} s")
    right.legend(frameon=False, loc="upper left")
    right.margins(y=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    options, console = parse(), Console()
    console.print(f"SmolLM2-135M-Instruct, float32 on {options.device.type}")
    base = data.load_base(options.device, torch.float32)
    result = run(base, data.load_tokenizer(), options, console)
    for shown in tables(result):
        console.print(shown)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rlhf.json").write_text(json.dumps(result, indent=1))
    picture(result, options.output / "rlhf.png")
    console.print(f"{options.output / 'rlhf.json'} and rlhf.png, after {result['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
