"""Models with native adapters under Trainer and TRL: what is saved, resumed, reloaded, and measured against."""

import copy
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from processes import in_two_processes  # noqa: E402
from test_hf_trainer import trainer  # noqa: E402
from tiny import language_model, tokenizer  # noqa: E402
from training import STEPS, arguments, judged, preferences, texts  # noqa: E402

import spectral_ops as so  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": so.LoRAConfig(r=4, target_modules=SOME),
    "dora": so.DoRAConfig(r=4, target_modules=SOME),
    "bone": so.BoneConfig(r=4, target_modules=SOME),
    "pissa": so.LoRAConfig(r=4, target_modules=SOME, init_lora_weights="pissa"),
    "milora": so.LoRAConfig(r=4, target_modules=SOME, init_lora_weights="milora"),
    "dora_pissa": so.DoRAConfig(r=4, target_modules=SOME, init_lora_weights="pissa"),
    "pica": so.PiCaConfig(r=4, target_modules=SOME),
    "rosa": so.RoSAConfig(r=4, d=0.05, target_modules=SOME),
    "adalora": so.AdaLoRAConfig(init_r=4, target_r=2, total_step=10, target_modules=SOME),
    "spectral": so.SpectralConfig(r=4, target_modules=SOME),
    "spectral_residual": so.SpectralConfig(r=4, residual=True, target_modules=SOME),
    "dash": so.LoRADashConfig(r=4, target_modules=SOME),
    "vera": so.VeRAConfig(r=8, target_modules=SOME),
    "head": so.LoRAConfig(r=4, target_modules=SOME, modules_to_save=["lm_head"]),
}
TRAINED = ["lora", "dora", "bone", "pissa", "pica", "rosa", "adalora", "spectral", "vera", "head"]
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def attached(method, seed=1, masks=True):
    model = copy.deepcopy(language_model())
    torch.manual_seed(seed)
    so.attach(model, CONFIGS[method])
    if method == "rosa" and masks:
        for layer in so.adapter_layers(model).values():
            count = layer.rosa_values["default"].numel()
            mask = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool)
            mask[torch.randperm(len(mask))[:count]] = True
            layer.set_mask(mask.view(layer.out_features, layer.in_features))
    return model


def trained(method, seed=5):
    """One whose adapter is off its start, by the same amount in every call."""
    model = attached(method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def losses(running):
    return [entry["loss"] for entry in running.state.log_history if "loss" in entry]


def adapter_files(folder):
    return {name for name in os.listdir(folder) if "adapter" in name or name.startswith("model")}


IDS = torch.arange(4, 24).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, wrapped",
    [pytest.param(method, False, id=f"{method}-bare") for method in TRAINED]
    + [
        pytest.param(method, True, id=f"{method}-peft", marks=[pytest.mark.thorough] * (method not in ("lora", "rosa")))
        for method in TRAINED
    ],
)
def test_a_run_saves_its_adapter_and_goes_on_as_if_it_had_not_stopped(method, wrapped, tmp_path):
    def start(folder, **how):
        model = attached(method, **how)
        args = {"save_strategy": "steps", "save_steps": 2}
        return trainer(folder, so.as_peft_model(model) if wrapped else model, tokenizer(), [], **args)

    whole = start(tmp_path / "whole")
    whole.train()
    assert len(losses(whole)) == STEPS
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert adapter_files(checkpoint) == (FILES if wrapped else FILES | {"model.safetensors"})
    again = start(tmp_path / "again", seed=2, masks=False)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[-1] == losses(whole)[-1]
    for (name, parameter), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name

    whole.save_model(str(tmp_path / "saved"))
    fresh = copy.deepcopy(language_model())
    before = logits(fresh)
    fresh = so.load_adapter(fresh, tmp_path / "saved")
    found = logits(whole.model)
    assert (found - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(logits(fresh), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("method", ["dora", "pissa", "pica"])
def test_the_best_checkpoint_comes_back(method, wrapped, tmp_path):
    model = attached(method)
    running = trainer(
        tmp_path, so.as_peft_model(model) if wrapped else model, tokenizer(), [], save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,  # the first step's is the worst, so the last one is not what comes back
    )  # fmt: skip
    running.train()
    best = running.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    stored = so.load_adapter(copy.deepcopy(language_model()), best)
    torch.testing.assert_close(logits(model), logits(stored), rtol=1e-5, atol=1e-5)
    last = so.load_adapter(copy.deepcopy(language_model()), tmp_path / f"checkpoint-{STEPS}")
    assert (logits(last) - logits(model)).norm() > 1e-3 * logits(model).norm()


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
def test_label_smoothing_and_evaluation(wrapped, tmp_path):
    model = attached("lora")
    running = trainer(
        tmp_path, so.as_peft_model(model) if wrapped else model, tokenizer(), [], label_smoothing_factor=0.1
    )
    running.train()
    assert running.evaluate()["eval_loss"] > 0


def test_several_adapters_in_a_checkpoint(tmp_path):
    model = attached("lora")
    so.attach(model, so.LoRAConfig(r=2, target_modules=["q_proj"]), "second")
    running = trainer(tmp_path / "run", model, tokenizer(), [], save_strategy="steps", save_steps=2)
    running.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert adapter_files(checkpoint / "second") == FILES
    again = attached("lora", seed=2)
    so.attach(again, so.LoRAConfig(r=2, target_modules=["q_proj"]), "second")
    resumed = trainer(tmp_path / "again", again, tokenizer(), [])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-1] == losses(running)[-1]


def test_a_quantised_base_trains(tmp_path):
    """Trainer refuses a model that transformers quantised and nobody adapted."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    language_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")

    def load():
        torch.manual_seed(0)
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        try:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)
            model(input_ids=IDS)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            pytest.skip(f"this bitsandbytes does not run its layers on the CPU: {error}")
        return model

    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path / "no", load(), tokenizer(), [])
    model = so.attach(load(), so.DoRAConfig(r=4, target_modules=SOME))
    running = trainer(tmp_path / "run", model, tokenizer(), [], save_strategy="steps", save_steps=2)
    running.train()
    assert adapter_files(tmp_path / "run" / "checkpoint-2") == FILES | {"model.safetensors"}
    again = so.load_adapter(load(), tmp_path / "run" / f"checkpoint-{STEPS}", check_base=False)
    # with gradients: without them bitsandbytes takes a product on the CPU that 96 inputs do not fit
    found, wanted = (m.eval()(input_ids=IDS).logits.detach() for m in (again, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def saved_from_shards(rank, folder):
    """What two processes compute, and write: from their shards together, and by the first from what is gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    config = so.DoRAConfig(r=4, target_modules=SOME, modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    model = so.attach(copy.deepcopy(language_model()), config)
    for module in (*model.model.layers, model):
        fully_shard(module)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    gathered = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / "gathered", state_dict=gathered)
    so.save_adapter(model, folder / f"together {rank}")
    return logits(model)


def test_an_adapter_of_a_sharded_model(tmp_path):
    (tmp_path / "group").mkdir()
    found, _ = in_two_processes(saved_from_shards, tmp_path / "group", tmp_path)
    for folder in ("gathered", "together 0", "together 1"):
        loaded = so.load_adapter(copy.deepcopy(language_model()), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), found, rtol=1e-5, atol=1e-5)


# --- TRL -------------------------------------------------------------------------------------------------------------


def second_model_refused(monkeypatch):
    """Let a trainer fail that loads a model of its own."""

    def load(*_args, **_kwargs):
        raise AssertionError("a second model was loaded")

    for name in ("dpo_trainer", "kto_trainer", "grpo_trainer", "rloo_trainer"):
        module = pytest.importorskip(f"trl.trainer.{name}")
        if hasattr(module, "create_model_from_path"):
            monkeypatch.setattr(module, "create_model_from_path", load)


def dpo(folder, model, reference=None):
    from trl import DPOConfig, DPOTrainer

    args = arguments(DPOConfig, folder, max_length=64)
    return DPOTrainer(model, reference, args=args, train_dataset=preferences(), processing_class=tokenizer())


def kto(folder, model, reference=None):
    from trl import KTOConfig, KTOTrainer

    args = arguments(KTOConfig, folder, max_length=64)
    return KTOTrainer(model, reference, args=args, train_dataset=judged(), processing_class=tokenizer())


@pytest.mark.parametrize("start", [attached, trained], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    ("build", "method"),
    [(dpo, m) for m in ("lora", "dora", "pissa", "pica", "rosa", "vera", "head")] + [(kto, "bone")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_reference_is_the_model_itself_as_it_was(build, method, start, monkeypatch, tmp_path):
    """The losses are those against a second model that is kept by hand, and none is loaded."""
    pytest.importorskip("trl")
    reference = copy.deepcopy(start(method)).requires_grad_(False)
    by_hand = build(tmp_path / "hand", start(method), reference)
    by_hand.train()
    second_model_refused(monkeypatch)
    running = build(tmp_path / "ours", so.as_peft_model(start(method)))
    running.train()
    assert len(losses(running)) == STEPS
    assert losses(running) == pytest.approx(losses(by_hand), abs=2e-5)
    assert losses(running)[-1] != pytest.approx(losses(running)[0], abs=1e-3)


def test_sft_takes_a_bare_model_and_a_wrapped_one(tmp_path):
    trl = pytest.importorskip("trl")
    found = {}
    for name, model in (("bare", attached("pica")), ("peft", so.as_peft_model(attached("pica")))):
        args = arguments(trl.SFTConfig, tmp_path / name, max_length=64)
        running = trl.SFTTrainer(model, args=args, train_dataset=texts(), processing_class=tokenizer())
        running.train()
        running.save_model(str(tmp_path / name / "saved"))
        assert adapter_files(tmp_path / name / "saved") >= FILES
        found[name] = losses(running)
    assert found["bare"] == pytest.approx(found["peft"], abs=1e-6)


def test_trl_takes_the_config_that_is_pefts(tmp_path):
    trl = pytest.importorskip("trl")
    args = arguments(trl.SFTConfig, tmp_path, max_length=64)
    options = {"args": args, "train_dataset": texts(), "processing_class": tokenizer()}
    config = so.DoRAConfig(r=4, target_modules=SOME)
    trl.SFTTrainer(copy.deepcopy(language_model()), peft_config=config.to_peft(), **options).train()
    with pytest.raises(TypeError, match=r"to_peft\(\)|PeftConfig"):
        trl.SFTTrainer(copy.deepcopy(language_model()), peft_config=config, **options)


def test_an_adapter_on_the_head_is_warned_of(tmp_path):
    """TRL multiplies by the head's weight itself; for PEFT's layers it raises, ours it does not know."""
    pytest.importorskip("trl.trainer.sft_trainer")
    config = so.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="got 'lm_head', the output head, whose weight TRL's trainers compute with"):
        model = so.attach(copy.deepcopy(language_model()), config)
    with pytest.raises(ValueError, match="an adapter on the output head, wanted none"):
        so.as_peft_model(model)
