"""Which modules a config chooses in random trees of names: PEFT's choice and ours are the same, or both raise.

Where PEFT does something that nobody can have meant, ours raises and names the field: REFUSED has every such case.
"""

import re
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spectral_ops as so
from spectral_ops import AdaLoRAConfig, BoneConfig, LoRAConfig, VeRAConfig
from spectral_ops.adapters.trained_copy import TrainedCopy

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper  # noqa: E402
from trees import Tree, choices, trees  # noqa: E402

# slow: not run with the oldest PEFT, which chooses by other rules in places (layers_to_transform=0 is none to it)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
METHODS = {
    "lora": (LoRAConfig, "LoraConfig", {"r": 2, "lora_alpha": 8}),
    "miss": (BoneConfig, "MissConfig", {"r": 2}),
    "vera": (VeRAConfig, "VeraConfig", {"r": 2}),
    "adalora": (AdaLoRAConfig, "AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
}
REFUSED = {  # what PEFT lets pass: the error of ours
    "layers_pattern beside an empty layers_to_transform, where it does nothing": r"layers_to_transform: got None",
    "a pattern that is no regular expression, where nothing comes to it": r"wanted a regular expression",
    "an empty name in layers_pattern, which matches two dots in a row": r"layers_pattern: got \['?.*'',?.*\]",
    "a module trained whole with adapters in it, as the copy is made after them": r"modules_to_save: .*target_modules",
}


def choice(model, layer_type, saved_type, describe):
    """{path: what describe() says of an adapted layer, or "saved"}, under every path, nothing inside of another."""
    chosen = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, layer_type | saved_type):
            if not any(path.startswith(f"{parent}.") for parent in chosen):
                chosen[path] = describe(module) if isinstance(module, layer_type) else "saved"
    return chosen


def pefts_choice(tree, fields, method):
    _, name, more = METHODS[method]
    try:
        model = peft.get_peft_model(tree.build(), getattr(peft, name)(**more, **fields)).base_model.model
    except Exception as error:
        return error
    ranked = method == "lora"
    return choice(
        model, BaseTunerLayer, ModulesToSaveWrapper, lambda m: ranked and (m.r["default"], m.scaling["default"])
    )


def our_choice(tree, fields, method):
    config, _, more = METHODS[method]
    try:
        model = so.attach(tree.build(), config(**more, **fields))
    except (TypeError, ValueError) as error:
        return error
    ranked, layer = method == "lora", so.adapters.AdapterLinear
    return choice(
        model, layer, TrainedCopy,
        lambda m: ranked and (m.settings["default"].r, m.settings["default"].scaling),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(tree, fields, method="lora"):
    """Whether both chose at all."""
    if isinstance(fields.get("target_modules"), str):  # an empty list beside it is an error to PEFT, and none to us
        fields = {name: value for name, value in fields.items() if not name.startswith("layers_") or value != []}
    theirs, ours = pefts_choice(tree, fields, method), our_choice(tree, fields, method)
    if isinstance(ours, Exception):
        assert str(ours), "an error without words"
        refused = any(re.search(message, str(ours), re.DOTALL) for message in REFUSED.values())
        assert refused or isinstance(theirs, Exception), f"PEFT chooses {theirs}, we raise {ours!r}"
        return False
    if "ParameterDict" in str(theirs):  # the trees have none: PEFT has matched the inside of its own layer
        return False
    assert not isinstance(theirs, Exception), f"we choose {ours}, PEFT raises {theirs!r}"
    assert ours == theirs
    return True


def ours_alone(examples):
    """No shrinking through a database, the same examples in every run."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


STACK = {"h": {"0": {"q": "linear", "aq": "linear", "ln": "norm"}, "1": {"q": "linear", "aq": "linear", "ln": "norm"}}}


@ours_alone(300)
@given(data=st.data())
def test_the_same_modules_are_chosen(data):
    tree = data.draw(trees())
    check(tree, data.draw(choices(tree)))


@pytest.mark.parametrize("method", ["miss", "vera", "adalora"])
@ours_alone(120)
@given(data=st.data())
def test_by_other_methods(method, data):
    tree = data.draw(trees())
    fields = data.draw(choices(tree))
    left_out = {"rank_pattern", "alpha_pattern"} | ({"exclude_modules"} if method == "vera" else set())
    check(tree, {name: value for name, value in fields.items() if name not in left_out}, method)


@ours_alone(150)
@given(data=st.data())
def test_layers_under_several_paths(data):
    """PEFT judges one by its first path, and adapts it there alone; we adapt it wherever it hangs."""
    tree = data.draw(trees(shared=True))
    fields = data.draw(choices(tree))
    theirs, ours = pefts_choice(tree, fields, "lora"), our_choice(tree, fields, "lora")
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        check(tree, fields)
        return
    shared = [path for path in tree.linear if tree.at(path) == "shared"]
    first = theirs.get(shared[0], "saved")
    everywhere = {path: first for path in shared if first != "saved" and theirs.get(path) != "saved"}
    assert ours == {**theirs, **everywhere}


EXAMPLES = {
    "the end of a name is no name": {"target_modules": ["q"]},
    "a whole path goes past layers_to_transform": {"target_modules": ["h.0.q"], "layers_to_transform": [1]},
    "no index in the path": {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "g"},
    "excluded by the end": {"target_modules": "all-linear", "exclude_modules": ["0.q"]},
    "excluded by an expression": {"target_modules": ["q", "aq"], "exclude_modules": r".*\.0\..*"},
    "everything excluded": {"target_modules": ["q"], "exclude_modules": ["q"]},
    "saved by the end, dots or not": {"target_modules": ["aq"], "modules_to_save": ["n"]},
    "saved and adapted": {"target_modules": ["aq"], "modules_to_save": ["q"]},
    "saved wins where the name is whole": {"target_modules": ["q", "aq"], "modules_to_save": ["0.q"]},
    "saved that match nothing": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "a list of layers": {"target_modules": ["q"], "modules_to_save": ["h"]},
    "a norm": {"target_modules": ["ln"]},
    "a pattern for the whole path": {"target_modules": ["q"], "rank_pattern": {"h.0.q": 3, "q": 1}},
    "the first pattern wins": {"target_modules": ["q", "aq"], "rank_pattern": {".*q": 3, "aq": 1}},
    "a pattern for the end of a name": {"target_modules": ["aq"], "alpha_pattern": {"q": 3}},
    "a pattern that is no expression": {"target_modules": ["aq"], "alpha_pattern": {"[": 3}},
    "a target that is no expression": {"target_modules": "*q"},
    "capitals": {"target_modules": ["Q"]},
    "nothing at all": {},
    "an empty list": {"target_modules": []},
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_by_example(case):
    raises = {"everything excluded", "saved and adapted", "a list of layers", "a norm", "capitals", "nothing at all"}
    raises |= {"an empty list", "a pattern that is no expression", "a target that is no expression"}
    raises |= {"no index in the path"}
    assert check(Tree(STACK), EXAMPLES[case]) == (case not in raises)


def test_both_choose_often_enough():
    """The trees and configs above are no use where nearly all of them raise."""
    counts = {True: 0, False: 0}

    @ours_alone(60)
    @given(data=st.data())
    def count(data):
        tree = data.draw(trees())
        counts[isinstance(pefts_choice(tree, data.draw(choices(tree)), "lora"), dict)] += 1

    count()
    assert counts[True] > 15 and counts[False] > 5
