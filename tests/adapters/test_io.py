"""Adapter files: our own round trip, PEFT reading ours, us reading PEFT's, and every kind of damage."""

import importlib
import json
import struct

import pytest
import torch
from torch import nn

import spectral_ops as so
from spectral_ops import (
    BatConfig,
    BoneConfig,
    DoRAConfig,
    DVoRAConfig,
    LoRAConfig,
    LoRADashConfig,
    PiCaConfig,
    RoSAConfig,
    SpectralConfig,
    SVFTConfig,
    VeRAConfig,
)
from spectral_ops.init import topk_pattern

safetensors_torch = pytest.importorskip("safetensors.torch")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIGS = {
    "lora": LoRAConfig(r=5, lora_alpha=8, target_modules="all-linear"),
    "rslora": LoRAConfig(r=5, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "pissa": LoRAConfig(r=5, lora_alpha=8, init_lora_weights="pissa", target_modules="all-linear"),
    "pissa_rslora": LoRAConfig(
        r=5, lora_alpha=8, init_lora_weights="pissa", use_rslora=True, target_modules=["v_proj"]
    ),
    "pissa_niter": LoRAConfig(r=5, lora_alpha=8, init_lora_weights="pissa_niter_2", target_modules=["o_proj"]),
    "milora": LoRAConfig(r=5, lora_alpha=8, init_lora_weights="milora", target_modules=r".*\.mlp\..*_proj"),
    "dora": DoRAConfig(r=5, lora_alpha=8, target_modules="all-linear"),
    "dora_pissa": DoRAConfig(r=5, lora_alpha=8, init_lora_weights="pissa", target_modules=["k_proj", "up_proj"]),
    "patterns": LoRAConfig(
        r=5, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 20}
    ),
    "pissa_patterns": LoRAConfig(
        r=5, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa", rank_pattern={"q_proj": 3},
        alpha_pattern={"k_proj": 20},
    ),
    "miss": BoneConfig(r=5, target_modules="all-linear"),
    "miss_mini": BoneConfig(r=5, init_weights="mini", mini_r=8, target_modules=["q_proj", "gate_proj"]),
    "bat": BatConfig(r=8, target_modules="all-linear"),
    "bat_exact": BatConfig(r=4, exact=True, target_modules=["o_proj", "down_proj"]),
    "bat_row": BatConfig(r=8, mode="row", target_modules=["q_proj", "gate_proj"]),
    "rosa": RoSAConfig(r=4, d=0.05, density_pattern={"q_proj": 0.1}, target_modules="all-linear"),
    "rosa_spa": RoSAConfig(d=0.05, schedule="spa_only", target_modules=["q_proj", "down_proj"]),
    "rosa_lora": RoSAConfig(r=4, schedule="lora_only", target_modules=["o_proj"]),
    "dash": LoRADashConfig(r=4, directions=3, rank_pattern={"q_proj": 3}, target_modules="all-linear"),
    "pica": PiCaConfig(r=4, rank_pattern={"q_proj": 3}, target_modules="all-linear"),
    "pica_output": PiCaConfig(r=4, side="output", target_modules=["q_proj", "down_proj"]),
    "spectral": SpectralConfig(r=3, start=2, target_modules="all-linear"),
    "svft": SVFTConfig(off_diag=1, target_modules=["q_proj", "down_proj"]),
    "spectral_residual": SpectralConfig(r=3, residual=True, target_modules=["q_proj", "down_proj"]),
    "spectral_rotation": SpectralConfig(r=5, mode="rotation", target_modules=["o_proj", "gate_proj"]),
    "vera": VeRAConfig(r=40, target_modules="all-linear"),
    "vera_unsaved": VeRAConfig(
        r=40, save_projection=False, projection_prng_key=7, target_modules=["q_proj", "down_proj"]
    ),
    "dvora": DVoRAConfig(r=40, target_modules="all-linear"),
    "magnitude_only": DoRAConfig(r=2, target_modules=["q_proj", "up_proj"], magnitude_only=["up_proj"]),
    "layers": LoRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], exclude_modules=["k_proj"]),
}  # fmt: skip
methods = pytest.mark.parametrize("method", CONFIGS)


def adapted(tiny, method, **llama):
    """A Llama with a trained adapter: its base weights kept beside it, and its logits."""
    model = so.attach(tiny.llama(**llama), CONFIGS[method])
    for layer in so.adapter_layers(model).values():
        if "dash_steps" in layer.held("default"):
            layer.launch()
        if "rosa_values" in layer.held("default"):
            places = torch.rand(layer.out_features, layer.in_features)
            layer.set_mask(topk_pattern(places, layer.rosa_values["default"].numel()))
    return tiny.perturb(model, 0.05)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


NONE_OF_PEFTS = ("bat_row", "rosa", "pica", "spectral", "svft", "dash", "dvora")
OURS = {name for name in CONFIGS if name.startswith(NONE_OF_PEFTS)}


@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in OURS])
def test_peft_reads_ours(tiny, method, tmp_path):
    import peft

    ours, ids = adapted(tiny, method).eval(), tiny.tokens()
    so.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    want = ours(ids).logits
    assert torch.allclose(theirs(ids).logits, want, atol=2e-5)
    assert not torch.allclose(tiny.llama()(ids).logits, want, atol=1e-3)  # the adapter does something
    loaded = theirs.load_adapter(tmp_path, "again")
    assert not loaded.missing_keys or not [k for k in loaded.missing_keys if "again" in k]
    assert not loaded.unexpected_keys


@pytest.mark.parametrize(
    ("method", "plain"), [(m, p) for m, c in CONFIGS.items() for p in (True, False) if p or c.changes_base]
)
def test_our_own_round_trip(tiny, method, plain, tmp_path):
    ours, ids = adapted(tiny, method), tiny.tokens()
    so.save_adapter(ours, tmp_path / "a", plain=plain)
    again = so.load_adapter(tiny.llama(), tmp_path / "a")
    assert torch.allclose(again(ids).logits, ours(ids).logits, atol=2e-5)
    with so.disabled(again):
        assert torch.allclose(again(ids).logits, tiny.llama()(ids).logits, atol=2e-5)
    if not plain or not CONFIGS[method].changes_base:
        assert trained_names(again) == trained_names(ours)
        assert all(
            torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters(), strict=True) if q.requires_grad
        )
        so.save_adapter(again, tmp_path / "b", plain=plain)
        first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in "ab")
        assert len(first) == len(second)
    assert not list((tmp_path / "a").glob("*.part*"))


@pytest.mark.parametrize("method", sorted(OURS))
def test_peft_refuses_what_it_does_not_have(tiny, method, tmp_path):
    import peft

    so.save_adapter(adapted(tiny, method), tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


PEFTS = ["lora", "rslora", "pissa", "dora", "miss", "miss_mini", "miss_bat"]


@pytest.mark.parametrize(
    ("method", "bias"), [(m, "none") for m in PEFTS] + [(m, b) for m in ("lora", "miss") for b in ("all", "only")]
)
def test_we_read_pefts(tiny, method, bias, tmp_path):
    choice = ("MiSS_only" if method.startswith("miss") else "lora_only") if bias == "only" else bias
    import peft

    torch.manual_seed(1)
    base = tiny.llama(bias=bias != "none")
    theirs = peft.get_peft_model(base, tiny.config(method, bias=choice, target_modules=["q_proj", "up_proj"]))
    tiny.perturb(theirs, 0.05).eval().save_pretrained(tmp_path)
    ids = tiny.tokens()
    ours = so.load_adapter(tiny.llama(bias=bias != "none"), tmp_path).eval()
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=2e-5)
    expected = {
        n.removeprefix("base_model.model.").replace(".default.weight", ".default") for n in trained_names(theirs)
    }
    assert trained_names(ours) == expected
    frozen = so.load_adapter(tiny.llama(bias=bias != "none"), tmp_path, trainable=False)
    assert not trained_names(frozen)


def test_we_read_pefts_converted_pissa(tiny, tmp_path):
    import peft

    ids = tiny.tokens()
    theirs = peft.get_peft_model(tiny.llama(), tiny.config("pissa", target_modules="all-linear"))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    tiny.perturb(theirs, 0.05)
    theirs.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = so.load_adapter(tiny.llama(), tmp_path / "done")
    assert so.adapter_configs(ours)["default"].r == 10
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=2e-5)


@pytest.mark.parametrize("direction", ["ours", "theirs"])
def test_gpt2_and_modules_to_save(tiny, direction, tmp_path):
    import peft

    ids = tiny.tokens()
    fields = {"r": 3, "target_modules": ["c_attn", "c_proj"], "modules_to_save": ["ln_f"]}
    if direction == "ours":
        ours = tiny.perturb(so.attach(tiny.gpt2(), DoRAConfig(**fields)), 0.05).eval()
        so.save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path).eval()
    else:
        config = peft.LoraConfig(use_dora=True, fan_in_fan_out=True, **fields)
        theirs = tiny.perturb(peft.get_peft_model(tiny.gpt2(), config), 0.05).eval()
        theirs.save_pretrained(tmp_path)
        ours = so.load_adapter(tiny.gpt2(), tmp_path).eval()
    want = ours(ids).logits
    assert torch.allclose(theirs(ids).logits, want, atol=2e-5)
    assert not torch.allclose(tiny.gpt2().eval()(ids).logits, want, atol=1e-3)


def test_narrow_models(tiny, tmp_path):
    ours, ids = adapted(tiny, "pissa", dtype=torch.bfloat16), tiny.tokens()
    so.save_adapter(ours, tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):  # the same base in another dtype is no wrong base
        again = so.load_adapter(tiny.llama(torch.bfloat16).to(dtype), tmp_path)
        assert (again(ids).logits.float() - ours(ids).logits.float()).norm() < 0.05 * ours(ids).logits.float().norm()
    assert so.adapter_layers(again)["model.layers.0.self_attn.q_proj"].lora_A["default"].dtype == torch.float32


def test_a_second_adapter_is_loaded_beside_the_first(tiny, tmp_path):
    first, ids = adapted(tiny, "lora"), tiny.tokens()
    so.save_adapter(first, tmp_path)
    both = so.load_adapter(adapted(tiny, "rslora"), tmp_path, "loaded")
    assert torch.allclose(both(ids).logits, first(ids).logits, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_name: got 'loaded'"):
        so.load_adapter(both, tmp_path, "loaded")
    so.save_adapter(both, tmp_path / "other", "default")
    assert json.loads((tmp_path / "other" / CONFIG).read_text())["use_rslora"]
    with pytest.raises(ValueError, match=r"adapter_name: got 'none', wanted one of \['default', 'loaded'\]"):
        so.save_adapter(both, tmp_path / "none", "none")
    with pytest.raises(ValueError, match=r"wanted one of \[\]"):
        so.save_adapter(tiny.llama(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_saving_a_merged_model_saves_the_adapter(tiny, tmp_path):
    ours, ids = adapted(tiny, "dora_pissa"), tiny.tokens()
    want = ours(ids).logits
    so.merge(ours)
    so.save_adapter(ours, tmp_path)
    assert torch.allclose(so.load_adapter(tiny.llama(), tmp_path)(ids).logits, want, atol=2e-5)


# --- damage ----------------------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))


@pytest.fixture
def saved(tmp_path):
    config = LoRAConfig(r=3, target_modules=["0", "2"], bias="lora_only", modules_to_save=None)
    so.save_adapter(so.attach(model(), config), tmp_path)
    return tmp_path


def edit_config(path, **fields):
    content = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**content, **fields}))


def edit_tensors(path, change):
    tensors = safetensors_torch.load_file(path / WEIGHTS)
    change(tensors)
    safetensors_torch.save_file(tensors, path / WEIGHTS)


def cut(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def future(path):
    tensors = safetensors_torch.load_file(path / WEIGHTS)
    safetensors_torch.save_file(tensors, path / WEIGHTS, {"spectral_ops": json.dumps({"format": 99})})


A0, B2 = "base_model.model.0.lora_A.weight", "base_model.model.2.lora_B.weight"
DAMAGE = {
    "no directory": (lambda p: [f.unlink() for f in p.iterdir()], FileNotFoundError, CONFIG),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), FileNotFoundError, f"wanted one that holds {WEIGHTS}"),
    "pickled weights": (
        lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"), FileNotFoundError, "pickle, which is never loaded",
    ),
    "truncated": (cut, ValueError, "truncated or damaged"),
    "empty": (lambda p: (p / WEIGHTS).write_bytes(b""), ValueError, "truncated or damaged"),
    "garbage": (lambda p: (p / WEIGHTS).write_bytes(b"x" * 100), ValueError, "truncated or damaged"),
    "huge header": (
        lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 2**60)), ValueError, "truncated or damaged",
    ),
    "missing tensor": (lambda p: edit_tensors(p, lambda t: t.pop(A0)), ValueError, f"got no {A0}"),
    "missing bias": (
        lambda p: edit_tensors(p, lambda t: t.pop("base_model.model.0.base_layer.bias")), ValueError, "base_layer.bias",
    ),
    "extra tensor": (
        lambda p: edit_tensors(p, lambda t: t.update(more=torch.ones(1))), ValueError, "got more, wanted no tensor",
    ),
    "wrong shape": (
        lambda p: edit_tensors(p, lambda t: t.update({B2: torch.ones(8, 4)})), ValueError,
        r"lora_B.weight \[8, 4\], wanted \[8, 3\]",
    ),
    "wrong dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({B2: torch.ones(8, 3).int()})), ValueError, "torch.int32, wanted",
    ),
    "future format": (future, ValueError, "a later spectral_ops wrote it"),
    "bad json": (lambda p: (p / CONFIG).write_text("{"), ValueError, "invalid JSON"),
    "list json": (lambda p: (p / CONFIG).write_text("[]"), ValueError, "got a JSON list"),
    "unknown method": (lambda p: edit_config(p, peft_type="IA3"), ValueError, r"peft_type: got 'IA3', wanted one of"),
    "no method": (lambda p: edit_config(p, peft_type=None), ValueError, "peft_type: got None"),
    "unknown feature": (lambda p: edit_config(p, lora_bias=True), ValueError, r"got lora_bias=True, which adds a bias"),
    "bad field": (lambda p: edit_config(p, r=-3), ValueError, r"LoRAConfig\.r: got -3"),
    "changed base": (lambda p: edit_config(p, init_lora_weights="corda"), ValueError, "init_lora_weights: got 'corda'"),
    "other rank": (lambda p: edit_config(p, r=2), ValueError, r"\[3, 12\], wanted \[2, 12\]"),
    "other targets": (lambda p: edit_config(p, target_modules=["0"]), ValueError, "wanted no tensor that the adapter"),
    "no such targets": (lambda p: edit_config(p, target_modules=["q"]), ValueError, "does not fit this model"),
    "dora flag": (lambda p: edit_config(p, use_dora=True), ValueError, "lora_magnitude_vector"),
    "not miss": (lambda p: edit_config(p, peft_type="MISS"), ValueError, r"BoneConfig\.bias: got 'lora_only'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_model_untouched(saved, damage):
    break_it, error, message = DAMAGE[damage]
    break_it(saved)
    target = model()
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    with pytest.raises(error, match=message):
        so.load_adapter(target, saved)
    assert [type(m) for m in target] == [nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in target.named_parameters())


@pytest.mark.parametrize("layers", [[0, 2], (0, 2), {0, 2}, range(0, 3, 2)], ids=lambda layers: type(layers).__name__)
def test_layers_in_any_collection_go_into_the_file(layers, tmp_path):
    def build():
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
        return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})

    net = so.attach(build(), LoRAConfig(r=2, target_modules=["up"], layers_to_transform=layers))
    so.save_adapter(net, tmp_path)
    assert list(so.adapter_layers(so.load_adapter(build(), tmp_path))) == ["model.layers.0.up", "model.layers.2.up"]


def everything(net):
    names = [(name, type(module)) for name, module in net.named_modules()]
    trains = [(name, p.requires_grad) for name, p in net.named_parameters()]
    return names, trains, {name: t.clone() for name, t in net.state_dict().items()}


def assert_unchanged(net, before):
    *names, state = everything(net)
    assert names == list(before[:2]) and state.keys() == before[2].keys()
    assert all(torch.equal(t.nan_to_num(), before[2][name].nan_to_num()) for name, t in state.items())


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids))))


ROWS = {"trainable_token_indices": {"embed": [1, 4]}, "modules_to_save": ["head"]}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("where", ["io.fill_adapter", "model._place_copies", "model.place", "model.set_adapter"])
def test_whatever_fails_leaves_the_model_as_it_was(where, beside, tmp_path, monkeypatch):
    """Also what no check foresees, once layers, copies and rows are in the model already."""
    so.save_adapter(so.attach(Embedded(), LoRAConfig(r=2, target_modules=["up"], **ROWS)), tmp_path)
    net = Embedded()
    if beside:
        so.attach(net, LoRAConfig(r=2, target_modules=["up", "down"], **ROWS), "first")
    before = everything(net)
    module, _, name = where.partition(".")
    module = importlib.import_module(f"spectral_ops.adapters.{module}")
    own = getattr(module, name)

    def fails(*args, **kwargs):
        own(*args, **kwargs)
        raise MemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        with pytest.raises(MemoryError):
            so.load_adapter(net, tmp_path)
    assert_unchanged(net, before)
    assert set(so.adapter_configs(net)) == ({"first"} if beside else set())
    so.load_adapter(net, tmp_path)
    assert "default" in so.adapter_configs(net)


def test_what_cannot_be_copied_leaves_the_model_as_it_was():
    net = Embedded()
    net.head.numbers = (i for i in range(3))  # no deepcopy of this
    before = everything(net)
    with pytest.raises(TypeError, match="generator"):
        so.attach(net, LoRAConfig(r=2, target_modules=["up"], init_lora_weights="pissa", **ROWS))
    assert_unchanged(net, before)


def test_another_adapter_merged_elsewhere(tmp_path):
    so.save_adapter(so.attach(Embedded(), LoRAConfig(r=2, target_modules=["down"])), tmp_path)
    net = so.merge(so.attach(Embedded(), LoRAConfig(r=2, target_modules=["up"]), "first"))
    before = everything(net)
    for bring in (
        lambda: so.load_adapter(net, tmp_path, "second"),
        lambda: so.attach(net, LoRAConfig(r=2, target_modules=["down"]), "second"),
    ):
        with pytest.raises(ValueError, match="while 'up' has another adapter merged"):
            bring()
        assert_unchanged(net, before)


def test_a_second_adapter_has_no_biases(tmp_path):
    """They are the base's own, so it would take the first one's."""
    biased = LoRAConfig(r=2, target_modules=["down"], bias="all")
    so.save_adapter(so.attach(Embedded(), biased), tmp_path)
    net = so.attach(Embedded(), LoRAConfig(r=2, target_modules=["up"], bias="lora_only"), "first")
    before = everything(net)
    for bring in (lambda: so.attach(net, biased, "second"), lambda: so.load_adapter(net, tmp_path, "second")):
        with pytest.raises(ValueError, match=r"bias: got 'all' beside \['first'\], wanted 'none'"):
            bring()
        assert_unchanged(net, before)
    so.attach(net, LoRAConfig(r=2, target_modules=["down"]), "second")


def test_a_safe_merge_looks_at_trained_rows_too():
    net = so.attach(Embedded(), LoRAConfig(r=2, target_modules=["up"], **ROWS))
    with torch.no_grad():
        net.embed.rows["default"][1, 2] = float("nan")
        net.up.lora_B["default"].fill_(1)
    before = everything(net)
    with pytest.raises(ValueError, match="embed: got non-finite merged rows"):
        so.merge(net, safe=True)
    assert_unchanged(net, before)


def test_a_wrong_base(saved):
    target = model()
    with torch.no_grad():
        target[2].weight.mul_(1.05)
    with pytest.raises(ValueError, match="whose '2' has other base weights than the adapter was trained on"):
        so.load_adapter(target, saved)
    assert isinstance(target[2], nn.Linear)
    so.load_adapter(target, saved, check_base=False)
    smaller = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"has other base weights|wanted \[4, 3\]"):
        so.load_adapter(smaller, saved)
    with pytest.raises(ValueError, match="does not fit this model"):
        so.load_adapter(nn.Sequential(nn.GELU()), saved)


def test_no_pickle_is_ever_read(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    so.load_adapter(model(), saved)


def test_an_interrupted_save_keeps_the_old_file(saved, monkeypatch):
    before = (saved / WEIGHTS).read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        so.save_adapter(so.load_adapter(model(), saved), saved)
    assert (saved / WEIGHTS).read_bytes() == before and len(list(saved.iterdir())) == 2


def test_partitioned_adapters_are_not_written(saved):
    """ZeRO-3 leaves an empty parameter with a ds_shape where it keeps a part of one."""
    ours = so.load_adapter(model(), saved)
    layer = ours[0]
    gathered = {name: t.clone() for name, t in ours.state_dict().items()}
    whole = layer.lora_A["default"]
    layer.lora_A["default"] = nn.Parameter(torch.empty(0))
    layer.lora_A["default"].ds_shape = whole.shape
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="got 0.lora_A.default partitioned, wanted it whole"):
        so.save_adapter(ours, saved)
    assert (saved / WEIGHTS).read_bytes() == before
    so.save_adapter(ours, saved, state_dict=gathered)
    assert torch.equal(safetensors_torch.load_file(saved / WEIGHTS)[A0], whole)
    assert layer.lora_A["default"].numel() == 0
