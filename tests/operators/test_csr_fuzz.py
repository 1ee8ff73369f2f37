"""Malformed CSR, thousands of them: each is refused with a Python error that names the argument; none reaches a kernel.

``python tests/operators/test_csr_fuzz.py`` runs the same rounds; a test does so in a process, where a crash shows.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy
import torch
from instruments import fresh_python

import spectral_ops
from spectral_ops import CSR

MALFORMED, RANDOM, TAMPERED, VALID = 2400, 600, 400, 400
HERE = str(Path(__file__).parent)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NAMES = ("values", "row_offsets", "col_indices", "shape")


def int32(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def valid(rng: random.Random) -> dict:
    """A well-formed CSR of up to 9 x 9, unsorted within its rows in one case of three."""
    d, k = rng.randint(1, 9), rng.randint(1, 9)
    ordered = rng.random() < 2 / 3
    offsets, columns = [0], []
    for _ in range(d):
        row = rng.sample(range(k), rng.choice([0, rng.randint(0, k), k]))
        columns += sorted(row) if ordered else row
        offsets.append(len(columns))
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    return {
        "values": torch.randn(len(columns)).to(dtype), "row_offsets": int32(offsets), "col_indices": int32(columns),
        "shape": (d, k), "sorted": ordered,
    }  # fmt: skip


def is_well_formed(values, row_offsets, col_indices, shape, sorted) -> bool:
    """The definition, in plain Python, of what int32 index vectors have to satisfy."""
    (d, k), offsets, columns = shape, row_offsets.tolist(), col_indices.tolist()
    if len(offsets) != d + 1 or len(columns) != len(values) or offsets[0] != 0 or offsets[-1] != len(columns):
        return False
    for a, b in zip(offsets, offsets[1:], strict=False):
        row = columns[a:b] if 0 <= a <= b <= len(columns) else [-1]
        if any(not 0 <= c < k for c in row) or len(set(row)) < len(row):
            return False
        if sorted and any(x > y for x, y in zip(row, row[1:], strict=False)):
            return False
    return True


# --- ways to spoil one -----------------------------------------------------------------------------------------------
# each gets the arguments and a generator, changes one of them, and returns the names that an error may give; None: it
# does not apply here


def some_object(rng):
    return rng.choice(
        [None, True, 3, 2.5, float("nan"), "values", b"\0" * 16, [1, 2], (0.5,), {"a": 1}, {1}, object(), print,
         numpy.zeros(3), numpy.arange(4, dtype=numpy.int32), numpy.float32(1), CSR, torch.float32]
    )  # fmt: skip


def spoil_kind(c, rng):
    name = rng.choice(NAMES[:3])
    c[name] = some_object(rng)
    return [name]


def spoil_dtype(c, rng):
    name = rng.choice(NAMES[:3])
    floats = [torch.float32, torch.float64, torch.bfloat16]
    integers = [torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool]
    others = [torch.complex64, torch.int32] if name == "values" else floats
    c[name] = c[name].to(rng.choice(integers + others))
    return [name]


def spoil_dimensions(c, rng):
    name = rng.choice(NAMES[:3])
    t = c[name]
    if t.numel() == 1 or rng.random() < 0.5:
        c[name] = rng.choice([t.unsqueeze(0), t.unsqueeze(1), t.reshape(1, -1, 1)])
    else:
        c[name] = t.sum().to(t.dtype)
    return [name]


def spoil_strides(c, rng):
    name = rng.choice(NAMES[:3])
    t = c[name]
    if t.numel() < 2:
        return None
    wide = t.new_zeros(2 * t.numel())
    wide[::2] = t
    c[name] = rng.choice([wide[::2], t[:1].expand(t.numel())])
    return [name]


def spoil_layout(c, rng):
    name = rng.choice(NAMES[:3])
    c[name] = c[name].float().to_sparse() if name == "values" else c[name].to_sparse()
    return [name]


def spoil_device(c, rng):
    names = rng.choice([NAMES[:1], NAMES[1:2], NAMES[2:3], NAMES[:3]])
    for name in names:
        c[name] = c[name].to("meta")
    return ["row_offsets"] if len(names) == 3 else ["row_offsets", "col_indices"]


def spoil_length(c, rng):
    name = rng.choice(NAMES[:3])
    t, change = c[name], rng.choice([-3, -2, -1, 1, 2, 50])
    if t.numel() + change < 0:
        return None
    c[name] = t[:change].clone() if change < 0 else torch.cat([t, t.new_zeros(change)])
    return [name] if name == "row_offsets" else ["col_indices"]


def spoil_first_offset(c, rng):
    c["row_offsets"][0] = rng.choice([-1, 1, INT_MIN, INT_MAX, -7])
    return ["row_offsets"]


def spoil_last_offset(c, rng):
    nnz = c["values"].numel()
    c["row_offsets"][-1] = rng.choice([n for n in (nnz - 1, nnz + 1, nnz + 4096, INT_MAX, INT_MIN, -1) if n != nnz])
    return ["row_offsets"]


def spoil_middle_offset(c, rng):
    d, nnz = c["shape"][0], c["values"].numel()
    if d < 2:
        return None
    place = rng.randint(1, d - 1)
    low, high = int(c["row_offsets"][place - 1]), int(c["row_offsets"][place + 1])
    c["row_offsets"][place] = rng.choice([low - 1, high + 1, -1, nnz + 1, INT_MIN, INT_MAX])
    return ["row_offsets"]


def spoil_all_offsets(c, rng):
    nnz = c["values"].numel()
    c["row_offsets"] = rng.choice([c["row_offsets"].flip(0), torch.full_like(c["row_offsets"], nnz + 1)])
    return ["row_offsets"] if nnz or int(c["row_offsets"][0]) else None


def spoil_column(c, rng):
    nnz, k = c["col_indices"].numel(), c["shape"][1]
    if not nnz:
        return None
    c["col_indices"][rng.randrange(nnz)] = rng.choice([-1, k, k + 1, INT_MIN, INT_MAX, -k, 32768 + k, 65536])
    return ["col_indices"]


def rows_of_two(c):
    offsets = c["row_offsets"].tolist()
    return [(a, b) for a, b in zip(offsets, offsets[1:], strict=False) if b - a >= 2]


def spoil_by_repeating(c, rng):
    if not rows_of_two(c):
        return None
    a, b = rng.choice(rows_of_two(c))
    first, second = rng.sample(range(a, b), 2)
    c["col_indices"][first] = c["col_indices"][second].clone()
    return ["col_indices"]


def spoil_order(c, rng):
    if not c["sorted"] or not rows_of_two(c):
        return None
    a, b = rng.choice(rows_of_two(c))
    place = rng.randrange(a, b - 1)
    c["col_indices"][[place, place + 1]] = c["col_indices"][[place + 1, place]]
    return ["col_indices"]


def spoil_shape(c, rng):
    d, k = c["shape"]
    c["shape"] = rng.choice(
        [None, d, "dk", {d, k + 9}, (d,), (d, k, 1), (), (str(d), k), (float(d), k), (d, float("nan")), (True, k),
         (d, None), (-d, k), (d, -1), (d + 1, k), (d - 1, k), (2**31, k), (d, 2**31), (d, 2**40), torch.tensor([d, k]),
         (numpy.float64(d), k), (d, float("inf")), torch.Size([d])]
    )  # fmt: skip
    return ["shape", "row_offsets"]


def spoil_width(c, rng):
    if not c["col_indices"].numel():
        return None
    c["shape"] = (c["shape"][0], rng.randint(0, int(c["col_indices"].max())))
    return ["col_indices"]


SPOILERS = [f for name, f in sorted(globals().items()) if name.startswith("spoil_")]


# --- rounds ----------------------------------------------------------------------------------------------------------


def use(rng: random.Random, csr: CSR, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Hand a CSR to one of those who must check it first."""
    d, k = shape
    x, dy, W = torch.ones(3, k, dtype=dtype), torch.ones(3, d, dtype=dtype), torch.zeros(d, k, dtype=dtype)
    if isinstance(csr.values, torch.Tensor) and csr.device.type == "meta":
        return rng.choice([csr.validate, csr.transpose, csr.to_dense, csr.to_sparse_csr])()
    way = rng.choice([
        csr.validate, csr.transpose, csr.to_dense, csr.to_sparse_csr,
        lambda: spectral_ops.csr_add(W, csr), lambda: spectral_ops.csr_add(W, csr, inplace=True),
        lambda: spectral_ops.csr_spmm(x, csr), lambda: spectral_ops.csr_sddmm(dy, x, csr),
        lambda: spectral_ops.rosa_update(dy.clone(), x, csr),
        *(lambda r=r: spectral_ops.rosa_linear(x, W, csr, route=r) for r in ("auto", "spmm", "scatter", "resident")),
    ])  # fmt: skip
    before = W.clone()
    try:
        way()
    except Exception:
        assert torch.equal(W, before), "W was written before the check"
        raise
    finally:
        spectral_ops.residents.restore(W)


def refused(names, function) -> str:
    """The function raises one of the three errors, and its last line begins with one of the names."""
    try:
        function()
    except Exception as error:
        last = str(error).splitlines()[-1] if str(error) else ""
        assert type(error) in (TypeError, ValueError, IndexError), f"{type(error).__name__}: {error}"
        match = re.match(rf"({'|'.join(names)}): got .*wanted .*", last)
        assert match, f"{last!r} does not name {names}"
        return match[1]
    raise AssertionError("accepted")


def malformed(count: int) -> dict[str, int]:
    """How often each spoiler was refused."""
    done = {f.__name__: 0 for f in SPOILERS}
    seed = 0
    while sum(done.values()) < count:
        rng = random.Random(seed)
        spoiler = SPOILERS[seed % len(SPOILERS)]
        seed += 1
        arguments = valid(rng)
        before = {n: str(v) for n, v in arguments.items()}
        good = arguments["shape"], arguments["values"].dtype
        names = spoiler(arguments, rng)
        if names is None:
            continue
        try:
            refused(names, lambda a=arguments, g=rng, s=good: use(g, CSR(**a), *s))
        except AssertionError as error:
            raise AssertionError(f"seed {seed - 1}, {spoiler.__name__} of {before}: {arguments}: {error}") from error
        done[spoiler.__name__] += 1
    return done


def at_random(count: int) -> tuple[int, int]:
    """Index vectors of noise, near to the valid range: accepted exactly where the definition says so."""
    accepted = 0
    for seed in range(count):
        rng = random.Random(-1 - seed)
        d, k, nnz = rng.randint(1, 3), rng.randint(1, 4), rng.randint(0, 4)
        offsets = [rng.randint(0, nnz) for _ in range(d + 1)]
        if rng.random() < 0.8:
            offsets = sorted([0, *offsets[2:], nnz])
        columns = [rng.randint(0 if rng.random() < 0.9 else -1, k - 1) for _ in range(nnz)]
        arguments = {
            "values": torch.randn(nnz), "row_offsets": int32(offsets), "col_indices": int32(columns), "shape": (d, k),
            "sorted": rng.random() < 0.5,
        }  # fmt: skip
        if is_well_formed(**arguments):
            use(rng, CSR(**arguments), (d, k), torch.float32)
            accepted += 1
        else:
            refused(NAMES, lambda a=arguments, g=rng, s=(d, k): use(g, CSR(**a), s, torch.float32))
    return accepted, count - accepted


def tampered(count: int) -> int:
    """Checked once, then changed: the next use looks again."""
    seed = done = 0
    spoilers = [f for f in SPOILERS if f is not spoil_shape]
    while done < count:
        rng = random.Random(10_000 + seed)
        spoiler = spoilers[seed % len(spoilers)]
        seed += 1
        arguments = valid(rng)
        csr, good = CSR(**arguments).validate(), (arguments["shape"], arguments["values"].dtype)
        if rng.random() < 0.5:
            csr = csr.with_values(arguments["values"] + 1)
        names = spoiler(arguments, rng)  # in place, or another tensor to put there
        if names is None:
            continue
        for name in NAMES:
            setattr(csr, name, arguments[name])
        try:
            refused([*names, *NAMES[:3]], lambda c=csr, g=rng, s=good: use(g, c, *s))
        except AssertionError as error:
            raise AssertionError(f"seed {seed - 1}, {spoiler.__name__}: {arguments}: {error}") from error
        done += 1
    return done


def accepted(count: int) -> int:
    for seed in range(count):
        rng = random.Random(20_000 + seed)
        arguments = valid(rng)
        assert is_well_formed(**arguments)
        use(rng, CSR(**arguments), arguments["shape"], arguments["values"].dtype)
    return count


def everything() -> str:
    done = malformed(MALFORMED)
    assert min(done.values()) >= MALFORMED / len(SPOILERS) / 3, done  # every way was tried often
    good, bad = at_random(RANDOM)
    assert good > RANDOM / 10 and bad > RANDOM / 10, (good, bad)
    return f"refused {sum(done.values()) + bad + tampered(TAMPERED)}, accepted {good + accepted(VALID)}"


def test_malformed_is_refused_and_well_formed_is_not():
    """In this process, for the message of a failure."""
    assert sum(malformed(MALFORMED).values()) == MALFORMED
    at_random(RANDOM)
    assert tampered(TAMPERED) == TAMPERED
    assert accepted(VALID) == VALID


def test_none_of_it_crashes():
    """In a process of its own: a crash is a wrong exit status, also one that only shows when memory is freed."""
    done = fresh_python(
        f"import sys; sys.path.insert(0, {HERE!r}); import test_csr_fuzz as t; print(t.everything())",
        MALLOC_CHECK_="3",
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-4000:])
    refused_count, accepted_count = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert refused_count > 2400 and accepted_count > VALID


if __name__ == "__main__":
    print(everything())
    sys.exit(0)
