"""What ``bench`` makes of its results: comparisons, pictures, growth and README's table, on made-up figures."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import publish
from spectral_ops import cli
from spectral_ops._library import Cost
from spectral_ops.bench import clock, compare, growth, pictures, results, tables
from spectral_ops.bench import methods as sizes

CEILING = results.Ceiling(1e11, 2e10)
TRIALS = 200


def noisy(random_state, seconds, noise=0.02, turns=20):
    return [seconds * random_state.lognormvariate(0, noise) for _ in range(turns)]


def layer(method="lora", implementation="spectral_ops", ratio=1.05, turns=20, **fields):
    state = random.Random(f"{method} {implementation} {fields}")
    ratios = [1.0] * turns if implementation == "frozen" else noisy(state, ratio, turns=turns)
    made = dict(
        method=method, implementation=implementation, device="cpu", dtype="float32", adapter_dtype="float32",
        tokens=1024, out_features=2048, in_features=2048, rank=16, times=[0.1 * r for r in ratios], ratios=ratios,
        flops=10**10, bytes=10**8, floor_seconds=0.08, saved_bytes=2**20, peak_bytes=2**24,
    )  # fmt: skip
    return results.Layer(**(made | fields))


def operator(name="block_sum", seconds=1e-3, flops=10**6, seed=0, **fields):
    made = dict(
        operator=name, row="blocksum", backend="cpu", device="cpu", dtype="float32", tokens=1024, out_features=2048,
        in_features=2048, rank=16, times=noisy(random.Random(seed), seconds), flops=flops, bytes=10**7,
        floor_seconds=5e-4,
    )  # fmt: skip
    return results.Operator(**(made | fields))


def made_up(**sections):
    meta = {"device": "a CPU", "threads": 2, "torch": "2.13", "commit": "abc1234", "date": "2026-11-22T10:00:00+00:00"}
    meta["command"] = "python -m spectral_ops bench"
    return results.Results(meta, {"float32": CEILING}, **sections)


def methods():
    rows = [layer(method, name, ratio) for method in ("lora", "dora")
            for name, ratio in (("frozen", 1.0), ("spectral_ops", 1.05), ("PEFT accelerated", 1.06), ("PEFT", 1.4),
                                ("autograd", 1.3))]  # fmt: skip
    return [*rows, layer("rosa", "frozen"), layer("rosa", "spectral_ops", red=True, error=0.5), layer("rosa", "PEFT")]


def grown(verdict="as predicted", variable="tokens"):
    return results.Growth(
        operator="block_sum", backend="cpu", dtype="float32", variable=variable, values=[256, 512, 1024],
        seconds=[1e-5, 2e-5, 4e-5], predicted=[1e-5, 1.8e-5, 3.5e-5], verdict=verdict,
    )  # fmt: skip


def verdicts(a, b):
    return {change.name.split()[0]: change.verdict for change in compare.changes(a, b)}


def test_a_slowdown_is_found_and_a_run_beside_itself_is_not():
    """20 turns, 2 % noise: 5 % is found in 19 of 20 runs; A beside A shows a difference at most at the rate said."""
    found = flagged = excluded = 0
    for seed in range(TRIALS):
        state = random.Random(seed)
        a, same, slower = (noisy(state, seconds) for seconds in (1.0, 1.0, 1.05))
        rows = [made_up(operators=[operator(times=times)]) for times in (a, same, slower)]
        flagged += verdicts(rows[0], rows[1]) != {"block_sum": "no difference"}
        found += verdicts(rows[0], rows[2]) == {"block_sum": "slower"}
        low, high = compare.ratio_and_bounds(a, same, 0.1)[1]
        excluded += not low <= 1 <= high
    assert flagged <= compare.FALSE_RATE * TRIALS
    assert found >= 0.95 * TRIALS
    assert 0.04 * TRIALS <= excluded <= 0.16 * TRIALS  # the interval's own rate, 0.1, without the smallest difference


def test_many_rows_share_the_rate():
    wrong = 0
    for seed in range(20):
        state = random.Random(seed)
        runs = [
            made_up(operators=[operator(times=noisy(state, 1, 0.1), tokens=t) for t in range(30)]) for _ in range(2)
        ]
        wrong += any(change.verdict != "no difference" for change in compare.changes(*runs))
    assert wrong <= 1


def test_layers_are_compared_by_ratios_and_operators_by_times():
    """B's machine is twice as slow, for the frozen layer too."""
    a = made_up(layers=[layer(), layer("dora")], operators=[operator()])
    slow = [2 * t for t in a.layers[0].times]
    worse = [1.1 * r for r in a.layers[1].ratios]
    b = made_up(layers=[layer(times=slow), layer("dora", ratios=worse)], operators=[operator(seconds=2e-3)])
    assert verdicts(a, b) == {"lora": "no difference", "dora": "slower", "block_sum": "slower"}


def test_on_another_machine_operators_are_compared_by_their_floor():
    a = made_up(operators=[operator(), operator("column_norm")], overhead=[results.Overhead(
        name="lora", implementation="spectral_ops", tokens=1, times=[1e-5] * 20)])  # fmt: skip
    b = dataclasses.replace(a, meta=a.meta | {"threads": 1}, operators=[
        operator(seconds=2e-3, floor_seconds=1e-3), operator("column_norm", seconds=2e-3)])  # fmt: skip
    assert verdicts(a, b) == {"block_sum": "no difference", "column_norm": "slower"}
    assert "THE MACHINES DIFFER" in compare.report(a, b)[0]


def test_models_are_compared_beside_the_frozen_one():
    def step(implementation, seconds):
        return results.Training(
            model="smollm2", method="lora", implementation=implementation, compiled=False, checkpointing=False,
            dtype="float32", batch=1, length=128, blocks=2, times=noisy(random.Random(implementation), seconds),
            tokens_per_second=1.0, peak_bytes=None, loss=None,
        )  # fmt: skip

    a = made_up(training=[step("frozen", 1.0), step("spectral_ops", 1.2)])
    b = made_up(training=[step("frozen", 2.0), step("spectral_ops", 2.4)])
    assert verdicts(a, b) == {"smollm2": "no difference"}
    b.training[1] = step("spectral_ops", 2.8)
    assert verdicts(a, b) == {"smollm2": "slower"}


def test_red_rows_bytes_lone_rows_and_few_turns():
    a = made_up(layers=[layer(), layer("dora"), layer("bone"), layer("bat", turns=3)], growth=[grown()])
    b = made_up(
        layers=[layer(red=True), layer("dora", saved_bytes=2**21), layer("rosa"), layer("bat", turns=3)],
        growth=[grown("GROWS")],
    )
    found = list(compare.changes(a, b))
    regressions = {(c.name.split()[0], c.verdict) for c in found if c.regression}
    assert regressions == {("lora", "RED"), ("dora", "saves more"), ("block_sum", "GROWS")}
    text, worse = compare.report(a, b)
    assert worse and "too few turns" in text and "--repeats" in text
    assert "only in A: 1\n  bone" in text and "only in B: 1\n  rosa" in text
    assert not compare.report(a, a)[1]
    assert {c.verdict for c in compare.changes(b, a)} >= {"no longer RED", "no longer GROWS"}


@pytest.fixture
def run_file(tmp_path):
    operators = [operator(), operator("csr_gather_", flops=0), operator("lowrank_backward", backend="triton", seed=2)]
    run = made_up(layers=methods(), operators=operators, growth=[grown(), grown("GROWS", "rank")])
    path = tmp_path / "run.json"
    results.write(path, run)
    return path


def test_compare_on_the_command_line(run_file, tmp_path, capsys):
    assert cli.main(["bench", "--compare", str(run_file), str(run_file)]) == 0
    assert "0 regressions" in capsys.readouterr().out
    run = results.read(run_file)
    run.layers[1].ratios = [1.2 * r for r in run.layers[1].ratios]
    results.write(tmp_path / "worse.json", run)
    assert cli.main(["bench", "--compare", str(run_file), str(tmp_path / "worse.json")]) == 1
    assert "slower" in capsys.readouterr().out


def test_every_picture_is_drawn(run_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--draw", str(run_file), "--png", str(tmp_path / "pictures")]) == 0
    files = {path.name for path in (tmp_path / "pictures").iterdir()}
    names = ("roofline", "tax-2048x2048", "memory-2048x2048", "growth-tokens", "growth-rank")
    assert files == {f"2026-11-22-abc1234-{name}.png" for name in names}
    assert capsys.readouterr().out.count("drawn: ") == len(files)


def test_pictures_name_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"spectral_ops\[bench\]"):
        pictures.pyplot()


def test_the_table_goes_between_the_markers(run_file, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- results: cpu -->\nold\n<!-- end -->\nafter\n<!-- results: gpu -->\nkept\n<!-- end -->\n"
    )
    for _ in range(2):  # the second time over its own table
        assert publish.main(["results", str(run_file), str(page)]) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(
            "<!-- end -->\nafter\n<!-- results: gpu -->\nkept\n<!-- end -->\n"
        )
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(line) for line in lines} == {len(publish.HEADER)}
    by_method = {line[0].strip("| "): line for line in lines}
    lora = by_method["lora r16"]
    assert float(lora[4]) == pytest.approx(1.4, abs=0.05) and "(autograd)" in lora[5]
    assert lora[7] == "1.06" and lora[9] == "1.00 / 1.00"
    assert float(lora[6].strip("*")) == pytest.approx(results.read(run_file).layers[1].ratio, abs=1e-3)
    assert by_method["rosa r16"][6] == "RED"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="wanted one"):
        publish.write(results.read(run_file), page)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_readme_has_a_place_for_every_device(device, tmp_path):
    """README for the summary, docs/PERFORMANCE.md for every line."""
    root = Path(__file__).resolve().parents[2]
    for name, section in (("README.md", "summary"), ("docs/PERFORMANCE.md", "results")):
        page = tmp_path / "page.md"
        page.write_text((root / name).read_text())
        assert publish.write(made_up(layers=[layer(device=device)]), page) == [section]
        assert page.read_text().count("abc1234") == 1


def test_a_whole_block_is_one_line_and_has_the_targets_of_a_gpu():
    """Half of a block's frozen time at ratio 1.0 and half at 1.2 make 1.1; a red projection makes all of it red."""
    block = sizes.BLOCKS["llama3-8b"]
    rows = []
    for i, ((d, k), count) in enumerate(block.items()):
        seconds = 1 / count
        for name, ratio in (("frozen", 1.0), ("spectral_ops", 1.0 + 0.2 * (i % 2))):
            rows.append(layer(
                implementation=name, ratios=[ratio] * 5, times=[ratio * seconds] * 5, floor_seconds=seconds / 2,
                out_features=d, in_features=k, tokens=8192, dtype="bfloat16", device="cuda",
            ))  # fmt: skip
    (line,) = [line for line in publish.render(made_up(layers=rows)).splitlines() if line.startswith("| lora")]
    cells = line.strip("| ").split(" | ")
    assert cells[3:9] == ["llama3-8b block, T=8192", "–", "–", "**1.100**", "1.11", "45"]
    assert cells[9] == f"– / {sum(block.values()):.2f}"
    rows[1] = dataclasses.replace(rows[1], red=True)
    assert "| RED |" in publish.render(made_up(layers=rows))


def synthetic(exponent, launch=0.0, noise=0.05):
    """An operator that reads its argument once, takes 3 times as long as that needs, and a clock that believes it."""
    now, state = 0.0, random.Random(1)

    def run(x):
        nonlocal now
        now += (
            launch + 3 * 4 * 1000 ** (1 - exponent) * x.numel() ** exponent / CEILING.bytes_per_second
        ) * state.lognormvariate(0, noise)

    def ticking(call):
        before = now
        call()
        return now - before

    class Made:
        name, cost = "made", staticmethod(lambda x: Cost(0, 4 * x.numel()))

        def __call__(self, x):
            run(x)

    return Made(), ticking


@pytest.mark.parametrize(
    ("exponent", "launch", "verdict"),
    [(1, 0, "as predicted"), (1, 1e-6, "as predicted"), (2, 0, "GROWS"), (2, 1e-6, "GROWS"), (1.5, 0, "GROWS")],
)
def test_growth_beyond_the_formula_is_named(monkeypatch, exponent, launch, verdict):
    made, ticking = synthetic(exponent, launch)
    monkeypatch.setattr(clock, "timer", lambda device: ticking)
    samples = {n: (torch.empty(n),) for n in (1000, 2000, 4000, 8000)}
    found = growth.series(made, "cpu", torch.float32, "tokens", samples, CEILING, "cpu", 9)
    assert found.verdict == verdict
    assert found.values == [1000, 2000, 4000, 8000] and found.predicted[0] == pytest.approx(found.seconds[0])


def test_leaving_the_cache_is_no_growth():
    """Five times faster than memory while small, as fast as memory afterwards: an exponent above 2 on the way."""
    floors = [1.0, 2.0, 4.0, 8.0]
    times = [[factor * floor] * 5 for factor, floor in zip((0.2, 0.2, 0.6, 1.1), floors, strict=True)]
    assert not growth.grows([1, 2, 4, 8], times, floors)


def test_growth_measures_the_variables_that_an_operator_has(monkeypatch):
    monkeypatch.setattr(growth, "BASE", {"cpu": {"tokens": 16, "features": 32}})
    monkeypatch.setattr(growth, "VALUES", {"cpu": {"tokens": (4, 8, 16), "features": (32, 64, 128)}})
    monkeypatch.setattr(growth, "COMMON", {"rank": (4, 8, 16), "density": (0.1, 0.2, 0.4)})
    monkeypatch.setattr(growth, "USUAL", {"rank": 4, "density": 0.1})
    names = ["column_norm", "block_sum", "csr_spmm_"]
    found = list(growth.measure(names, [torch.float32], "cpu", {"float32": CEILING}, repeats=3))
    variables = {name: [g.variable for g in found if g.operator == name] for name in names}
    assert variables == {
        "column_norm": ["features", "rank"],
        "block_sum": ["tokens", "features", "rank"],
        "csr_spmm_": ["tokens", "features", "density"],
    }
    assert all(len(g.seconds) == len(g.predicted) == 3 and min(g.seconds) > 0 for g in found)
    assert len(tables.growth_table(found).splitlines()) == 2 + len(found)


KEPT = (Path(__file__).resolve().parents[2] / "benchmarks" / "results").rglob("*.json")
RUNS = [path for path in sorted(KEPT) if "format" in json.loads(path.read_text())]  # of bench, not of an example


def test_runs_are_kept():
    assert len(RUNS) >= 7


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_kept_run_can_be_read_and_compared_with_itself(path):
    found = results.read(path)
    assert found.layers or found.training
    assert not compare.report(found, found)[1]
