"""Imports run one way down: every module imports only from layers below its own, and no two import each other."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (  # from the bottom; those in one line do not import each other
    ("_version", "_table", "_files", "_imports"),
    ("_library",),
    ("_loader",),
    ("triton_kernels", "core"),
    ("tuning", "functional"),
    ("backends", "init"),
    ("adapters",),
    ("integrations",),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# the benchmark measures the package as its users have it, and the command line tells of it
OF_THE_WHOLE = {"bench", "cli", "__main__"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without ``spectral_ops.`` in front."""
    found = {}
    for folder, prefix in (("spectral_ops", ()), ("triton_kernels", ("triton_kernels",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "spectral_ops" and parts[0] == "triton_kernels":
                continue  # the link to the other folder
            found[".".join((*prefix, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that one imports, wherever in its text; "__init__" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno}: relative"
            words = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        else:
            continue
        for word in words:
            top, _, rest = word.partition(".")
            if top != "spectral_ops":
                continue
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            found.add(rest or "__init__")
    return found - {name}


def layer(name: str) -> int:
    return RANK[name.partition(".")[0]]


def test_every_module_has_a_layer():
    assert {name.partition(".")[0] for name in MODULES} == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_back_up(name):
    top = name.partition(".")[0]
    for other in imported(name):
        if other.partition(".")[0] == top:
            continue  # within one folder: see the test of cycles
        if other == "__init__" and top in OF_THE_WHOLE:
            continue
        assert layer(other) < layer(name), f"{name} imports {other}"


def test_no_two_modules_import_each_other():
    below = {name: {other for other in imported(name) if other != "__init__"} for name in MODULES}
    while leaves := [name for name, others in below.items() if not others]:
        for name in leaves:
            del below[name]
        below = {name: others - set(leaves) for name, others in below.items()}
    assert not below, f"cycles among {below}"


def test_no_two_test_files_share_a_name():
    """pytest imports them by their names alone, and collects the first."""
    names = Counter(path.stem for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
