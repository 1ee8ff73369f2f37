"""Estimates of GPU kernels: the model by hand-made kernels, the reader by machine code, the run that measures."""

import json

import pytest

from benchmarks.estimates import __main__ as command
from benchmarks.estimates import measure, model, sass, table
from benchmarks.estimates.cases import CASES, MORE, TOKENS
from benchmarks.estimates.model import Code, Work, estimate, resident
from spectral_ops._library import OPERATORS
from spectral_ops.backends import unavailable

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x0000000402047981 */
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R8, R4, R2, R8 ;   /* 0x000000020408723c */
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;               /* 0x0000001002027810 */
        /*0040*/               @P0 BRA 0x20 ;                             /* 0xfffffffc00f00947 */
        /*0050*/               @P1 BRA 0x10 ;                             /* 0xfffffffc00ec1947 */
        /*0060*/               @P1 BRA 0x80 ;                             /* 0x0000000000041947 */
        /*0070*/                   EXIT ;                                 /* 0x000000000000794d */
        /*0080*/                   BRA 0x80;                              /* 0xfffffffc00fc7947 */
"""


def test_loops_are_the_backward_branches():
    inner, outer = sass.loops(SASS)
    assert inner == ["HMMA.16816.F32.BF16", "IADD3", "BRA"]
    assert outer == ["LDG.E.128.CONSTANT", *inner, "BRA"]
    code = Code(32, 0, [outer, inner])
    assert code.loop("HMMA") == inner and code.loop("LDG") == outer
    with pytest.raises(LookupError):
        code.loop("MOVM")


def test_names_lose_namespaces_and_parameters():
    long = "void spectral_ops::cuda::(anonymous namespace)::f<__nv_bfloat16, 2, (bool)1>(spectral_ops::cuda::G<int>)"
    assert sass.plain(long) == "f<__nv_bfloat16, 2, true>"
    assert sass.plain("spectral_ops::cuda::(anonymous namespace)::g(int)") == "g"


@pytest.mark.parametrize(
    "registers, shared, threads, blocks",
    [(255, 0, 256, 1), (128, 0, 256, 2), (129, 0, 256, 1), (64, 0, 256, 4), (32, 0, 256, 8), (32, 0, 32, 32),
     (32, 99 * 1024, 256, 2), (32, 227 * 1024, 256, 1), (168, 0, 384, 1)],
)  # fmt: skip
def test_blocks_on_a_processor(registers, shared, threads, blocks):
    assert resident(registers, shared, threads) == blocks


def test_memory_bounds_a_copy_and_too_few_loads_slow_it():
    bytes_, code = 1 << 26, Code(32, 0, [["LDG.E.128", "STG.E.128", "BRA"]])
    whole = 132 * 8
    enough = estimate(code, Work({"LDG": 1000}, bytes_, in_flight=16 * 256), whole, 256, 0)
    assert enough.bound == "dram" and enough.seconds == pytest.approx(bytes_ / model.DRAM)
    few = estimate(code, Work({"LDG": 1000}, bytes_, in_flight=2 * 256), whole, 256, 0)
    assert few.bound == "latency" and few.seconds == pytest.approx(bytes_ * model.LATENCY / (whole * 512))


def test_each_unit_bounds_what_is_made_of_it():
    for opcode, unit in (("HMMA.16816.F32", "tensor"), ("FFMA", "issue"), ("LOP3.LUT", "alu"), ("MUFU.RCP", "xu"),
                         ("LDS.128", "shared"), ("SHFL.BFLY", "lsu"), ("MOVM.16.MT88", "movm")):  # fmt: skip
        code = Code(32, 0, [[opcode] * 64])
        time = estimate(code, Work({opcode: 64e6}, 0, 0), 132, 256, 0)
        assert time.bound == unit
        cycles = {"issue": 1, "shared": 16}.get(unit) or model.UNITS[unit][0]
        assert time.seconds == pytest.approx(64e6 * cycles / (132 * 4) / model.CLOCK)


def test_a_wave_that_is_not_whole_costs_a_whole_one():
    code, work = Code(255, 0, [["FFMA"] * 10]), Work({"FFMA": 1e7}, 0, 0)
    one, more, half = (estimate(code, work, blocks, 256, 0).seconds for blocks in (132, 133, 66))
    assert more == pytest.approx(one * 2 * 132 / 133) and half == pytest.approx(2 * one)


def arguments(*words: str):
    return command.parser().parse_args(
        ["--measure", "--device", "cpu", "--tokens", "8", "--shrink", "32", "--repeats", "1", *words]
    )


@pytest.mark.thorough
def test_measuring_runs_every_case(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    assert measure.run(arguments("--json", str(file))) == 0
    found = json.loads(file.read_text())
    compiled = [case for case in (*CASES, *MORE) if not unavailable(OPERATORS[case.operator], "cpu", "cpu")]
    assert {(row["operator"], row["label"]) for row in found} == {(case.operator, case.label) for case in compiled}
    assert all(row["seconds"] > 0 for row in found)
    assert "left out" not in capsys.readouterr().out


def test_a_wrong_result_has_no_time(monkeypatch, capsys):
    monkeypatch.setattr(measure.judge, "relative_error", lambda operator, args: 1.0)
    monkeypatch.setattr(measure, "CASES", CASES[:1])
    monkeypatch.setattr(measure, "MORE", ())
    assert measure.run(arguments()) == 1
    assert "RED" in capsys.readouterr().out


def test_a_kernel_that_raises_costs_no_other(monkeypatch, capsys):
    def error(operator, args):
        if operator.name == CASES[0].operator:
            raise SystemError("ptxas\nmore")
        return 0.0

    monkeypatch.setattr(measure.judge, "relative_error", error)
    monkeypatch.setattr(measure, "MORE", ())
    assert measure.run(arguments()) == 1
    text = capsys.readouterr().out
    assert f"{CASES[0].name} on cpu: SystemError: ptxas\n" in text
    assert f"\n{CASES[-1].operator} {CASES[-1].label} " in text and "RED" not in text[text.rindex(CASES[-1].operator) :]


def test_measuring_stops_in_time(capsys):
    assert measure.run(arguments("--seconds", "0")) == 0
    assert "were left out" in capsys.readouterr().out


def test_the_file_has_every_case():
    rows = table.read()
    compiled = {row.key[1:] for row in rows if row.backend == "cuda"}
    assert compiled == {(case.operator, case.label, *size) for case in CASES for size in table.sizes(case)}
    assert TOKENS[0] == 8192 and all(0 < row.share <= 1 for row in rows)
