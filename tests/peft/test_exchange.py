"""Files between PEFT and us, for every method of both on thirty architectures: saved by one, loaded by the other.

The logits agree, the same parameters train, and what the second saves is the first's file again.
"""

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
from architectures import ARCHITECTURES  # noqa: E402
from exchange import (  # noqa: E402
    METHODS,
    our_model,
    ours_to_theirs_and_back,
    target_modules,
    their_model,
    theirs_to_ours_and_back,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

MISS = {"miss", "miss_mini", "bat"}
CONV1D = "PEFT's MiSS has no Conv1D"
CANNOT = {("gpt2", method): CONV1D for method in MISS}


def cases():
    """Every method on every architecture. Two methods are quick; of the others each architecture meets a third in every
    run, by turns, and the rest are thorough."""
    for i, method in enumerate(METHODS):
        for j, (name, entry) in enumerate(ARCHITECTURES.items()):
            # the oldest PEFT lacks what transformers 5 asks of a PEFT model for sequences
            quick = method in ("lora", "miss") and entry.task_type != "SEQ_2_SEQ_LM"
            marks = [] if quick else [pytest.mark.thorough if (i + j) % 3 else pytest.mark.slow]
            reason = CANNOT.get((name, method))
            yield pytest.param(name, method, marks=[*marks, pytest.mark.skip(reason)] if reason else marks)


everywhere = pytest.mark.parametrize(("name", "method"), list(cases()))


@everywhere
def test_saved_by_us_loaded_by_peft(name, method, tmp_path):
    chosen = target_modules(name, method)
    first = our_model(name, method, target_modules=chosen)
    ours_to_theirs_and_back(name, tmp_path, first, plain=method != "pissa")


@everywhere
def test_saved_by_peft_loaded_by_us(name, method, tmp_path):
    chosen = target_modules(name, method)
    first = their_model(name, method, target_modules=chosen)
    theirs_to_ours_and_back(name, tmp_path, first, plain=method != "pissa")
