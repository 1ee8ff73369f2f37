"""Adapters on stacks of experts between us and PEFT: files both ways, training, the choice of stacks, vLLM's file."""

from __future__ import annotations

import json

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

import torch  # noqa: E402
import transformers  # noqa: E402
from experts_tiny import FAMILIES, INTERFACE, STACKS, mixture  # noqa: E402
from models import adamw, perturb, trained  # noqa: E402
from packaging.version import Version  # noqa: E402
from processes import in_two_processes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import spectral_ops as so  # noqa: E402

pytestmark = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="PEFT's packing of stacks and their nesting changed until 0.21"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(14).reshape(2, 7) * 3 % 64
FIELDS = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": list(STACKS)}
families = pytest.mark.parametrize("family", FAMILIES)


def build(family):
    if family == "nemotron_h":  # no gate, and a default of PEFT's for its attention
        sizes = {
            "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
            "num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 1,
            "moe_shared_expert_intermediate_size": 16, "topk_group": 1, "pad_token_id": 0,
        }  # fmt: skip
        torch.manual_seed(0)
        config = transformers.NemotronHConfig(**sizes, layers_block_type=["attention", "moe"], initializer_range=0.3)
        return transformers.NemotronHForCausalLM(config).eval()
    return mixture(family, "eager" if family in INTERFACE else None).eval()


def output(model):
    with torch.no_grad():
        return model(TOKENS).logits


def ours(family, **fields):
    return perturb(so.attach(build(family), so.LoRAConfig(**{**FIELDS, **fields})), 0.3).eval()


def theirs(family, **fields):
    return perturb(peft.get_peft_model(build(family), peft.LoraConfig(**{**FIELDS, **fields})), 0.3).eval()


def both_ways(family, folder, **fields):
    """Ours read by PEFT and PEFT's read by us: the same outputs, trained parameters and keys. The latter two models."""
    mine, other, frozen = ours(family, **fields), theirs(family, **fields), output(build(family))
    so.save_adapter(mine, folder / "ours")
    other.save_pretrained(folder / "theirs")
    read = peft.PeftModel.from_pretrained(build(family), folder / "ours", is_trainable=True).eval()
    back = so.load_adapter(build(family), folder / "theirs").eval()
    for one, two in ((mine, read), (other, back)):
        assert torch.allclose(output(one), output(two), atol=2e-5)
        assert not torch.allclose(output(one), frozen, atol=1e-2)
        assert sorted(p.numel() for p in trained(one)) == sorted(p.numel() for p in trained(two))
    shapes = [{k: t.shape for k, t in load_file(folder / name / WEIGHTS).items()} for name in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    so.save_adapter(back, folder / "again")
    saved, again = load_file(folder / "theirs" / WEIGHTS), load_file(folder / "again" / WEIGHTS)
    assert all(torch.equal(again[key], tensor) for key, tensor in saved.items())
    return back, other


def three_steps(one, two):
    """Train both alike and compare what they compute after each step."""
    first = output(one)
    optimizers = [adamw(m, 0.02) for m in (one, two)]
    for _ in range(3):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            model.train()
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
        assert torch.allclose(output(one), output(two), atol=3e-4)
    assert not torch.allclose(output(one), first, atol=1e-2)


@families
def test_files_and_training(family, tmp_path):
    three_steps(*both_ways(family, tmp_path))


OTHERS = {
    "up alone": {"target_parameters": ["gate_up_proj"]},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "beside attention": {"target_modules": ["q_proj", "o_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {r".*\.gate_up_proj": 5}, "alpha_pattern": {"down_proj": 11, "layers.0.*": 7}},
    "one layer": {"target_parameters": ["layers.1.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj"]},
    "no zeros": {"init_lora_weights": False},
    "everywhere": {"exclude_modules": ["experts"], "target_modules": ["q_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize(("family", "name"), [*(("gpt_oss", name) for name in OTHERS), ("olmoe", "up alone")])
def test_other_fields(family, name, tmp_path):
    both_ways(family, tmp_path, **OTHERS[name])


@pytest.mark.parametrize(("family", "attention"), [("nemotron_h", 4), ("mixtral", 0), ("qwen3_moe", 0), ("gpt_oss", 0)])
def test_no_target_modules_beside_target_parameters(family, attention, tmp_path):
    """PEFT adds its default for an architecture that it knows, but where it converts old names."""
    up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    mine, _ = both_ways(family, tmp_path, target_modules=None, target_parameters=[f"experts.{up}", "down_proj"])
    assert len([path for path in so.adapter_layers(mine) if "experts" not in path]) == attention


def test_a_second_adapter(tmp_path):
    other = theirs("deepseek_v3")
    other.add_adapter("second", peft.LoraConfig(**{**FIELDS, "r": 2}))
    other.set_adapter("second")
    perturb(other, 0.3).save_pretrained(tmp_path)
    mine = so.load_adapter(build("deepseek_v3"), tmp_path)
    mine = so.load_adapter(mine, tmp_path / "second", "second")
    for name in ("default", "second"):
        so.set_adapter(mine, name)
        other.set_adapter(name)
        assert torch.allclose(output(mine), output(other), atol=2e-5)
    other.disable_adapter_layers()
    with so.disabled(mine):
        assert torch.allclose(output(mine), output(other), atol=2e-5)


def test_a_merged_model_is_pefts(tmp_path):
    mine, other = both_ways("gpt_oss", tmp_path)
    merged = so.detach(so.merge(mine)).state_dict()
    for name, tensor in other.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-6)


def test_pissa_as_plain_lora(tmp_path):
    mine = ours("mixtral", init_lora_weights="pissa", use_rslora=True)
    so.save_adapter(mine, tmp_path)
    read = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()
    assert torch.allclose(output(read), output(mine), atol=5e-5)


def test_dropout_is_left_out_of_what_peft_reads(tmp_path):
    mine = ours("qwen3_moe", lora_dropout=0.1)
    so.save_adapter(mine, tmp_path / "kept", plain=False)
    assert json.loads((tmp_path / "kept" / CONFIG).read_text())["lora_dropout"] == 0.1
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        peft.PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "kept")
    with pytest.warns(UserWarning, match="lora_dropout: 0.1 is written as 0, as PEFT has none on target_parameters"):
        so.save_adapter(mine, tmp_path / "plain")
    read = peft.PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "plain").eval()
    assert torch.allclose(output(read), output(mine), atol=2e-5)
    assert so.adapter_configs(so.load_adapter(build("qwen3_moe"), tmp_path / "kept"))["default"].lora_dropout == 0.1


def test_to_peft():
    made = so.LoRAConfig(**FIELDS).to_peft()
    assert set(made.target_parameters) == set(STACKS) and isinstance(made, peft.LoraConfig)
    perturb(peft.get_peft_model(build("olmoe"), made))
    for fields in ({"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="beside target_parameters for PEFT"):
            so.LoRAConfig(**{**FIELDS, **fields}).to_peft()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_old_names_mean_stacks(family, tmp_path):
    names = ["w1", "w3", "w2"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    mine, other = both_ways(family, tmp_path, target_modules=["q_a_proj", "q_proj", *names], target_parameters=None)
    config = so.adapter_configs(mine)["default"]
    assert set(config.target_parameters) == set(STACKS) == set(other.peft_config["default"].target_parameters)
    assert config.rank_pattern == other.peft_config["default"].rank_pattern == {r".*\.gate_up_proj": 6}
    half, model = [names[0], names[2]], build(family)
    with pytest.raises(ValueError, match="gate_up_proj"):
        theirs(family, target_modules=half, target_parameters=None)
    with pytest.raises(ValueError, match=f"'{names[1]}' too, which gate_up_proj holds as well"):
        so.attach(model, so.LoRAConfig(**{**FIELDS, "target_modules": half, "target_parameters": None}))


def sharded(rank, folder):
    """What two processes compute after two steps, and write, each from its shards."""
    from torch.distributed.fsdp import fully_shard

    model = ours("gpt_oss").train()
    for module in (*model.model.layers, model):
        fully_shard(module)
    optimizer = adamw(model)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    so.save_adapter(model, folder / str(rank))
    return output(model.eval())


@pytest.mark.slow
def test_a_sharded_model(tmp_path):
    (tmp_path / "group").mkdir()
    found, same = in_two_processes(sharded, tmp_path / "group", tmp_path)
    assert torch.equal(found, same) and not torch.allclose(found, output(ours("gpt_oss")), atol=1e-2)
    for rank in "01":
        back = peft.PeftModel.from_pretrained(build("gpt_oss"), tmp_path / rank).eval()
        assert torch.allclose(output(back), found, atol=1e-4)


# --- files that are none ---------------------------------------------------------------------------------------------


def test_damaged_files(tmp_path):
    so.save_adapter(ours("gpt_oss"), tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    up = next(key for key in whole if "base_layer.lora_A" in key)
    down = up.replace("base_layer.", "")
    model, frozen = build("gpt_oss"), output(build("gpt_oss"))
    broken = {
        f"got no {up}": {key: t for key, t in whole.items() if key != up},
        f"got {up} .11, 32., wanted .12, 32.": {**whole, up: whole[up][:-1].clone()},
        f"{down} .12, 32., wanted .12, 24.": {**whole, up: whole[down], down: whole[up]},
        "wanted no tensor that the adapter": {**whole, f"{down}x": whole[down].clone()},
        "values that are not finite": {**whole, up: whole[up] * float("nan")},
    }
    for message, tensors in broken.items():
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            so.load_adapter(model, tmp_path)
    so.save_adapter(ours("gpt_oss"), tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    for change, message in (
        ({"target_parameters": ["down_proj"]}, "wanted no tensor that the adapter|wanted every tensor"),
        ({"target_parameters": ["router.weight"]}, "wanted stacks"),
        ({"r": 2}, "rank and this model's layers"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**fields, **change}))
        with pytest.raises(ValueError, match=message):
            so.load_adapter(model, tmp_path)
    assert torch.equal(output(model), frozen) and not so.adapter_configs(model)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
def test_stacks_that_older_versions_packed_otherwise(version, tmp_path):
    theirs("olmoe").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    for written in (version, "0.19.1", "0.22.0.dev0@x"):
        (tmp_path / CONFIG).write_text(json.dumps({**fields, "peft_version": written}))
        if written != version:
            so.load_adapter(build("olmoe"), tmp_path)
            continue
        with pytest.raises(ValueError, match=f"as PEFT {version or '0.17'} packs them, wanted a file of 0.19.1"):
            so.load_adapter(build("olmoe"), tmp_path)


def test_another_base_is_noticed(tmp_path):
    so.save_adapter(ours("olmoe", init_lora_weights="pissa"), tmp_path)
    so.load_adapter(build("olmoe"), tmp_path)
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj *= 1.5
    with pytest.raises(ValueError, match="has other base weights than the adapter was trained on"):
        so.load_adapter(model, tmp_path)
    so.load_adapter(model, tmp_path, check_base=False)


# --- vLLM ------------------------------------------------------------------------------------------------------------


def updates(folder):
    """ΔW [out, in] of every layer in a file of linear pairs: what a server that knows one scale adds."""
    fields, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert not fields["use_rslora"] and not fields["rank_pattern"] and not fields["alpha_pattern"]
    ends = ".lora_A.weight"
    pairs = {
        key.removesuffix(ends): (tensors[key], tensors[key.replace("_A.", "_B.")]) for key in tensors if ends in key
    }
    assert len(tensors) == 2 * len(pairs) and {A.shape[0] for A, _ in pairs.values()} == {fields["r"]}
    scale = fields["lora_alpha"] / fields["r"]
    return {path.removeprefix("base_model.model."): scale * B @ A for path, (A, B) in pairs.items()}


def each_linear(model, family):
    """The weight [out, in] of every linear layer that an expert is, under its checkpoint's name."""
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] != "experts":
            continue
        up, down = module.gate_up_proj, module.down_proj
        if family in ("gpt_oss", "llama4"):  # stored [in, out]
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        half = up.shape[1] // 2
        gate, up = (up[:, ::2], up[:, 1::2]) if family == "gpt_oss" else (up[:, :half], up[:, half:])
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        path = path.replace("mlp", "block_sparse_moe") if family == "mixtral" else path
        for name, stack in zip(names, (gate, up, down), strict=True):
            found |= {f"{path}.{e}.{name}": weight for e, weight in enumerate(stack)}
    return found


@families
def test_every_expert_of_vllms_file_is_that_of_the_merged_model(family, tmp_path):
    fields = {"rank_pattern": {r".*\.gate_up_proj": 2}, "use_rslora": True, "target_modules": ["o_proj"]}
    mine = ours(family, **fields)
    so.export_adapter(mine, tmp_path)
    found, before = updates(tmp_path), each_linear(build(family), family)
    attention = {path: layer.delta_weight() for path, layer in so.adapter_layers(mine).items() if "o_proj" in path}
    after = each_linear(so.detach(so.merge(mine)), family)
    assert set(found) == {*before, *attention} and len(attention) == 2
    for path, weight in after.items():
        assert torch.allclose(weight - before[path], found[path], atol=2e-6)
        assert found[path].abs().max() > 0.05
    for path, delta in attention.items():
        assert torch.allclose(found[path], delta, atol=2e-6)


def test_one_stack_and_pissa_in_vllms_file(tmp_path):
    mine = ours("qwen3_moe", target_parameters=["down_proj"], init_lora_weights="pissa")
    so.export_adapter(mine, tmp_path)
    found, before = updates(tmp_path), each_linear(build("qwen3_moe"), "qwen3_moe")
    after = each_linear(so.detach(so.merge(mine)), "qwen3_moe")
    assert set(found) == set(before)
    for path, weight in after.items():
        assert torch.allclose(weight - before[path], found[path], atol=1e-5)
        assert bool(found[path].any()) is path.endswith("down_proj")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_peft_reads_vllms_file_as_one_from_before_transformers_5(family, tmp_path):
    mine = ours(family)
    so.export_adapter(mine, tmp_path)
    read = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.allclose(output(read), output(mine), atol=2e-5)


def test_what_is_not_exported(tmp_path):
    mine = ours("olmoe")
    with pytest.raises(ValueError, match="layout: got 'gguf', wanted one of 'vllm'"):
        so.export_adapter(mine, tmp_path, layout="gguf")
    with pytest.raises(ValueError, match="adapter_name: got 'x', wanted one of"):
        so.export_adapter(mine, tmp_path, "x")
    with pytest.raises(ValueError, match="which trains .*lm_head.weight too, wanted pairs alone"):
        so.export_adapter(ours("olmoe", modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(TypeError, match="a BoneConfig, wanted a LoRAConfig"):
        so.export_adapter(so.attach(build("olmoe"), so.BoneConfig(r=4, target_modules=["q_proj"])), tmp_path)
    assert not list(tmp_path.iterdir())
