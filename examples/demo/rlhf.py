"""PE-RLHF: reward, policy, value and anchor are LoRA adapters, and their absence, on one frozen base.

    reward    an adapter and a linear head on the last token, trained on pairs: -log σ(r(chosen) - r(rejected))
    policy    an adapter; anchor: the base alone
    value     an adapter and a linear head on every token, the baseline of the policy's gradient
    J = E[(1-β) r - β KL(policy‖anchor)]

A step of the policy takes three passes: it samples, scores with (anchor, reward) together and without gradients, and
trains (policy, value) together. In each, rows of one batch run under different adapters: `spectral_ops.segments`.
"""

import copy
import statistics

import torch
from torch import nn

import spectral_ops
from demo import measure
from demo.training import PROJECTIONS
from spectral_ops import LoRAConfig, kl_to_anchor, preference_loss, segments, token_logprobs, train_adapters

ADAPTERS = ("reward", "policy", "value")


class Roles:
    """The four models of RLHF on one frozen ``base`` (a causal language model), adapters attached to it in place."""

    def __init__(self, base: nn.Module, r: int = 8):
        for name in ADAPTERS:
            spectral_ops.attach(base, LoRAConfig(r=r, lora_alpha=2 * r, target_modules=PROJECTIONS), adapter_name=name)
        self.model = base
        self.head = base.get_output_embeddings().weight
        self.heads = {name: nn.Linear(base.config.hidden_size, 1, device=base.device) for name in ("reward", "value")}
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
        self.mean, self.std = 0.0, 1.0  # of rewards: see train_reward

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """Those of the named adapters and their heads; only they train from now on."""
        train_adapters(self.model, names)
        heads = [p for name in names if name in self.heads for p in self.heads[name].parameters()]
        return [p for p in self.model.parameters() if p.requires_grad] + heads

    def hidden(self, **tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Last hidden states [B, L, k] of every role's tokens [B, L], all roles in one pass over the base."""
        names = [name for name in tokens if name != "anchor"]
        places = [names.index(name) if name in names else -1 for name in tokens for _ in tokens[name]]
        batch = torch.cat(list(tokens.values()))
        with segments(self.model, torch.tensor(places, device=batch.device), names):
            hidden = self.model.base_model(input_ids=batch, use_cache=False).last_hidden_state
        return dict(zip(tokens, hidden.split([len(t) for t in tokens.values()]), strict=True))

    def reward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B], from hidden states [B, L, k] that end where the text ends."""
        return (self.heads["reward"](hidden[:, -1].float()).squeeze(-1) - self.mean) / self.std

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.heads["value"](hidden.float()).squeeze(-1)

    @torch.no_grad()
    def sample(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        """prompts [B, P] with ``new`` tokens of the policy, [B, P + new]."""
        tokens, cache = prompts, None
        with segments(self.model, torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device), ["policy"]):
            for _ in range(new):
                fresh = tokens if cache is None else tokens[:, -1:]
                out = self.model.base_model(input_ids=fresh, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits = (out.last_hidden_state[:, -1] @ self.head.t()).float()
                tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
        return tokens


# --- reward ----------------------------------------------------------------------------------------------------------


def rejected(blocks: torch.Tensor, prompt: int, vocabulary: torch.Tensor) -> torch.Tensor:
    """``blocks`` [n, L] with worse continuations: of every second one the tokens after ``prompt`` come from another
    block, of the others half of them are drawn from ``vocabulary`` at random."""
    out = blocks.clone()
    out[::2, prompt:] = blocks[torch.randperm(len(blocks))][::2, prompt:]
    noise = vocabulary[torch.randint(len(vocabulary), blocks.shape)]
    spoiled = torch.rand(blocks.shape) < 0.5
    spoiled[::2] = False
    spoiled[:, :prompt] = False
    return torch.where(spoiled, noise, out)


def pairs(roles: Roles, chosen: torch.Tensor, worse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of both, from one pass."""
    hidden = roles.hidden(reward=torch.cat([chosen, worse]))["reward"]
    return roles.reward(hidden).chunk(2)


def train_reward(roles, blocks, held_out, *, prompt, steps, batch, lr, on_step=lambda note: None) -> dict:
    """Fit the reward adapter and head; then scale rewards to mean 0 and deviation 1 over the held-out texts."""
    vocabulary, device = blocks.unique(), roles.head.device
    optimizer = torch.optim.AdamW(roles.parameters("reward"), lr=lr)
    losses = []
    for _ in range(steps):
        chosen = blocks[torch.randint(len(blocks), (batch,))]
        loss = preference_loss(*pairs(roles, chosen.to(device), rejected(chosen, prompt, vocabulary).to(device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        on_step(f"loss {losses[-1]:.3f}")
    with torch.no_grad():
        scores = pairs(roles, held_out.to(device), rejected(held_out, prompt, vocabulary).to(device))
    both = torch.cat(scores)
    roles.mean, roles.std = both.mean().item(), both.std().item()
    return {"losses": losses, "accuracy": (scores[0] > scores[1]).float().mean().item(), "pairs": len(held_out)}


# --- policy ----------------------------------------------------------------------------------------------------------


def score(roles: Roles, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward [B] and the anchor's log-probabilities [B, new], from one pass without gradients."""
    with torch.no_grad():
        hidden = roles.hidden(anchor=tokens, reward=tokens)
        anchor = token_logprobs(hidden["anchor"][:, prompt - 1 : -1], roles.head, tokens[:, prompt:])
        return roles.reward(hidden["reward"]), anchor


def objective(logp, value, reward, anchor, beta: float) -> torch.Tensor:
    """The loss whose gradient is that of -J by REINFORCE with a baseline, and the value's squared error.

    The return of token t is (1-β) r - β Σ_{s≥t} (log π - log anchor): KL is part of what the value predicts.
    """
    kl = kl_to_anchor(logp.detach(), anchor, estimator="k1")
    returns = (1 - beta) * reward.unsqueeze(1) - beta * kl.flip(1).cumsum(1).flip(1)
    advantage = returns - value.detach()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    return -(advantage * logp).mean() + 0.5 * (value - returns).square().mean()


def evaluate(roles: Roles, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's log-probabilities and the values [B, new], from one pass."""
    hidden = roles.hidden(policy=tokens, value=tokens)
    logp = token_logprobs(hidden["policy"][:, prompt - 1 : -1], roles.head, tokens[:, prompt:])
    return logp, roles.value(hidden["value"][:, prompt - 1 : -1])


def train_policy(roles, prompts, *, new, steps, batch, lr, beta=0.05, on_step=lambda note: None) -> dict:
    """Maximise J from ``prompts`` [n, P]; returns mean reward and KL (nats per token) of every step's samples."""
    optimizer = torch.optim.AdamW(roles.parameters("policy", "value"), lr=lr)
    rewards, kls = [], []
    for _ in range(steps):
        chosen = prompts[torch.randint(len(prompts), (batch,))].to(roles.head.device)
        tokens = roles.sample(chosen, new)
        reward, anchor = score(roles, tokens, prompts.shape[1])
        logp, value = evaluate(roles, tokens, prompts.shape[1])
        loss = objective(logp, value, reward, anchor, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
        kls.append(kl_to_anchor(logp.detach(), anchor).mean().item())
        on_step(f"reward {rewards[-1]:+.2f}  KL {kls[-1]:.3f}")
    return {"reward": rewards, "kl": kls, "beta": beta}


def ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    n = max(len(values) // 4, 1)
    return statistics.fmean(values[:n]), statistics.fmean(values[-n:])


# --- beside a model for each role ------------------------------------------------------------------------------------


class Separate:
    """The same four roles as four copies of the base, each with its own adapter alone active."""

    def __init__(self, roles: Roles):
        self.roles = roles
        self.models = {name: copy.deepcopy(roles.model) for name in (*ADAPTERS, "anchor")}
        for name in ADAPTERS:
            spectral_ops.set_adapter(self.models[name], name)
        spectral_ops.detach(self.models["anchor"])
        self.models["anchor"].requires_grad_(False)

    def hidden(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        return self.models[name].base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def loss(self, tokens: torch.Tensor, prompt: int, beta: float) -> torch.Tensor:
        targets, head = tokens[:, prompt:], self.roles.head
        with torch.no_grad():
            anchor = token_logprobs(self.hidden("anchor", tokens)[:, prompt - 1 : -1], head, targets)
            reward = self.roles.reward(self.hidden("reward", tokens))
        logp = token_logprobs(self.hidden("policy", tokens)[:, prompt - 1 : -1], head, targets)
        value = self.roles.value(self.hidden("value", tokens)[:, prompt - 1 : -1])
        return objective(logp, value, reward, anchor, beta)


def shared_loss(roles: Roles, tokens: torch.Tensor, prompt: int, beta: float) -> torch.Tensor:
    reward, anchor = score(roles, tokens, prompt)
    return objective(*evaluate(roles, tokens, prompt), reward, anchor, beta)


def parameter_bytes(*models: nn.Module) -> int:
    storages = (p.untyped_storage() for model in models for p in model.parameters())
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def compare(roles: Roles, tokens: torch.Tensor, prompt: int, beta: float, rounds: int) -> dict:
    """Scoring and one training pass (no sampling, no optimizer step) on one base and on four, in one run."""
    device, result = tokens.device, {}

    def step(loss):
        def run():
            loss().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {"one base": step(lambda: shared_loss(roles, tokens, prompt, beta))}
    steps["one base"]()
    with measure.peak_memory(device) as peak:
        steps["one base"]()
        result["peak"] = {"one base": peak()}
    separate = Separate(roles)
    steps["four copies"] = step(lambda: separate.loss(tokens, prompt, beta))
    steps["four copies"]()
    with measure.peak_memory(device) as peak:
        steps["four copies"]()
        result["peak"]["four copies"] = peak()
    losses = shared_loss(roles, tokens, prompt, beta).item(), separate.loss(tokens, prompt, beta).item()
    result["losses"] = dict(zip(steps, losses, strict=True))
    result["seconds"], _ = measure.interleave(steps, rounds=rounds, min_block_s=0)
    adapters = parameter_bytes(roles.model) - parameter_bytes(separate.models["anchor"])
    result["parameters"] = {
        "one base": parameter_bytes(roles.model),
        "four copies": 4 * parameter_bytes(separate.models["anchor"]) + adapters,
    }
    return result
