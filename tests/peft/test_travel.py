"""What travels beside an adapter's matrices: heads, tied and resized embeddings, trained rows, fields of the config."""

from __future__ import annotations

import json
import warnings

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import safetensors.torch as safetensors  # noqa: E402
import torch  # noqa: E402
from models import perturb  # noqa: E402
from packaging.version import Version  # noqa: E402

import spectral_ops as so  # noqa: E402
from spectral_ops.adapters.choice.architectures import OTHERWISE, TARGETS  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD = Version(peft.__version__) < Version("0.21")
tying = pytest.mark.skipif(OLD, reason="PEFT's own ensure_weight_tying is not right before 0.21")
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied=True, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=tied, initializer_range=0.1)
    return transformers.LlamaForCausalLM(config).eval()


def roberta(kind):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, num_labels=2, max_position_embeddings=40, initializer_range=0.1)
    return getattr(transformers, f"RobertaFor{kind}")(config).eval()


def tokens():
    return torch.arange(12).reshape(2, 6) + 3


def output(model):
    with torch.no_grad():
        return model(tokens())[0]


def trained(model):
    """Names of trained parameters, in PEFT's spelling without its prefix and without adapter names."""
    found = set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", ".copies.default")
            name = name.replace("bone_block", "miss_block").replace("token_adapter.trainable_tokens_delta", "rows")
            found.add(name.removesuffix(".default.weight").removesuffix(".default"))
    return found


def keys(folder):
    return set(safetensors.load_file(folder / WEIGHTS))


def both_ways(build, ours, theirs, tmp_path, same_keys=True):
    """Train ours and PEFT's, save each, load it by the other: the same outputs, the same trained parameters."""
    mine = perturb(so.attach(build(), ours), 0.1).eval()
    so.save_adapter(mine, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "ours", is_trainable=True).eval()
    assert torch.allclose(output(loaded), output(mine), atol=2e-5)
    assert not torch.allclose(output(build()), output(mine), atol=1e-2)
    assert trained(loaded) == trained(mine)

    other = perturb(peft.get_peft_model(build(), theirs), 0.1).eval()
    other.save_pretrained(tmp_path / "theirs")
    back = so.load_adapter(build(), tmp_path / "theirs").eval()
    assert torch.allclose(output(back), output(other), atol=2e-5)
    assert not torch.allclose(output(build()), output(other), atol=1e-2)
    assert trained(back) == trained(other) == trained(mine)
    if same_keys:
        assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    return mine, other


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("SEQ_CLS", "SequenceClassification"),
        ("TOKEN_CLS", "TokenClassification"),
        ("QUESTION_ANS", "QuestionAnswering"),
    ],
)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_the_head_of_a_task_trains_and_travels(task, kind, targets, tmp_path):
    def build():
        return roberta(kind)

    if targets == "all-linear" and task != "SEQ_CLS":  # where PEFT adapts the head and then fails to copy it
        mine = so.attach(build(), so.LoRAConfig(r=2, task_type=task, target_modules=targets))
        assert any("copies" in name for name in trained(mine)) and len(so.adapter_layers(mine)) == 12
        return
    fields = {"r": 2, "task_type": task, "target_modules": targets}
    mine, _ = both_ways(build, so.LoRAConfig(**fields), peft.LoraConfig(**fields), tmp_path)
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    assert any(name.startswith(f"{head}.copies") for name in trained(mine))
    saved = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert saved["task_type"] == task and head in saved["modules_to_save"]


def test_a_task_type_of_pefts_enumeration():
    config = so.LoRAConfig(task_type=peft.TaskType.SEQ_CLS)
    assert config.task_type == "SEQ_CLS" and type(config.task_type) is str
    with pytest.raises(ValueError, match=r"LoRAConfig\.task_type: got 'CHAT', wanted None or one of 'SEQ_CLS'"):
        so.LoRAConfig(task_type="CHAT")
    assert set(so.adapters.config.TASKS) == {task.value for task in peft.TaskType}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_a_head(bias, tmp_path):
    if bias == "lora_only" and OLD:
        pytest.skip("this PEFT leaves these biases out of its file: see test_biases_that_peft_did_not_write")
    fields = {"r": 2, "task_type": "SEQ_CLS", "bias": bias}
    build = lambda: roberta("SequenceClassification")  # noqa: E731
    both_ways(build, so.LoRAConfig(**fields), peft.LoraConfig(**fields), tmp_path, same_keys=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [[3, 7, 11], {"embed_tokens": [4, 5]}, {"embed_tokens": [4], "lm_head": [6, 9]}])
def test_trainable_tokens(tied, rows, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": rows}
    if not tied and "lm_head" in rows:
        with pytest.raises((TypeError, ValueError), match="trainable_token_indices|nn.Embedding"):
            so.attach(llama(tied), so.LoRAConfig(**fields))
        return
    if tied and "lm_head" in rows:
        with pytest.raises(ValueError, match="trainable_token_indices"):
            so.attach(llama(tied), so.LoRAConfig(**fields))
        return
    mine, _ = both_ways(lambda: llama(tied), so.LoRAConfig(**fields), peft.LoraConfig(**fields), tmp_path)
    before = output(mine)
    assert torch.allclose(output(so.merge(mine)), before, atol=1e-5)
    assert torch.allclose(output(so.unmerge(mine)), before, atol=1e-5)
    with so.disabled(mine):
        assert torch.allclose(output(mine), output(llama(tied)), atol=1e-6)


def test_trainable_tokens_of_embeddings_tied_to_another(tmp_path):
    """T5 looks tokens up in two stacks, and multiplies by the same weight at its head."""

    def build():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
            tie_word_embeddings=True, initializer_factor=0.5, decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()

    def logits(model):
        with torch.no_grad():
            return model(input_ids=tokens(), decoder_input_ids=tokens()).logits

    fields = {"r": 2, "trainable_token_indices": [3, 5, 9]}
    mine = perturb(so.attach(build(), so.LoRAConfig(**fields)), 0.3).eval()
    so.save_adapter(mine, tmp_path / "ours")
    theirs = perturb(peft.get_peft_model(build(), peft.LoraConfig(**fields)), 0.3).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert trained(mine) == trained(theirs) and keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    for folder, model in (("ours", mine), ("theirs", theirs)):
        want = logits(model)
        assert torch.allclose(logits(so.load_adapter(build(), tmp_path / folder).eval()), want, atol=2e-5)
        assert torch.allclose(
            logits(peft.PeftModel.from_pretrained(build(), tmp_path / folder).eval()), want, atol=2e-5
        )
        assert not torch.allclose(logits(build()), want, atol=1e-2)
    before = logits(mine)
    assert torch.allclose(logits(so.merge(mine)), before, atol=1e-5)


def test_trainable_tokens_that_match_nothing():
    config = so.LoRAConfig(target_modules=["q_proj"], trainable_token_indices={"wte": [1]})
    with pytest.raises(ValueError, match="trainable_token_indices: got .*'wte' matches nothing"):
        so.attach(llama(), config)
    for wrong in ([], [1, 1], [-1], [True], {"embed_tokens": []}, {3: [1]}, "3"):
        with pytest.raises(ValueError, match="trainable_token_indices: got"):
            so.LoRAConfig(trainable_token_indices=wrong)
    with pytest.raises(ValueError, match="trainable_token_indices: got .* wanted one or the other"):
        so.attach(
            llama(),
            so.LoRAConfig(target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
        )


@tying
@pytest.mark.parametrize("ensure", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_trained_whole(ensure, saved, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": ensure}
    ours, theirs = (kind(**fields, modules_to_save=list(saved)) for kind in (so.LoRAConfig, peft.LoraConfig))
    mine, _ = both_ways(llama, ours, theirs, tmp_path, same_keys=ensure or saved != ["lm_head"])
    if ensure:
        copies = [unit.copies["default"].weight for unit in (mine.model.embed_tokens, mine.lm_head)]
        assert copies[0] is copies[1]


@tying
@pytest.mark.parametrize("ensure", [True, False])
def test_warnings_about_tied_weights_are_pefts(ensure):
    def warned(run):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        return bool(
            [w for w in caught if "tied" in str(w.message) or "ties" in str(w.message) or "tying" in str(w.message)]
        )

    for tied in (True, False):
        for fields in (
            {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        ):  # fmt: skip
            if ensure and "lm_head" in fields["target_modules"] and tied:
                continue  # PEFT ties an adapter of the embedding to it; there is none here
            fields = {"r": 2, "ensure_weight_tying": ensure, **fields}
            theirs = warned(lambda: peft.get_peft_model(llama(tied), peft.LoraConfig(**fields)))  # noqa: B023
            ours = warned(lambda: so.attach(llama(tied), so.LoRAConfig(**fields)))  # noqa: B023
            assert ours == theirs, (tied, fields)
    if ensure:
        with pytest.raises(ValueError, match="ensure_weight_tying: got True, wanted False where target_modules adapts"):
            so.attach(llama(), so.LoRAConfig(target_modules=["lm_head"], ensure_weight_tying=True))


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_resized_embeddings_of_a_repository_travel(tmp_path, monkeypatch):
    """The base came from the hub: what it was is in that cache, under the commit that was loaded."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    llama().save_pretrained(tmp_path / "hub" / "models--some--model" / "snapshots" / "c0ffee")

    def model(size, commit="c0ffee"):
        model = llama()
        model.config._name_or_path, model.config._commit_hash = "some/model", commit
        model.resize_token_embeddings(size, mean_resizing=False)
        return so.attach(model, so.LoRAConfig(r=2, target_modules=["q_proj"]))

    def travels(folder, *args):
        so.save_adapter(model(*args), tmp_path / folder)
        return any("embed_tokens" in key for key in keys(tmp_path / folder))

    assert travels("resized", 53) and not travels("as it was", 50) and not travels("not in the cache", 53, "beef")


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_travel(tied, tmp_path):
    llama(tied).save_pretrained(tmp_path / "base")

    def resized():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(2)
        model.resize_token_embeddings(53, mean_resizing=False)
        return model

    def blank():
        model = resized()
        with torch.no_grad():
            model.get_input_embeddings().weight[50:] = 0
            model.get_output_embeddings().weight[50:] = 0
        return model

    ids = torch.tensor([[50, 3, 51, 52]])
    mine = perturb(so.attach(resized(), so.LoRAConfig(r=2, target_modules=["q_proj"])), 0.1).eval()
    so.save_adapter(mine, tmp_path / "ours")
    theirs = perturb(peft.get_peft_model(resized(), peft.LoraConfig(r=2, target_modules=["q_proj"])), 0.1).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    assert any("embed_tokens" in key for key in keys(tmp_path / "ours"))
    for folder, model in (("ours", mine), ("theirs", theirs)):
        want = model(ids).logits
        assert torch.allclose(so.load_adapter(blank(), tmp_path / folder)(ids).logits, want, atol=2e-5)
        again = peft.PeftModel.from_pretrained(blank(), tmp_path / folder).eval()
        assert torch.allclose(again(ids).logits, want, atol=2e-5)
        small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        before = {name: p.clone() for name, p in small.named_parameters()}
        with pytest.raises(
            ValueError, match=r"embed_tokens.weight \[53, 32\], wanted \[50, 32\].*resize_token_embeddings\(53\)"
        ):
            so.load_adapter(small, tmp_path / folder)
        assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    so.save_adapter(mine, tmp_path / "without", save_embedding_layers=False)
    assert not any("embed" in key or "lm_head" in key for key in keys(tmp_path / "without"))
    with pytest.raises(ValueError, match='save_embedding_layers: got "?.?maybe'):
        so.save_adapter(mine, tmp_path / "wrong", save_embedding_layers="maybe")


@pytest.mark.parametrize("save", ["auto", True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ".*(lm_head|v_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=str,
)  # fmt: skip
def test_save_embedding_layers(save, fields, tmp_path):
    base = llama(tied=False)
    mine = perturb(so.attach(base, so.LoRAConfig(r=2, **fields)), 0.1).eval()
    so.save_adapter(mine, tmp_path / "ours", save_embedding_layers=save)
    theirs = perturb(peft.get_peft_model(llama(tied=False), peft.LoraConfig(r=2, **fields)), 0.1).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save)
    twins = {key for key in keys(tmp_path / "theirs") if ".modules_to_save." in key or "tokens_original" in key}
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs") - twins
    for folder, model in (("ours", mine), ("theirs", theirs)):
        assert torch.allclose(output(so.load_adapter(llama(tied=False), tmp_path / folder)), output(model), atol=2e-5)


# --- fields ----------------------------------------------------------------------------------------------------------


def test_the_architectures_that_peft_knows():
    for kind in ("LORA", "MISS", "ADALORA", "VERA"):
        table = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING")
        ours = {**TARGETS, **OTHERWISE.get(kind, {})}
        missing = {name for name in table if ours.get(name) != table[name]}
        assert not missing, kind  # an older PEFT may know fewer


def write(folder, fields, tensors):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(fields))
    safetensors.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def qwen():
    torch.manual_seed(1)
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, initializer_range=0.1)
    return transformers.Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize(("bat", "bias"), [(False, "none"), (True, "none"), (False, "Bone_only")])
def test_files_of_pefts_bone(bat, bias, tmp_path):
    if bias != "none" and OLD:
        pytest.skip("this PEFT leaves these biases out of its file: see test_biases_that_peft_did_not_write")
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"], "init_weights": "bat" if bat else True}
    if hasattr(peft, "BoneConfig"):  # before version 0.19
        theirs = perturb(peft.get_peft_model(qwen(), peft.BoneConfig(**fields, bias=bias)), 0.1).eval()
        theirs.save_pretrained(tmp_path / "bone")
    else:  # the same numbers under the names of then
        config = peft.MissConfig(**fields, bias=bias.replace("Bone", "MiSS"))
        theirs = perturb(peft.get_peft_model(qwen(), config), 0.1).eval()
        theirs.save_pretrained(tmp_path / "miss")
        saved = json.loads((tmp_path / "miss" / CONFIG).read_text())
        for name in ("mini_r", "miss_dropout", "peft_version"):
            del saved[name]
        tensors = safetensors.load_file(tmp_path / "miss" / WEIGHTS)
        tensors = {key.replace("miss_block", "bone_block"): tensor for key, tensor in tensors.items()}
        write(tmp_path / "bone", {**saved, "peft_type": "BONE", "bias": bias}, tensors)
    ours = so.load_adapter(qwen(), tmp_path / "bone")
    assert torch.allclose(output(ours), output(theirs), atol=2e-5)
    assert trained(ours) == trained(theirs)


def test_biases_that_peft_did_not_write(tmp_path):
    """PEFT 0.18 leaves the biases of "lora_only" out of the file."""
    mine = so.attach(roberta("SequenceClassification"), so.LoRAConfig(r=2, bias="lora_only"))
    so.save_adapter(perturb(mine), tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    biases = [key for key in tensors if key.endswith("base_layer.bias")]
    safetensors.save_file({key: t for key, t in tensors.items() if key not in biases}, tmp_path / WEIGHTS)
    fresh = roberta("SequenceClassification")
    with pytest.warns(UserWarning, match="no biases, though bias='lora_only' trains them"):
        so.load_adapter(fresh, tmp_path)
    want = roberta("SequenceClassification").state_dict()
    for path, layer in so.adapter_layers(fresh).items():
        assert torch.equal(layer.bias, want[f"{path}.bias"])
    safetensors.save_file({key: t for key, t in tensors.items() if key != biases[0]}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"got no {biases[0]}"):
        so.load_adapter(roberta("SequenceClassification"), tmp_path)


def test_unknown_fields_are_left_out_with_a_warning(tmp_path):
    so.save_adapter(so.attach(llama(), so.LoRAConfig(r=2)), tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "lora_of_the_future": 3, "and_off": None}))
    with pytest.warns(UserWarning, match=r"left out \{'lora_of_the_future': 3\}, which no LoRAConfig has"):
        so.load_adapter(llama(), tmp_path)
    for name, what in so.LoRAConfig.peft_refused.items():
        (tmp_path / CONFIG).write_text(json.dumps({**fields, name: {"x": 1}}))
        with pytest.raises(ValueError, match=f"got {name}=.*which {what}, wanted it off"):
            so.load_adapter(llama(), tmp_path)


def test_values_that_are_not_finite(tmp_path):
    model = so.attach(llama(), so.LoRAConfig(r=2))
    with torch.no_grad():
        next(iter(so.adapter_layers(model).values())).lora_A["default"][0, 0] = float("nan")
    so.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="lora_A.weight with values that are not finite, wanted finite ones"):
        so.load_adapter(llama(), tmp_path)


def test_a_layer_under_two_parents(tmp_path):
    def build():
        torch.manual_seed(0)
        shared = torch.nn.Linear(8, 8)
        return torch.nn.Sequential(shared, torch.nn.GELU(), shared)

    x = torch.randn(3, 8)
    theirs = perturb(peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules="all-linear")), 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="the layer '0' is also '2', and PEFT adapts only the first of these"):
        so.load_adapter(build(), tmp_path / "theirs")
    mine = perturb(so.attach(build(), so.LoRAConfig(r=2, target_modules="all-linear")), 0.3)
    with pytest.warns(UserWarning, match="will not compute the same from this file"):
        so.save_adapter(mine, tmp_path / "ours")
    assert torch.equal(so.load_adapter(build(), tmp_path / "ours")(x), mine(x))
    assert not torch.allclose(theirs(x), build()(x))


# --- experts ---------------------------------------------------------------------------------------------------------


def mixture(kind="Qwen3Moe"):
    torch.manual_seed(0)
    more = {"Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0], "head_dim": 16},
            "Mixtral": {"num_local_experts": 4}}[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **more, num_key_value_heads=2, num_experts_per_tok=2, initializer_range=0.1
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_all_linear_names_the_experts_that_pefts_includes(kind, tmp_path):
    with pytest.warns(
        UserWarning,
        match=r'"all-linear" means the experts too in PEFT \(model\.layers\.[01]\.mlp\.experts.*target_parameters',
    ):
        mine = so.attach(mixture(kind), so.LoRAConfig(r=2, target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path in so.adapter_layers(mine)} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not [path for path in so.adapter_layers(mine) if path.endswith(("gate_proj", "up_proj", "down_proj"))]
    so.save_adapter(perturb(mine, 0.1), tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixture(kind), tmp_path).eval()
    assert torch.allclose(output(theirs), output(mine.eval()), atol=2e-5)


def test_names_that_mean_experts_to_peft():
    with pytest.raises(ValueError, match=r"mlp.gate' \(Qwen3MoeTopKRouter\), wanted linear layers only"):
        so.attach(mixture(), so.LoRAConfig(r=2, target_modules=["q_proj", "gate"]))
    with pytest.raises(ValueError, match="'up_proj' too, which gate_up_proj holds as well"):
        so.attach(mixture(), so.LoRAConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    with pytest.raises(ValueError, match="'down_proj' means the experts"):  # PEFT's DoRA refuses parameters
        so.attach(mixture(), so.DoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj' means the experts"):
        so.attach(mixture(), so.LoRAConfig(r=2, target_modules=r".*mlp\.up_proj"))
    so.attach(mixture(), so.BoneConfig(r=4, target_modules=["gate_proj"]))  # only PEFT's LoRA renames them


@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_tokens_and_tying_under_other_methods(method, tmp_path):
    ours, theirs = {
        "dora": (so.DoRAConfig, lambda **f: peft.LoraConfig(use_dora=True, **f)),
        "adalora": (so.AdaLoRAConfig, peft.AdaLoraConfig),
    }[method]
    size = {"init_r": 3, "target_r": 2, "total_step": 9} if method == "adalora" else {"r": 2}
    both_ways(
        llama, ours(**size, target_modules=["q_proj"], trainable_token_indices=[3, 7]),
        theirs(**size, target_modules=["q_proj"], trainable_token_indices=[3, 7]), tmp_path / "tokens",
    )  # fmt: skip
    if not OLD:
        fields = {**size, "target_modules": ["q_proj"], "ensure_weight_tying": True}
        both_ways(
            llama, ours(**fields, modules_to_save=["embed_tokens"]), theirs(**fields, modules_to_save=["embed_tokens"]),
            tmp_path / "tied",
        )  # fmt: skip


def test_a_file_of_pefts_with_layers_that_are_never_called(tmp_path):
    """PEFT adapts the output layer of torch's attention, which reads that weight: without effect."""

    def build():
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2), "up": torch.nn.Linear(8, 8)})

    x = torch.randn(3, 1, 8)
    theirs = perturb(peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["out_proj", "up"])), 0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'attention.out_proj' is left out, as .*MultiheadAttention.*computes with"):
        ours = so.load_adapter(build(), tmp_path)
    assert list(so.adapter_layers(ours)) == ["up"]
    inner = theirs.base_model.model
    assert torch.allclose(ours["up"](x), inner["up"](x), atol=1e-6)
    assert torch.allclose(ours["attention"](x, x, x)[0], inner["attention"](x, x, x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="got 'attention.out_proj', wanted layers that are called"):
        so.attach(build(), so.LoRAConfig(r=2, target_modules=["out_proj", "up"]))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_pefts_auto_classes_find_the_base_model(task, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    mine = perturb(so.attach(base, so.LoRAConfig(r=2, task_type=task)), 0.1)
    so.save_adapter(mine, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    if task is None:
        assert saved["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    auto = peft.AutoPeftModel if task is None else peft.AutoPeftModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(output(theirs), output(mine), atol=2e-5)
