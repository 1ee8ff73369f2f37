"""transformers' Trainer with SpectralOpsCallback: PEFT's numbers, a line after the first step, what strict refuses."""

import copy
import logging
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model  # noqa: E402
from tiny import ADAPTED, TARGETS, language_model, tokenizer  # noqa: E402
from training import CONFIGS, STEPS, arguments, run, texts, the_same_with_the_callback  # noqa: E402
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from spectral_ops import accelerate, report  # noqa: E402
from spectral_ops.integrations.transformers import SpectralOpsCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, model, words, callbacks, **more):
    data = texts().map(lambda row: words(row["text"]), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    args = arguments(TrainingArguments, folder, **more)
    return Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator, callbacks=callbacks,
        processing_class=words,
    )  # fmt: skip


def ready(callback, tmp_path, config=None, **more):
    """A Trainer around a model that somebody has adapted before."""
    torch.manual_seed(0)
    model = language_model() if config is None else get_peft_model(language_model(), config)
    return trainer(tmp_path, model, tokenizer(), [callback], **more)


def line_of(caplog):
    """The one record that the callback has left."""
    (record,) = (r for r in caplog.records if r.name == "spectral_ops" and "layers fused" in r.getMessage())
    return record


class Hook(TrainerCallback):
    """From the first step on PEFT must serve one layer."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        layers = model.base_model.model.model.layers
        layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *a: None)


class Skip(TrainerCallback):
    """From the first step on nobody calls three layers."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        model.base_model.model.model.layers[1].mlp.forward = lambda x: x


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("lora", {}, marks=pytest.mark.thorough),
        ("dora", {}),
        ("miss", {}),
        pytest.param("lora", {"gradient_checkpointing": True}, marks=pytest.mark.thorough),
        ("dora", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("lora", {"gradient_accumulation_steps": 2}),
    ],
)
def test_same_as_stock_peft(method, more, tmp_path, caplog):
    caplog.set_level(logging.INFO, "spectral_ops")

    def build(folder, model, words, callbacks):
        return trainer(folder, get_peft_model(model, CONFIGS[method]()), words, callbacks, **more)

    the_same_with_the_callback(build, tmp_path, lambda: caplog.text)
    assert line_of(caplog).levelname == "INFO"


def test_adalora(tmp_path):
    """Its allocator must be called by the loop; transformers has a place for that, a callback."""

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            model.base_model.update_and_allocate(state.global_step)

    def build(folder, model, words, callbacks):
        config = AdaLoraConfig(target_modules=TARGETS, total_step=STEPS, tinit=0, tfinal=1, init_r=4, target_r=2)
        return trainer(folder, get_peft_model(model, config), words, [Allocate(), *callbacks])

    losses, _, plain = run(build, tmp_path / "plain")
    fused_losses, _, fused = run(build, tmp_path / "fused", SpectralOpsCallback(strict=True))
    assert fused_losses == pytest.approx(losses, rel=1e-5)
    assert report(fused).counts["fused"] == ADAPTED
    assert fused.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern


def test_what_fell_back_and_what_never_ran_is_a_warning(tmp_path, caplog):
    callback = SpectralOpsCallback()
    running = ready(callback, tmp_path, CONFIGS["lora"]())
    running.add_callback(Hook())
    running.add_callback(Skip())
    running.train()
    record = line_of(caplog)
    lines = record.getMessage().split("\n  ")
    assert record.levelname == "WARNING"
    counts = "10 layers fused, 0 fused over their own base layer, 1 left to PEFT, 3 never called"
    assert lines[0] == f"spectral_ops: {counts}"
    assert "PEFT: 1 layers (self_attn.q_proj): lora_A carries hooks of its own" in lines[1:]
    assert any(line.startswith("never called: 3 layers (gate_proj, up_proj, down_proj)") for line in lines[1:])


def test_strict_stops_the_run(tmp_path):
    running = ready(SpectralOpsCallback(strict=True), tmp_path, CONFIGS["lora"]())
    running.add_callback(Hook())
    with pytest.raises(RuntimeError, match="lora_A carries hooks"):  # at the call
        running.train()

    running = ready(SpectralOpsCallback(strict=True), tmp_path, CONFIGS["lora"]())
    running.add_callback(Skip())
    with pytest.raises(RuntimeError, match="3 never called"):
        running.train()
    with pytest.raises(RuntimeError, match="would be left to PEFT"):
        ready(
            SpectralOpsCallback(strict=True),
            tmp_path,
            LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]),
        )


def test_a_model_without_adapters_of_its_own(tmp_path, caplog):
    ready(SpectralOpsCallback(), tmp_path).train()
    assert "nothing was accelerated" in caplog.text
    with pytest.raises(ValueError):
        ready(SpectralOpsCallback(strict=True), tmp_path).train()
    caplog.clear()
    ready(SpectralOpsCallback(), tmp_path, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not caplog.text  # an adapter may still come: nothing is said before training begins


def test_an_adapter_that_comes_after_the_trainer(tmp_path):
    callback = SpectralOpsCallback(strict=True)
    running = ready(callback, tmp_path)
    assert callback.report is None
    running.model.add_adapter(CONFIGS["lora"]())
    running.train()
    assert callback.report.counts["fused"] == ADAPTED and not callback.report.fallbacks()
    callback = SpectralOpsCallback(strict=True)
    running = ready(callback, tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    running.model.add_adapter("more", CONFIGS["lora"]())
    running.model.base_model.set_adapter("more")
    running.train()
    assert callback.report.counts["fused"] == ADAPTED and not callback.report.fallbacks()


def test_evaluation_alone(tmp_path):
    callback = SpectralOpsCallback(strict=True)
    running = ready(callback, tmp_path, CONFIGS["lora"]())
    plain = Trainer.evaluate(ready(TrainerCallback(), tmp_path, CONFIGS["lora"]()))
    assert running.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert callback.report.counts["fused"] == ADAPTED and callback.report.called


def test_resuming(tmp_path):
    first = ready(SpectralOpsCallback(strict=True), tmp_path, CONFIGS["dora"]())
    first.args.save_strategy, first.args.save_steps, first.args.max_steps = "steps", 1, 1
    first.train()
    losses = []
    for callback in (TrainerCallback(), SpectralOpsCallback(strict=True)):
        again = ready(callback, tmp_path, CONFIGS["dora"]())
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        losses.append([entry["loss"] for entry in again.state.log_history if "loss" in entry])
    assert len(losses[0]) == STEPS and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_compiled(tmp_path, caplog):
    """Calls inside a graph are not counted, and not said to be missing."""
    caplog.set_level(logging.INFO, "spectral_ops")
    callback = SpectralOpsCallback(strict=True)
    ready(callback, tmp_path, CONFIGS["lora"](), torch_compile_backend="eager").train()
    assert line_of(caplog).getMessage().startswith(f"spectral_ops: {ADAPTED} layers fused")
    assert {row.reason for row in callback.report.rows if not row.calls} <= {
        "no call outside torch.compile's graphs, whose calls are not counted"
    }


def test_without_a_logger_set_up_the_line_is_printed(tmp_path, capsys):
    for callback in (SpectralOpsCallback(), SpectralOpsCallback()):
        running = ready(callback, tmp_path, CONFIGS["lora"]())
        running.train()
    assert capsys.readouterr().err.count(f"spectral_ops: {ADAPTED} layers fused") == 2
    logging.getLogger("spectral_ops").setLevel(logging.WARNING)
    try:
        ready(SpectralOpsCallback(), tmp_path, CONFIGS["lora"]()).train()
    finally:
        logging.getLogger("spectral_ops").setLevel(logging.NOTSET)
    assert "layers fused" not in capsys.readouterr().err


def test_a_model_that_is_accelerated_already(tmp_path):
    callback = SpectralOpsCallback(strict=True)
    model = get_peft_model(language_model(), CONFIGS["lora"]())
    accelerate(model, recompute=True, siblings=False)
    running = trainer(tmp_path, model, tokenizer(), [callback])
    running.train()
    wanted = {"strict": True, "recompute": True, "exact": False, "siblings": False}  # its own, but what was asked for
    assert all({name: getattr(s, name) for name in wanted} == wanted for s in callback.report.states)
    assert callback.report.counts["fused"] == ADAPTED and isinstance(running.model, PeftModel)


def test_the_model_that_model_init_makes_is_the_one_that_trains(tmp_path, capsys):
    """With model_init train() makes the model anew, after on_init_end."""
    callback = SpectralOpsCallback(strict=True)
    running = Trainer(
        model_init=lambda: get_peft_model(language_model(), CONFIGS["lora"]()),
        args=arguments(TrainingArguments, tmp_path), callbacks=[callback],
        train_dataset=texts().map(lambda row: tokenizer()(row["text"]), remove_columns=["text"]),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )  # fmt: skip
    for _ in range(2):
        running.train()
        assert report(running.model).counts["fused"] == ADAPTED
        assert min(row.calls for row in callback.report.rows) == STEPS
    assert capsys.readouterr().err.count(f"spectral_ops: {ADAPTED} layers fused") == 2


def test_it_can_be_copied_and_pickled_after_training(tmp_path):
    callback = SpectralOpsCallback(strict=True, exact=True)
    ready(callback, tmp_path, CONFIGS["lora"]()).train()
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.options == callback.options and other.report is None and callback.report is not None
