"""Files between PEFT and us with all else that a config can say: biases, modules trained whole, layers, heads."""

import json

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from architectures import answer, build  # noqa: E402
from exchange import (  # noqa: E402
    CONFIG,
    METHODS,
    our_config,
    our_model,
    ours_to_theirs_and_back,
    perturb,
    save_ours,
    save_theirs,
    their_config,
    their_model,
    theirs_to_ours_and_back,
)

import spectral_ops as so  # noqa: E402

# slow: not run with the oldest PEFT, whose files lack biases and mix adapters up
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ONLY = {"lora": "lora_only", "dora": "lora_only", "adalora": "lora_only", "miss": "MiSS_only", "vera": "vera_only"}
BIAS = [
    (name, method, {"bias": bias, "target_modules": targets})
    for name, targets in {
        "bert": ["query", "intermediate.dense"],
        "gpt2": ["c_attn"],
        "qwen2": ["q_proj", "o_proj"],
        "roberta": ["value"],
    }.items()
    for method, only in ONLY.items()
    for bias in ("all", only)
    if (name, method) != ("gpt2", "miss")
]
SAVED = [
    (name, method, {"modules_to_save": saved, "target_modules": targets})
    for name, saved, targets in [
        ("llama", ["lm_head"], ["q_proj"]),
        ("llama", ["embed_tokens", "lm_head"], "all-linear"),
        ("llama", ["norm"], ["q_proj"]),  # and every path that ends so: post_attention_layernorm
        ("llama", ["mlp"], ["q_proj"]),  # with everything in it
        ("llama", ["layers.1.mlp.up_proj"], ["up_proj"]),  # which is no target then
        ("llama_tied", ["embed_tokens"], ["v_proj"]),
        ("llama_tied", ["lm_head"], ["v_proj"]),
        ("qwen3", ["q_norm", "k_norm"], ["o_proj"]),
        ("gpt2", ["ln_f", "wte"], ["c_attn"]),
        ("t5", ["final_layer_norm"], ["q"]),
        ("bert", ["LayerNorm"], ["query"]),
        ("mixtral", ["gate"], ["q_proj"]),
        ("vit", ["classifier"], "all-linear"),
        ("plain", ["q_norm", "final"], ["q"]),
    ]
    for method in ("lora", "vera")
]
CHOICE = [
    (name, method, fields)
    for name, fields in [
        ("llama", {"layers_to_transform": 1, "target_modules": ["q_proj"]}),
        ("llama", {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["up_proj", "o_proj"]}),
        ("gpt2", {"layers_to_transform": [1], "layers_pattern": ["layers", "h"], "target_modules": ["c_attn"]}),
        ("t5", {"layers_to_transform": [1], "target_modules": ["q", "wi"]}),
        ("qwen2", {"target_modules": r".*\.[01]\..*(q|v)_proj"}),
        ("mistral", {"target_modules": "ALL-Linear"}),
        ("plain", {"target_modules": ["q", "layers.1.0"]}),
    ]
    for method in ("lora", "adalora")
] + [
    (name, method, {"exclude_modules": exclude, "target_modules": targets})
    for name, exclude, targets in [
        ("llama", ["up_proj", "layers.0.self_attn.q_proj"], "all-linear"),
        ("gpt_neox", r".*\.0\..*", ["query_key_value", "dense"]),
        ("plain", ["q"], "all-linear"),
    ]
    for method in ("lora", "miss")
]
CASES = [*BIAS, *SAVED, *CHOICE]
cases = pytest.mark.parametrize(
    ("name", "method", "fields"), CASES, ids=[f"{n}-{m}-{'-'.join(map(str, f.values()))}" for n, m, f in CASES]
)


@cases
def test_saved_by_us_loaded_by_peft(name, method, fields, tmp_path):
    ours_to_theirs_and_back(name, tmp_path, our_model(name, method, **fields), plain=True)


@cases
def test_saved_by_peft_loaded_by_us(name, method, fields, tmp_path):
    theirs_to_ours_and_back(name, tmp_path, their_model(name, method, **fields), plain=True)


@pytest.mark.parametrize("name", ["distilbert", "bert_qa", "deberta_v2", "llama_cls", "roberta", "vit"])
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_all_linear_and_a_head(name, method, tmp_path):
    """PEFT raises where its "all-linear" takes a module that it trains whole too. We do, or write a file for it."""
    try:
        theirs = their_model(name, method, target_modules="all-linear")
    except TypeError as error:
        assert "modules_to_save cannot be applied" in str(error)
        theirs = None
    try:
        ours = our_model(name, method, target_modules="all-linear")
    except ValueError as error:
        assert theirs is None, "PEFT takes that"
        assert "modules_to_save" in str(error)
        return
    if theirs is not None:
        theirs_to_ours_and_back(name, tmp_path / "theirs first", theirs, plain=True)
    ours_to_theirs_and_back(name, tmp_path / "ours first", ours, plain=True)


# --- several adapters ------------------------------------------------------------------------------------------------


SEVERAL = {
    "first": {"target_modules": ["q_proj", "v_proj"], "bias": "none"},
    "second": {"target_modules": ["v_proj", "up_proj"], "modules_to_save": ["lm_head"]},
    "third": {"target_modules": ["up_proj", "v_proj", "down_proj"], "modules_to_save": ["norm"]},
}


def several_configs(make, method):
    """PEFT sizes the projections of VeRA by the first adapter's layers, for all of them."""
    same = {"target_modules": ["q_proj", "v_proj"]} if method == "vera" else {}
    return {adapter: make("llama", method, **{**fields, **same}) for adapter, fields in SEVERAL.items()}


several = pytest.mark.parametrize("method", ["lora", "dora", "miss", "vera", "adalora"])


@several
def test_several_adapters_of_peft(method, tmp_path):
    if method == "adalora":  # PEFT trains one of them at most
        pytest.skip("PEFT's AdaLoRA has one adapter that trains")
    theirs = None
    for number, (adapter, config) in enumerate(several_configs(their_config, method).items()):
        if theirs is None:
            theirs = peft.get_peft_model(build("llama"), config, adapter)
        else:
            theirs.add_adapter(adapter, config)
        theirs.set_adapter(adapter)
        perturb(theirs, seed=number)
    theirs.save_pretrained(tmp_path)
    ours = build("llama")
    for adapter in SEVERAL:
        so.load_adapter(ours, tmp_path / adapter, adapter)
    for adapter in SEVERAL:
        theirs.set_adapter(adapter)
        so.set_adapter(ours, adapter)
        want = answer("llama", theirs)
        assert (answer("llama", ours) - want).abs().max() < 2e-5 * want.abs().max()
        so.save_adapter(ours, tmp_path / "ours" / adapter, adapter)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours" / "first", "first")
    for adapter in ("second", "third"):
        again.load_adapter(tmp_path / "ours" / adapter, adapter)
    for adapter in SEVERAL:
        theirs.set_adapter(adapter)
        again.set_adapter(adapter)
        want = answer("llama", theirs.eval())
        assert (answer("llama", again.eval()) - want).abs().max() < 2e-5 * want.abs().max()


@several
def test_several_adapters_of_ours(method, tmp_path):
    ours, theirs = build("llama"), None
    for number, (adapter, config) in enumerate(several_configs(our_config, method).items()):
        perturb(so.attach(ours, config, adapter), seed=number)
    for adapter in SEVERAL:
        so.save_adapter(ours, tmp_path / adapter, adapter)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / adapter, adapter)
        else:
            theirs.load_adapter(tmp_path / adapter, adapter)
    for adapter in SEVERAL:
        theirs.set_adapter(adapter)
        so.set_adapter(ours, adapter)
        want = answer("llama", ours)
        assert (answer("llama", theirs.eval()) - want).abs().max() < 2e-5 * want.abs().max()


# --- the config file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_config_file_says_the_same(method, tmp_path):
    """Every field that PEFT reads has the value that PEFT itself would have written."""
    fields = {"target_modules": ["q_proj", "v_proj"]}
    save_ours(our_model("llama", method, **fields), tmp_path / "ours")
    save_theirs(their_model("llama", method, **fields), tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    if method == "pissa":  # written as plain LoRA of twice the rank
        for field in ("r", "lora_alpha"):
            theirs[field] *= 2
        theirs["init_lora_weights"] = True
    for field in ("auto_mapping", "peft_version"):
        theirs.pop(field, None)
        ours.pop(field, None)
    theirs["target_modules"] = sorted(theirs["target_modules"])
    ours["target_modules"] = sorted(ours["target_modules"])
    known = {field: value for field, value in theirs.items() if field in ours}
    assert {field: ours[field] for field in known} == known
    assert ours.keys() <= theirs.keys(), "PEFT does not know these"
    config = their_config("llama", method, **fields)
    left_out = {field: theirs[field] for field in theirs.keys() - ours.keys()}
    default = type(config)(**({"total_step": 1} if method == "adalora" else {})).to_dict()
    assert left_out == {field: default[field] for field in left_out}
