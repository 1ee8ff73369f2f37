"""A transformers model with native adapters: its class, its files, and PreTrainedModel's methods over our adapters."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from models import perturb  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import spectral_ops as so  # noqa: E402


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def lora(**fields):
    return so.LoRAConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **fields})


def adapted(config=None, name="default"):
    return perturb(so.attach(llama(), config or lora(), name), 0.2)


IDS = torch.arange(3, 13).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_class_comes_and_goes():
    model = llama()
    assert type(model) is transformers.LlamaForCausalLM
    so.attach(model, lora())
    assert isinstance(model, transformers.LlamaForCausalLM) and type(model) is not transformers.LlamaForCausalLM
    assert (
        type(model).__name__ == "LlamaForCausalLM"
        and type(model).__module__ == transformers.LlamaForCausalLM.__module__
    )
    so.attach(model, lora(), "second")
    assert type(model) is type(adapted())
    so.detach(model, "second")
    assert type(model) is not transformers.LlamaForCausalLM
    so.detach(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert not getattr(model, "_hf_peft_config_loaded", False)
    with pytest.raises(ValueError):
        so.attach(model, lora(target_modules=["nothing"]))
    assert type(model) is transformers.LlamaForCausalLM


def test_a_model_inside_of_another_module(tmp_path):
    outer = nn.ModuleDict({"inner": llama(), "head": nn.Linear(4, 4)})
    so.attach(outer, lora())
    assert type(outer) is nn.ModuleDict and outer["inner"].active_adapters() == ["default"]
    perturb(outer, 0.2)
    outer["inner"].save_pretrained(tmp_path)
    assert torch.equal(logits(so.load_adapter(llama(), tmp_path)), logits(outer["inner"]))
    so.detach(outer)
    assert type(outer["inner"]) is transformers.LlamaForCausalLM
    untouched = nn.ModuleDict({"inner": llama(), "head": nn.Linear(4, 4)})
    so.attach(untouched, lora(target_modules=["head"]))
    assert type(untouched["inner"]) is transformers.LlamaForCausalLM


def test_an_adapter_that_comes_while_they_are_switched_off():
    model = adapted()
    bare = logits(llama())
    model.disable_adapters()
    perturb(so.attach(model, lora(target_modules=["o_proj"]), "second"), 0.2)
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    assert not torch.equal(logits(model), bare)


def test_any_other_module_keeps_its_class():
    model = so.attach(nn.Sequential(nn.Linear(4, 4)), lora(target_modules=["0"]))
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way):
    model = adapted()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    assert torch.equal(logits(other), logits(model))
    perturb(other, 0.1)
    assert not torch.equal(logits(other), logits(model))
    assert type(so.detach(other)) is transformers.LlamaForCausalLM


def test_files_hold_the_adapter_and_load_back(tmp_path):
    model = adapted(so.DoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
    }  # fmt: skip
    fresh = llama()
    size = sum(p.numel() for p in fresh.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * size / 2
    assert torch.equal(logits(so.load_adapter(fresh, tmp_path)), logits(model))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    other = llama()
    so.attach(other, lora(), "mine")
    with pytest.raises(ValueError, match="peft_model_id: got .* wanted a local folder"):
        other.load_adapter("some/repository")


def test_the_base_model_is_found_again(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    perturb(so.attach(model, lora()), 0.2).save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-5)


def test_who_writes_and_from_what(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "rank 1", is_main_process=False)
    assert not (tmp_path / "rank 1").exists()
    gathered = {name: 2 * t if ".lora_B." in name else t for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = so.load_adapter(llama(), tmp_path / "gathered")
    for path, layer in so.adapter_layers(model).items():
        twice = so.adapter_layers(other)[path]
        assert torch.equal(twice.lora_B["default"], 2 * layer.lora_B["default"])
        assert torch.equal(twice.lora_A["default"], layer.lora_A["default"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for wrong in ({"variant": "fp16"}, {"safe_serialization": False}, {"save_peft_format": False}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.save_pretrained(tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_state_dict_must_have_what_trains(tmp_path):
    model = adapted(lora(modules_to_save=["norm"]))
    state = model.state_dict()
    for wrong in ({"module." + name: t for name, t in state.items()}, {"model.norm.weight": torch.zeros(32)}, {
        name: t for name, t in state.items() if not name.startswith("model.norm.")
    }):  # fmt: skip
        with pytest.raises(ValueError, match="state_dict: got no .* wanted the tensors that adapter 'default' trains"):
            so.save_adapter(model, tmp_path / "wrong", state_dict=wrong)
    assert not (tmp_path / "wrong").exists()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    so.save_adapter(model, tmp_path / "trained", state_dict={name: state[name] for name in trains})
    compiled = torch.compile(model, backend="eager")
    so.save_adapter(compiled, tmp_path / "compiled", state_dict=compiled.state_dict())
    for folder in ("trained", "compiled"):
        assert torch.equal(logits(so.load_adapter(llama(), tmp_path / folder)), logits(model))


def test_a_state_dict_may_have_a_tied_tensor_once(tmp_path):
    def tied():
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
        return model

    config = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = perturb(so.attach(tied(), config), 0.2)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    want = logits(model)
    with torch.no_grad():
        model.lm_head.copies["default"].weight.zero_()
    so.save_adapter(model, tmp_path, state_dict=state)
    assert torch.equal(logits(so.load_adapter(tied(), tmp_path)), want)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_state_dict_of_a_quantised_base(form, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = so.quantize_base(adapted(), form)
    state = {name: 2 * t if ".lora_B." in name else t for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    for path, layer in so.adapter_layers(so.load_adapter(llama(), tmp_path)).items():
        assert torch.equal(layer.lora_B["default"], 2 * so.adapter_layers(model)[path].lora_B["default"])


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_the_base_model_in_the_same_folder_stays(size, tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size=size)
    base = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = adapted()
    with pytest.warns(UserWarning, match="save_directory: got .* holds no adapter and stays"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in base} == base
    assert torch.equal(logits(so.load_adapter(llama(), tmp_path)), logits(model))


def test_what_saves_again_over_its_own_files(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = so.attach(adapted(), lora(r=2), "second")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() > {
        f"adapters.second.base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"
    }


def test_some_of_the_adapters(tmp_path):
    model = so.attach(adapted(), lora(r=2), "second")
    model.save_pretrained(tmp_path / "one", selected_adapters="second")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["model.safetensors", "second"]
    for wrong in ([], ["third"]):
        with pytest.raises(ValueError, match=r"selected_adapters: got .*wanted names of \['default', 'second'\]"):
            model.save_pretrained(tmp_path / "none", selected_adapters=wrong)
    assert not (tmp_path / "none").exists()


def test_a_class_that_takes_no_subclass_leaves_the_model_alone():
    class Final(transformers.LlamaForCausalLM):
        def __init_subclass__(cls):
            raise TypeError("final")

    model = Final(llama().config)
    names, trains = [name for name, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match="final"):
        so.attach(model, lora(modules_to_save=["norm"]))
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == trains


def test_a_detached_model_under_another_class_saves_itself(tmp_path):
    """As fully_shard leaves it: its class over ours."""
    model = adapted()
    model.__class__ = type("Sharded", (type("Shard", (), {}), type(model)), {})
    so.detach(so.merge(model)).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == llama().state_dict().keys()


def test_the_adapter_methods_of_a_transformers_model(tmp_path):
    model = adapted()
    want, bare = logits(model), logits(llama())
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    assert torch.equal(logits(model), want)
    state = model.get_adapter_state_dict()
    assert set(state) == {
        f"model.layers.0.self_attn.{name}.lora_{side}.weight" for name in ("q_proj", "v_proj") for side in "AB"
    }
    model.add_adapter(lora(r=2), "second")
    assert model.active_adapters() == ["second"]
    model.set_adapter("default")
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="wanted one"):
        model.set_adapter(["default", "second"])
    with pytest.raises(TypeError, match="wanted a config of spectral_ops"):
        model.add_adapter(peft.LoraConfig(), "third")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'second' is active now"):
        model.delete_adapter("default")
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    assert torch.equal(logits(model), want) and model.active_adapters() == ["loaded"]
    model.delete_adapter(["second", "loaded"])
    assert type(model) is transformers.LlamaForCausalLM and torch.equal(logits(model), bare)


def test_checkpointing_lets_gradients_through_frozen_inputs():
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_counted_as_peft_counts(capsys):
    fields = {"r": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**fields))
    model = so.attach(llama(), so.LoRAConfig(**fields))
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    wanted = capsys.readouterr().out
    model.print_trainable_parameters()
    so.print_trainable_parameters(model)
    assert capsys.readouterr().out == 2 * wanted
    so.print_trainable_parameters(nn.Linear(3, 2))
    assert capsys.readouterr().out == "trainable params: 8 || all params: 8 || trainable%: 100.0000\n"
    with pytest.raises(TypeError, match="model: got int"):
        so.print_trainable_parameters(3)


def test_a_state_dict_of_the_whole_model_loads_as_ever():
    model, other = adapted(), so.attach(llama(), lora())
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(logits(other), logits(model))
    state = {"model.norm.weight": torch.zeros(32)}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert len(missing) > 3 and not unexpected


def test_compiled_and_sharded_classes_on_top():
    model = adapted()
    want = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled), want, atol=1e-6)
    assert so.adapter_configs(compiled)["default"].r == 3


# --- PEFT over ours --------------------------------------------------------------------------------------------------


def test_peft_says_whose_adapters_are_there():
    model = adapted()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TypeError, match=r"adapters of spectral_ops.*spectral_ops\.detach\(model\) takes them out"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert [name for name, _ in model.named_modules()] == names


def test_pefts_functions_say_what_to_do_with_our_configs():
    with pytest.raises(TypeError, match=r"got spectral_ops' LoRAConfig, .*LoRAConfig\(\.\.\.\)\.to_peft\(\) makes it"):
        peft.get_peft_model(llama(), lora())


def test_ours_over_pefts_say_how_to_take_those_out(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).get_base_model()
    for bring in (lambda: so.attach(model, lora()), lambda: so.load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=r"model: got one with PEFT's adapter layers .*unload\(\) takes them out"):
            bring()
