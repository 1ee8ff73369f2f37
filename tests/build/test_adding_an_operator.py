"""docs/DESIGN.md says which files an operator takes: no other file may list it, and those are enough."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spectral_ops
from spectral_ops import _library

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "DESIGN.md").read_text().partition("## Adding an operator\n")[2].partition("\n## ")[0]
FILES = re.findall(r"^\d+\. `([^`]+)`", SECTION, re.M)
ROW = re.findall(r"`([\w/]+/[\w<>]+\.\w+)`", SECTION)  # with what may come on top
EVERY = _library.OPERATORS | _library.LAYERS
STEMS = sorted({operator.stem for operator in EVERY.values()})
PLACES = {
    "python": [*ROOT.glob("spectral_ops/**/*.py"), *ROOT.glob("triton_kernels/*.py"), ROOT / "setup.py"],
    "csrc": [*(path for path in ROOT.glob("csrc/**/*") if path.is_file()), ROOT / "CMakeLists.txt"],
}
# How many rows a file may name besides its own: a layer those that it is composed of, any other file as examples.
COMPOSED, EXAMPLES = 3, 2


def row_of(path: Path) -> str | None:
    """The row that a file belongs to: that of its own name, or of what stands before an underscore in it."""
    names = re.sub(r"^(test|bench)_", "", path.stem)
    return next((stem for stem in STEMS if names == stem or names.startswith(f"{stem}_")), None)


def named(text: str) -> set[str]:
    """The rows whose operators or files a text names. A name that is a public function's too says nothing."""
    operators = "|".join(sorted(EVERY.keys() - set(spectral_ops.__all__), key=len, reverse=True))
    found = {EVERY[name].stem for name in re.findall(rf"\b({operators})(?:_op)?\b", text)}
    return found | set(re.findall(rf"\b({'|'.join(STEMS)})(?:_\w+)?\.(?:py|h|cpp|cu)\b", text))


def test_an_operator_takes_at_most_six_files():
    assert 3 <= len(FILES) <= 6 and FILES[-1].startswith("tests/")
    assert all("<stem>" in path for path in FILES)


@pytest.mark.parametrize("place", PLACES)
def test_no_file_lists_operators(place):
    """An operator is named in its row's files, where a layer is composed of it, and in an example or two."""
    lists = {}
    for path in PLACES[place]:
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".txt"):
            row = row_of(path)
            rows = named(path.read_text(encoding="utf-8")) - {row}
            if len(rows) > (COMPOSED if row else EXAMPLES):
                lists[str(path.relative_to(ROOT))] = sorted(rows)
    assert not lists, "these name operators of many rows, as a list would that every new operator must enter"


def test_a_list_would_be_seen():
    one_of_each = {operator.stem: name for name, operator in EVERY.items() if name not in spectral_ops.__all__}
    assert len(named(str(list(one_of_each.values())))) == len(STEMS) > COMPOSED
    assert named("\n".join(f"csrc/cpu/{stem}.cpp" for stem in STEMS)) == set(STEMS)
    assert not named("block_sums column_norm")


def test_every_file_of_a_row_is_on_the_page():
    """And each row of operators has the first and the last of them."""
    folders = {path.rpartition("/")[0] for path in ROW if "<stem>" in path} | {"csrc", "tests/kernels"}
    for stem in sorted({operator.stem for operator in _library.OPERATORS.values()}):
        there = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).glob(f"*{stem}.*")}
        own = {path for path in there if row_of(Path(path)) == stem}
        assert own <= {path.replace("<stem>", stem) for path in ROW}, stem
        assert {FILES[0].replace("<stem>", stem), FILES[-1].replace("<stem>", stem)} <= own, stem


# --- another operator, in a copy of the package ----------------------------------------------------------------------

OPERATOR = '''
"""A row of one operator: y = 2 x."""

from spectral_ops._library import Cost, calls, define, nbytes

__all__ = ["toy"]


@define(
    "toy_double(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    cost=lambda x: Cost(x.numel(), 2 * nbytes(x)),
    samples=lambda s: [(s.x,), (s.rows(s.x),)],
)
def toy_double_op(x):
    return (2 * x).contiguous()


@calls(toy_double_op)
def toy(x):
    return toy_double_op(x)
'''
KERNEL = '''
"""Never imported here: that there is a launcher is read from the source."""

from typing import Literal

import no_such_package


def toy_double(x, tiles: Literal["", "short"] = ""):
    raise NotImplementedError
'''
QUESTIONS = """
import argparse, json, torch, spectral_ops
from spectral_ops import _library, backends, triton_kernels, tuning
from spectral_ops.bench import candidates, operators, samples
from spectral_ops.cli import check, info

def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))

operator = _library.OPERATORS["toy_double"]
status = run(check, "--operators", "toy_double"), run(info)
print(json.dumps({
    "file": spectral_ops.__file__,
    "row": operator.stem,
    "status": status,
    "explained": [str(spectral_ops.explain(name)) for name in ("toy_double", "toy")],
    "value": spectral_ops.toy(torch.ones(2)).tolist(),
    "samples": [list(args[0].shape) for args in samples.arguments("toy_double", 3, 5, 7, 2, torch.float32, "cpu")],
    "triton": [triton_kernels.has("toy", "toy_double"), triton_kernels.has("toy", "toy_triple")],
    "on a GPU": backends.default(operator, "cuda").backend,
    "choices": tuning.choices(operator),
    "benchmarked": "toy_double" in operators.NAMES,
    "tuned": [op.name for op, _, _ in candidates.classes(["toy_double"], ["float32"], [(3, 5, 7, 2)], "cpu")],
}))
"""


OF_EVERY_OPERATOR = "tests/operators/test_library.py", "tests/kernels/test_triton.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with the package in Python alone, and an operator that it did not have."""
    folder = tmp_path_factory.mktemp("copy")
    compiled = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    shutil.copytree(ROOT / "spectral_ops", folder / "spectral_ops", ignore=compiled)
    shutil.copytree(ROOT / "triton_kernels", folder / "spectral_ops" / "triton_kernels", ignore=compiled)
    (folder / "spectral_ops" / "functional" / "toy.py").write_text(OPERATOR)
    (folder / "spectral_ops" / "triton_kernels" / "toy.py").write_text(KERNEL)
    exports = folder / "spectral_ops" / "functional" / "__init__.py"  # for the public function of a new row
    exports.write_text(exports.read_text() + "\nfrom spectral_ops.functional.toy import toy\n\n__all__ += ['toy']\n")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "operators" / "test_toy.py").write_text("")
    return folder


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy), "SPECTRAL_OPS_NO_EXTENSION": "1", "TRITON_INTERPRET": "0"}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)


def test_a_new_operator_is_found_everywhere(copy):
    done = run(copy, "-c", QUESTIONS)
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    answer = json.loads(last)
    assert answer["file"].startswith(str(copy))
    assert answer["row"] == "toy" and answer["status"] == [0, 0]
    assert [text.partition(":")[0] for text in answer["explained"]] == ["toy_double", "toy"]
    assert "toy_double: reference" in answer["explained"][1]
    assert answer["value"] == [2.0, 2.0]
    assert answer["samples"] == [[3, 7]] * 2
    assert answer["triton"] == [True, False]
    assert answer["choices"] == [*_library.BACKENDS, "triton:short"]
    assert answer["benchmarked"] and answer["tuned"] == ["toy_double"]
    assert re.search(r"toy_double +reference .* ok", printed) and re.search(r"toy +toy_double", printed)
    if spectral_ops.backends.triton_missing() is None:
        assert answer["on a GPU"] == "triton"


def test_the_tests_of_every_operator_take_a_new_one(copy):
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", OF_EVERY_OPERATOR[0], "-k", "toy_double or rows")
    passed = re.search(r"^(\d+) passed", done.stdout, re.M)
    assert done.returncode == 0 and passed and int(passed[1]) > 8, done.stdout + done.stderr
    if spectral_ops.backends.triton_missing() is None:
        done = run(copy, "-m", "pytest", "-q", "--collect-only", OF_EVERY_OPERATOR[1], "-k", "toy_double")
        assert "[toy_double-tiles]" in done.stdout, done.stdout + done.stderr
