"""What the documentation says is so: examples run, links lead somewhere, names, signatures and figures are true."""

import ast
import inspect
import operator
import re
from pathlib import Path

import pytest
import torch

import spectral_ops
from benchmarks import publish
from spectral_ops import _library
from spectral_ops.bench import counting, methods, results
from spectral_ops.cli import cost

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted([*DOCS.rglob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*.md")])
API = (DOCS / "API.md").read_text()
EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{i}")
    for page in sorted(DOCS.rglob("*.md"))
    for i, example in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs", "exec"), {})


def test_every_page_of_a_method_has_its_example_and_its_costs():
    pages = {page.stem: page.read_text() for page in (DOCS / "methods").glob("*.md")}
    assert len(pages) >= 6
    for name, text in pages.items():
        assert "```python" in text, name
    described = {name for text in pages.values() for name in re.findall(r"^<!-- cost: (\w+) -->$", text, re.M)}
    assert described == set(methods.METHODS)


def test_tables_of_costs_are_current():
    assert publish.write_costs(DOCS / "methods", write=False) == [], "python -m benchmarks.publish costs"
    assert not publish.write_fields(DOCS / "files.md", write=False), "python -m benchmarks.publish fields"
    for renew in (publish.write_estimates, publish.write_routes):
        assert not renew(DOCS / "PERFORMANCE.md", write=False), "python -m benchmarks.publish estimates"


def test_costs_and_predictions_by_hand():
    """LoRA over a frozen layer: six skinny products; passes over x (twice), y and dx (in and out), and dy."""
    T, d, k, r = 4096, 1024, 4096, methods.RANK
    got, frozen = (counting.cost(name, T, d, k, torch.bfloat16) for name in ("lora", None))
    assert frozen.flops == 4 * T * d * k and frozen.bytes == 4 * (T * d + T * k + d * k)
    assert got.trained == r * (d + k) and got.saved_bytes == 2 * T * r
    assert got.flops - frozen.flops == 6 * T * r * (d + k)
    passes = 2 * (4 * T * k + 3 * T * d)
    assert passes <= got.bytes - frozen.bytes <= 1.03 * passes
    one, ceiling = counting.CEILINGS["sm_90"], (1.0, float("inf"))
    assert got.seconds(ceiling) == got.flops and got.seconds((float("inf"), 1.0)) == got.bytes
    assert max(got.flops / one[0], got.bytes / one[1]) <= got.seconds(one) <= got.flops / one[0] + got.bytes / one[1]
    text = cost.predictions(models=("smollm2",), tokens=(256,), methods=("lora",)).splitlines()
    assert len(text) == 3 and all(1 < float(cell) < 3 for cell in text[2].split()[3:])


def test_predictions_by_route_by_hand():
    """A block of LoRA: what its product may take decides, and more routes never cost more."""
    found = {name: cost.joined_block(name, "llama3-8b", 8192) for name in cost.JOINED}
    for name, taxes in found.items():
        shares = [taxes[str(share)] for share in cost.SHARES]
        assert 1 < shares[0] < shares[1] < shares[2] < shares[3] < taxes["update first"] < taxes["library"], name
        assert taxes["siblings"] < taxes["0.97"]
    assert cost.shared_bytes("lora", "llama3-8b", 8192) == 2 * 3 * 8192 * 4096 * 2
    sizes, rest = cost.products(counting.cost("dora", 8192, 4096, 1024, torch.bfloat16).forward, 8192, 4096, 1024)
    assert sizes == (8192, 4096, 1024, methods.RANK, True, False, False, False, False) and rest > 0
    bone = counting.cost("bone", 8192, 4096, 1024, torch.bfloat16)
    assert cost.products(bone.backward, 8192, 1024, 4096)[0][3:7] == (0, False, False, True)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not fragment or fragment in anchors(target), link


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Of the object of this name in the package, without ``self``."""
    found = dict(inspect.signature(operator.attrgetter(name)(spectral_ops)).parameters)
    found.pop("self", None)
    return found


def defaults(arguments: ast.arguments) -> dict[str, object]:
    pairs = list(zip(arguments.args[::-1], arguments.defaults[::-1], strict=False))  # the last ones have defaults
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {argument.arg: ast.literal_eval(value) for argument, value in pairs if value is not None}


BLOCKS = "".join(re.findall(r"^```text\n(.*?)^```", API, re.S | re.M))
SIGNATURES = re.findall(r"^\w.*(?:\n .*)*", BLOCKS, re.M)  # what is indented goes on with the line above


@pytest.mark.parametrize("text", SIGNATURES, ids=lambda text: text.partition("(")[0])
def test_documented_signatures_are_the_code_s(text):
    """Of a config, ``*Base`` stands for the fields of another one."""
    name, call = re.match(r"([\w.]+)(\(.*?\))(?: ->|\s*#|$)", text, re.S).groups()
    arguments = ast.parse(f"def f{call}: ...").body[0].args
    names = [argument.arg for argument in arguments.args]
    if arguments.vararg:
        base = arguments.vararg.arg
        names += parameters(base) if name.endswith("Config") else [base]
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [arguments.kwarg.arg] if arguments.kwarg else []
    found = parameters(name)
    assert names == list(found)
    for argument, documented in defaults(arguments).items():
        if documented != {}:  # a dataclass makes those anew
            assert found[argument].default == documented, argument


def test_every_public_name_is_documented():
    spans = {word for span in re.findall(r"`([^`\n]+)`", API) for word in re.findall(r"\w+", span)}
    spans |= {re.match(r"\w+", text).group() for text in SIGNATURES}
    assert set(spectral_ops.__all__) <= spans
    assert all(hasattr(spectral_ops, name) for name in spans if re.match(r"[A-Z]\w*(Linear|Config)$", name))


def test_the_three_lines_of_the_readme_run(capsys):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    names = {
        "model": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "spectral_ops": spectral_ops,
        "get_peft_model": peft.get_peft_model,
        "LoraConfig": peft.LoraConfig,
    }
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    exec(compile(code, "README.md", "exec"), names)
    assert names["report"].counts["fused"] == 7


def test_the_table_of_the_readme_is_that_of_its_results_file():
    text = (ROOT / "README.md").read_text()
    run = results.read(ROOT / re.search(r"\[results file\]\(([^)]+)\)", text).group(1))
    assert f"commit {run.meta['commit']}" in text and f"`{run.meta['command']}`" in text
    layers = {(row.method, row.implementation, row.dtype): row for row in run.layers if row.adapter_dtype == "float32"}
    table = re.search(r"<!-- summary: cpu -->\n(.*?)<!-- end -->", text, re.S).group(1)
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line)
    assert len(rows) == 4
    for name, *cells in rows:
        method = {"MiSS (Bone)": "bone"}.get(name, name.lower())
        columns = (column.replace("accelerated", "PEFT accelerated").split(", ") for column in head[1:])
        wanted = [layers[(method, *column)].ratio for column in columns]
        assert [cell.strip("*") for cell in cells] == [f"{ratio:.2f}" for ratio in wanted], name


def test_the_table_of_the_readme_says_which_cells_are_filled():
    """A row for every stem; a cell starts with a dash exactly where the folder has no file of that stem. Stems without
    a kernel may stand in the sentence below the table."""
    cells, text = {}, (ROOT / "README.md").read_text()
    for line in text.splitlines():
        if match := re.match(r"\| `(\w+)`: .*? \|(.*)\|$", line.replace(r"\|", "/")):
            cells[match[1]] = [cell.strip() for cell in match[2].split("|")]
    files = ("csrc/cpu/{}*.cpp", "triton_kernels/{}.py", "csrc/cuda/{}*.cu", "csrc/layers/{}.h")
    stems = {operator.stem for operator in (*_library.OPERATORS.values(), *_library.LAYERS.values())}
    for sentence, layer in ((r"without kernels of their own: (.*?);", "–"), (r"as whole layers in C\+\+: (.*)", "yes")):
        for stem in re.findall(r"`(\w+)`", re.search(sentence, text)[1]):
            cells[stem] = ["–", "–", "–", layer]
    assert stems == cells.keys() - {"lowrank_matmul"}
    for stem in stems:
        filled = [any(ROOT.glob(pattern.format(stem))) for pattern in files]
        assert [not cell.startswith("–") for cell in cells[stem]] == filled, stem
