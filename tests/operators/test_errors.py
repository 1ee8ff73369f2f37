"""Bad input: the error's type, and a last line that names the argument, what came and what was wanted."""

from __future__ import annotations

import re

import pytest
import torch
from instruments import fresh_python

import spectral_ops
from spectral_ops import CSR, BackendUnavailable, _library, use_backend

T, k, d, r = 3, 8, 6, 2


def t(*shape, dtype=torch.float32, device="cpu", trained=False):
    return torch.ones(shape, dtype=dtype, device=device, requires_grad=trained)


def tokens(*shape, dtype=torch.int64, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def sparse(rows=d, columns=k, dtype=torch.float32, device="cpu"):
    """A CSR with one entry, in its last place."""
    offsets = torch.tensor([0] * rows + [1], dtype=torch.int32, device=device)
    where = torch.tensor([columns - 1], dtype=torch.int32, device=device)
    return CSR(t(1, dtype=dtype, device=device), offsets, where, (rows, columns))


def arguments(function: str) -> dict:
    """Good arguments of a public function; a test replaces one."""
    low_rank = {"lora_A": t(r, k), "lora_B": t(d, r)}
    linear = {"x": t(T, k), "weight": t(d, k)}
    update = {"base_out": t(T, d), "x": t(T, k)}
    return {
        "lowrank_linear": {**linear, **low_rank, "bias": t(d)},
        "lowrank_update": {**update, **low_rank},
        "lowrank_linear_group": {"x": t(T, k), "layers": [(t(d, k), t(r, k), t(d, r), None, 1.0)]},
        "column_norm": {"weight": t(d, k), **low_rank},
        "dora_linear": {**linear, **low_rank, "magnitude": t(d), "bias": t(d)},
        "dora_update": {**update, **low_rank, "magnitude": t(d), "norm": t(d)},
        "block_sum": {"x": t(T, k), "r": r},
        "bone_linear": {**linear, "bone": t(r, d), "bias": t(d)},
        "bone_update": {**update, "bone": t(r, d)},
        "disha_linear": {**linear, "D": t(r, 3), "in_shards": "cyclic", "out_shards": [1, 2, 3], "bias": t(d)},
        "bat_linear": {**linear, "bat": t(d // r, r, r), "bias": t(d)},
        "bat_weight": {"weight": t(d, k), "bat": t(d // r, r, r)},
        "csr_add": {"weight": t(d, k), "csr": sparse()},
        "csr_spmm": {"x": t(T, k), "csr": sparse()},
        "csr_sddmm": {"dy": t(T, d), "x": t(T, k), "csr": sparse()},
        "rosa_linear": {**linear, "csr": sparse(), **low_rank, "bias": t(d)},
        "rosa_update": {**update, "csr": sparse()},
        "token_logprobs": {"hidden": t(T, k), "lm_head_weight": t(d, k), "targets": tokens(T)},
        "kl_to_anchor": {"logp": t(T), "logp_anchor": t(T)},
        "preference_loss": {"chosen": t(T), "rejected": t(T)},
    }[function]


FUNCTIONS = [
    "lowrank_linear", "lowrank_update", "lowrank_linear_group", "column_norm", "dora_linear", "dora_update",
    "block_sum", "bone_linear", "bone_update", "disha_linear", "bat_linear", "bat_weight", "csr_add", "csr_spmm",
    "csr_sddmm", "rosa_linear", "rosa_update", "token_logprobs", "kl_to_anchor", "preference_loss",
]  # fmt: skip
DENSE = ["lowrank_linear", "dora_linear", "bone_linear", "disha_linear", "bat_linear", "rosa_linear"]
UPDATES = ["lowrank_update", "dora_update", "bone_update", "rosa_update"]
BAT = ["bat_linear", "bat_weight"]
SPARSE = ["csr_add", "csr_spmm", "csr_sddmm", "rosa_linear", "rosa_update"]
LOWRANK = ["lowrank_linear", "lowrank_update", "dora_linear", "dora_update", "column_norm", "rosa_linear"]
DROPOUT = ["lowrank_linear", "lowrank_update", "dora_linear", "bone_linear", "bone_update", "rosa_linear"]
SCALED = ["lowrank_linear", "lowrank_update", "dora_linear", "dora_update", "column_norm", "rosa_linear"]

NAN, INF = float("nan"), float("inf")
# functions, the argument, the bad value (made on use), the error, what the message says of it, and what it wants
TABLE = [
    # kinds
    *[(DENSE + UPDATES + ["block_sum", "lowrank_linear_group"], "x", lambda v=v: v, TypeError, what, "a tensor")
      for v, what in (("text", "'text'"), (None, "None"), (3, "3 (int)"), ([1.0], "list"))],
    (DENSE + ["column_norm"], "weight", lambda: "W", TypeError, "'W'", "a tensor"),
    (DENSE + ["column_norm"], "weight", lambda: None, TypeError, "None", "a tensor"),
    (UPDATES, "base_out", lambda: True, TypeError, "True", "a tensor"),
    (LOWRANK, "lora_A", lambda: True, TypeError, "True", "a tensor"),
    (LOWRANK, "lora_B", lambda: 0.5, TypeError, "0.5", "a tensor"),
    (DENSE, "bias", lambda: "none", TypeError, "'none'", "a tensor"),
    (["lowrank_update", "dora_update"], "bias", lambda: "none", TypeError, "'none'", "a tensor"),
    (["dora_linear", "dora_update"], "magnitude", lambda: None, TypeError, "None", "a tensor"),
    (["dora_linear", "dora_update"], "norm", lambda: "c", TypeError, "'c'", "a tensor"),
    (["dora_update"], "norm", lambda: None, TypeError, "None", "a tensor"),
    (["bone_linear", "bone_update"], "bone", lambda: 4, TypeError, "4", "a tensor"),
    (["disha_linear"], "D", lambda: "cyclic", TypeError, "'cyclic'", "a tensor"),
    (["lowrank_linear", "lowrank_update"], "core", lambda: True, TypeError, "True", "a tensor"),
    (["lowrank_linear", "lowrank_update"], "out_scale", lambda: 2.0, TypeError, "2.0", "a tensor"),
    # dtypes
    (DENSE + UPDATES + ["block_sum"], "x", lambda: t(T, k, dtype=torch.int64), TypeError, "int64", "float64, float32"),
    (["block_sum"], "x", lambda: t(T, k, dtype=torch.complex64), TypeError, "complex64", "float64, float32"),
    (["block_sum"], "x", lambda: t(T, k, dtype=torch.bool), TypeError, "bool", "float64, float32"),
    (DENSE, "weight", lambda: t(d, k, dtype=torch.int8), TypeError, "int8", "float64, float32"),
    (DENSE, "weight", lambda: t(d, k, dtype=torch.bfloat16), TypeError, "bfloat16", "float32 as x"),
    (DENSE, "bias", lambda: t(d, dtype=torch.float16), TypeError, "float16", "float32 as x"),
    (LOWRANK, "lora_A", lambda: t(r, k, dtype=torch.float64), TypeError, "float64", "exactly where x"),
    (LOWRANK, "lora_B", lambda: t(d, r, dtype=torch.float64), TypeError, "float64", "exactly where x"),
    (["dora_linear", "dora_update"], "magnitude", lambda: t(d, dtype=torch.float64), TypeError, "float64", "where x"),
    (["dora_linear", "dora_update"], "norm", lambda: t(d, dtype=torch.bfloat16), TypeError, "bfloat16", "float32"),
    (["bone_linear", "bone_update"], "bone", lambda: t(r, d, dtype=torch.float64), TypeError, "float64", "where x"),
    (["disha_linear"], "D", lambda: t(r, 3, dtype=torch.float64), TypeError, "float64", "exactly where x"),
    # ranks and shapes
    (DENSE + ["block_sum"], "x", lambda: t(), ValueError, "[] float32", "at least one dimension"),
    (DENSE, "x", lambda: t(T, k + 1), ValueError, f"[{T}, {k + 1}] float32 on cpu", f"size {k} in dimension -1"),
    (["lowrank_linear_group"], "x", lambda: t(T, k + 1), ValueError, f"[{T}, {k + 1}]", f"size {k}"),
    (DENSE + ["column_norm"], "weight", lambda: t(d, k, 1), ValueError, f"[{d}, {k}, 1]", "2 dimensions"),
    (DENSE, "bias", lambda: t(d + 1), ValueError, f"[{d + 1}]", f"size {d}"),
    (DENSE, "bias", lambda: t(d, 1), ValueError, f"[{d}, 1]", "1 dimensions"),
    (UPDATES, "base_out", lambda: t(T + 1, d), ValueError, f"[{T + 1}, {d}]", f"the leading dimensions of x [{T}]"),
    (UPDATES, "base_out", lambda: t(1, T, d), ValueError, f"[1, {T}, {d}]", "the leading dimensions of x"),
    (["lowrank_update"], "base_out", lambda: t(T, d + 1), ValueError, f"[{d}, {r}]", f"size {d + 1}", "lora_B"),
    (["dora_update"], "base_out", lambda: t(T, d + 1), ValueError, f"[{d}]", f"size {d + 1}", "norm"),
    (["bone_update"], "base_out", lambda: t(T, d + 1), ValueError, f"[{r}, {d}]", f"out_features ({d + 1})", "bone"),
    (LOWRANK, "lora_A", lambda: t(r, k + 1), ValueError, f"[{r}, {k + 1}]", f"size {k} in dimension 1"),
    (LOWRANK, "lora_A", lambda: t(k), ValueError, f"[{k}]", "2 dimensions"),
    (LOWRANK, "lora_B", lambda: t(d + 1, r), ValueError, f"[{d + 1}, {r}]", f"size {d} in dimension 0"),
    (LOWRANK, "lora_B", lambda: t(d, r + 1), ValueError, f"[{d}, {r + 1}]", f"size {r} in dimension 1 (the rank"),
    (LOWRANK, "lora_A", lambda: t(0, k), ValueError, f"[0, {k}]", "at least one row"),
    (["dora_linear", "dora_update"], "magnitude", lambda: t(d, 1), ValueError, f"[{d}, 1]", "1 dimensions"),
    (["dora_linear", "dora_update"], "magnitude", lambda: t(k), ValueError, f"[{k}]", f"size {d}"),
    (["dora_linear", "dora_update"], "norm", lambda: t(k), ValueError, f"[{k}]", f"size {d}"),
    (["lowrank_linear", "lowrank_update"], "core", lambda: t(r + 1), ValueError, f"[{r + 1}]", f"[{r}] or [{r}, {r}]"),
    (["lowrank_linear", "lowrank_update"], "core", lambda: t(r, r, r), ValueError, f"[{r}, {r}, {r}]", f"[{r}, {r}]"),
    (["lowrank_linear", "lowrank_update"], "out_scale", lambda: t(k), ValueError, f"[{k}]", f"size {d}"),
    (["bone_linear", "bone_update"], "bone", lambda: t(d), ValueError, f"[{d}]", "2 dimensions"),
    (["bone_linear", "bone_update"], "bone", lambda: t(r, 4), ValueError, f"[{r}, 4]", f"out_features ({d})"),
    (["bone_linear", "bone_update"], "bone", lambda: t(r, 0), ValueError, f"[{r}, 0]", "q dividing"),
    (["bone_linear", "bone_update"], "bone", lambda: t(0, d), ValueError, "0", f"at least 1 and at most {k}"),
    (["bone_linear", "bone_update"], "bone", lambda: t(k + 1, d), ValueError, f"{k + 1}", f"at most {k}"),
    (["disha_linear"], "D", lambda: t(r, 4), ValueError, "3 blocks", "4", "out_shards"),
    (["disha_linear"], "D", lambda: t(k + 1, 3), ValueError, f"{k + 1}", f"at most {k}"),
    (["disha_linear"], "D", lambda: t(0, 3), ValueError, "0", "at least 1"),
    # devices and layouts
    (DENSE, "weight", lambda: t(d, k, device="meta"), ValueError, "meta", "cpu as x"),
    (DENSE, "bias", lambda: t(d, device="meta"), ValueError, "meta", "cpu as x"),
    (LOWRANK, "lora_A", lambda: t(r, k, device="meta"), ValueError, "meta", "cpu"),
    (LOWRANK, "lora_B", lambda: t(d, r, device="meta"), ValueError, "meta", "cpu"),
    (UPDATES, "base_out", lambda: t(T, d, device="meta"), ValueError, "meta", "cpu as x"),
    (["dora_linear", "dora_update"], "magnitude", lambda: t(d, device="meta"), ValueError, "meta", "cpu as x"),
    (["dora_linear", "dora_update"], "norm", lambda: t(d, device="meta"), ValueError, "meta", "cpu as x"),
    (["bone_linear", "bone_update"], "bone", lambda: t(r, d, device="meta"), ValueError, "meta", "cpu as x"),
    (["disha_linear"], "D", lambda: t(r, 3, device="meta"), ValueError, "meta", "cpu as x"),
    (["lowrank_linear", "lowrank_update"], "core", lambda: t(r, device="meta"), ValueError, "meta", "cpu as x"),
    (DENSE + UPDATES + ["block_sum"], "x", lambda: t(T, k).to_sparse(), ValueError, "sparse_coo", "strided"),
    (DENSE + ["column_norm"], "weight", lambda: t(d, k).to_sparse_csr(), ValueError, "sparse_csr", "strided"),
    (LOWRANK, "lora_B", lambda: t(d, r).to_sparse(), ValueError, "sparse_coo", "strided"),
    # numbers
    *[(DROPOUT, "dropout_p", lambda v=v: v, ValueError, what, "[0, 1)")
      for v, what in ((1.0, "1.0"), (-0.1, "-0.1"), (1.5, "1.5"), (NAN, "nan"), (INF, "inf"))],
    *[(DROPOUT, "dropout_p", lambda v=v: v, TypeError, what, "a number in [0, 1)")
      for v, what in ((True, "True"), ("0.1", "'0.1'"), (None, "None"))],
    (DROPOUT, "dropout_p", lambda: torch.tensor(0.1), TypeError, "", "a number in [0, 1)"),
    *[(SCALED, "scale", lambda v=v: v, ValueError, what, "a finite number")
      for v, what in ((NAN, "nan"), (INF, "inf"), (-INF, "-inf"))],
    *[(SCALED, "scale", lambda v=v: v, TypeError, what, "a number")
      for v, what in ((True, "True"), ("2", "'2'"), (None, "None"), (1j, "1j"))],
    *[(["block_sum"], "r", lambda v=v: v, ValueError, str(v), f"at least 1 and at most {k}") for v in (0, -1, k + 1)],
    *[(["block_sum"], "r", lambda v=v: v, TypeError, str(v), "an integer") for v in (True, 2.0, "2", None)],
    # a gradient that the fused operators do not compute
    (DENSE, "weight", lambda: t(d, k, trained=True), ValueError, "requires_grad=True", "frozen"),
    (["lowrank_linear", "lowrank_update"], "out_scale", lambda: t(d, trained=True), ValueError, "True", "a fixed"),
    # shard maps
    (["disha_linear"], "in_shards", lambda: [3, 4], ValueError, "sum to 7", f"{k}"),
    (["disha_linear"], "in_shards", lambda: [k], ValueError, "1 blocks", f"{r}"),
    (["disha_linear"], "in_shards", lambda: [k + 1, -1], ValueError, "-1", "at least 1"),
    (["disha_linear"], "in_shards", lambda: [k, 0], ValueError, "0", "at least 1"),
    (["disha_linear"], "in_shards", lambda: [k - 1, True], TypeError, "True", "an integer"),
    (["disha_linear"], "in_shards", lambda: [4.0, 4.0], TypeError, "4.0", "an integer"),
    (["disha_linear"], "in_shards", lambda: "runs", TypeError, "'runs'", '"cyclic"'),
    (["disha_linear"], "in_shards", lambda: 4, TypeError, "4", '"cyclic"'),
    (["disha_linear"], "in_shards", lambda: None, TypeError, "None", '"cyclic"'),
    (["disha_linear"], "out_shards", lambda: [1, 2, 4], ValueError, "sum to 7", f"{d}"),
    (["disha_linear"], "out_shards", lambda: [3, 3], ValueError, "2 blocks", "3"),
    (["disha_linear"], "out_shards", lambda: None, ValueError, f"[{r}, 3]", f"size {d}", "D"),
    # Bat
    *[(BAT, "bat", lambda v=v: v, TypeError, what, "a tensor") for v, what in ((4, "4"), (None, "None"))],
    (BAT, "bat", lambda: t(d // r, r, r, dtype=torch.int64), TypeError, "int64", "float64, float32"),
    (BAT, "bat", lambda: t(d // r, r, r, dtype=torch.float64), TypeError, "float64", "exactly where x"),
    (BAT, "bat", lambda: t(d, r), ValueError, f"[{d}, {r}]", "3 dimensions [out_features / r, r, r]"),
    (BAT, "bat", lambda: t(d // r, r, r + 1), ValueError, f"[{d // r}, {r}, {r + 1}]", "n r = out_features"),
    (BAT, "bat", lambda: t(d // r, r + 1, r), ValueError, f"[{d // r}, {r + 1}, {r}]", "n r = out_features"),
    (BAT, "bat", lambda: t(d // r + 1, r, r), ValueError, f"[{d // r + 1}, {r}, {r}]", f"out_features ({d})"),
    (BAT, "bat", lambda: t(k // r, r, r), ValueError, f"[{k // r}, {r}, {r}]", f"out_features ({d})"),
    (BAT, "bat", lambda: t(1, d, d), ValueError, f"blocks of {d}", f"divides out_features and in_features [{d}, {k}]"),
    (BAT, "bat", lambda: t(d, 0, 0), ValueError, f"[{d}, 0, 0]", "n r = out_features"),
    (BAT, "bat", lambda: t(0, r, r), ValueError, f"[0, {r}, {r}]", "n r = out_features"),
    (BAT, "bat", lambda: t(d // r, r, r, device="meta"), ValueError, "meta", "cpu as weight"),
    (BAT, "bat", lambda: t(d // r, r, r).to_sparse(), ValueError, "sparse_coo", "strided"),
    (BAT, "weight", lambda: t(d, k, trained=True), ValueError, "requires_grad=True", "frozen"),
    *[(BAT, "mode", lambda v=v: v, ValueError, what, '"col" or "row"')
      for v, what in (("column", "'column'"), (None, "None"), (0, "0"), (True, "True"))],
    # sparse
    *[(SPARSE, "csr", lambda v=v: v, TypeError, what, "a spectral_ops.CSR")
      for v, what in ((None, "None"), ("S", "'S'"), (3, "3"))],
    (SPARSE, "csr", lambda: t(d, k), TypeError, f"[{d}, {k}] float32", "a spectral_ops.CSR"),
    (SPARSE, "csr", lambda: t(d, k).to_sparse_csr(), TypeError, f"[{d}, {k}] float32", "a spectral_ops.CSR"),
    (SPARSE, "csr", lambda: sparse(d, k + 1), ValueError, f"shape [{d}, {k + 1}]", f"{k} columns"),
    (["csr_add", "csr_sddmm", "rosa_linear", "rosa_update"], "csr", lambda: sparse(d + 1), ValueError,
     f"shape [{d + 1}, {k}]", f"{d} rows"),
    (SPARSE, "csr", lambda: sparse(dtype=torch.float64), TypeError, "float64", "exactly where x"),
    (SPARSE, "csr", lambda: sparse(device="meta"), ValueError, "meta", "cpu as "),
    (["csr_spmm", "csr_sddmm"], "x", lambda: "text", TypeError, "'text'", "a tensor"),
    (["csr_spmm"], "x", lambda: t(), ValueError, "[] float32", "at least one dimension"),
    (["csr_spmm"], "x", lambda: t(T, k + 1), ValueError, f"[{d}, {k}]", f"{k + 1} columns", "csr"),
    (["csr_spmm", "csr_sddmm"], "x", lambda: t(T, k, dtype=torch.int64), TypeError, "int64", "float64, float32"),
    (["csr_sddmm"], "dy", lambda: None, TypeError, "None", "a tensor"),
    (["csr_sddmm"], "dy", lambda: t(T + 1, d), ValueError, f"[{T + 1}, {d}]", f"the leading dimensions of x [{T}]"),
    (["csr_sddmm"], "dy", lambda: t(T, d + 1), ValueError, f"shape [{d}, {k}]", f"{d + 1} rows", "csr"),
    (["csr_sddmm"], "dy", lambda: t(T, d, dtype=torch.bfloat16), TypeError, "bfloat16", "float32 as x"),
    (["csr_sddmm"], "dy", lambda: t(T, d, device="meta"), ValueError, "meta", "cpu as x"),
    (["csr_add"], "weight", lambda: t(d, k, 1), ValueError, f"[{d}, {k}, 1]", "2 dimensions"),
    (["csr_add"], "weight", lambda: None, TypeError, "None", "a tensor"),
    (["csr_add"], "weight", lambda: t(d, k, dtype=torch.int32), TypeError, "int32", "float64, float32"),
    (["rosa_update"], "base_out", lambda: t(T, d + 1), ValueError, f"shape [{d}, {k}]", f"{d + 1} rows", "csr"),
    (["rosa_update"], "base_out", lambda: t(T, d, dtype=torch.float64), TypeError, "float32", "where x", "csr"),
    (["rosa_linear"], "lora_A", lambda: None, ValueError, "None beside its partner", "both or neither"),
    (["rosa_linear"], "lora_B", lambda: None, ValueError, "None beside its partner", "both or neither"),
    *[(["rosa_linear"], "route", lambda v=v: v, ValueError, what, "'auto', 'resident', 'scatter', 'spmm'")
      for v, what in (("dense", "'dense'"), (None, "None"), (1, "1"))],
    *[(["rosa_linear", "rosa_update", "csr_spmm"], "gradient_route", lambda v=v: v, ValueError, what,
       "'auto', 'sampled', 'dense', 'compact'") for v, what in (("spmm", "'spmm'"), (None, "None"), (1, "1"))],
    # groups
    (["lowrank_linear_group"], "layers", lambda: [], ValueError, "no layers", "a non-empty sequence"),
    (["lowrank_linear_group"], "layers", lambda: 3, ValueError, "int", "a non-empty sequence"),
    (["lowrank_linear_group"], "layers", lambda: [3], ValueError, "int", "(weight, lora_A", "layers[0]"),
    (["lowrank_linear_group"], "layers", lambda: [(t(d, k), t(r, k))], ValueError, "2 entries", "", "layers[0]"),
    (["lowrank_linear_group"], "layers", lambda: [(t(d, k), t(r, k), t(d, r + 1), None, 1.0)], ValueError,
     f"[{d}, {r + 1}]", f"size {r}", "layers[0]: lora_B"),
    (["lowrank_linear_group"], "layers",
     lambda: [arguments("lowrank_linear_group")["layers"][0], (t(d, k), t(r, k), t(d, r), None, NAN)], ValueError,
     "nan", "a finite number", "layers[1]: scale"),
    # policy
    *[(["token_logprobs"], name, lambda v=v: v, TypeError, what, "a tensor")
      for name in ("hidden", "lm_head_weight", "targets") for v, what in ((None, "None"), ("text", "'text'"))],
    (["token_logprobs"], "hidden", lambda: t(), ValueError, "[] float32", "at least one dimension"),
    (["token_logprobs"], "hidden", lambda: t(T, k, dtype=torch.int32), TypeError, "int32", "float64, float32"),
    (["token_logprobs"], "lm_head_weight", lambda: t(d, k, 1), ValueError, f"[{d}, {k}, 1]", "2 dimensions"),
    (["token_logprobs"], "lm_head_weight", lambda: t(d, k + 1), ValueError, f"[{d}, {k + 1}]", f"size {k} in"),
    (["token_logprobs"], "lm_head_weight", lambda: t(d, k, device="meta"), ValueError, "meta", "cpu as hidden"),
    (["token_logprobs"], "lm_head_weight", lambda: t(d, k, dtype=torch.bfloat16), TypeError, "bfloat16", "float32 as"),
    (["token_logprobs"], "targets", lambda: t(T), TypeError, f"[{T}] float32", "int64 token numbers"),
    (["token_logprobs"], "targets", lambda: tokens(T, dtype=torch.int32), TypeError, "int32", "int64 token numbers"),
    (["token_logprobs"], "targets", lambda: tokens(T + 1), ValueError, f"[{T + 1}] int64", f"of hidden [{T}]"),
    (["token_logprobs"], "targets", lambda: tokens(T, device="meta"), ValueError, "meta", "cpu as hidden"),
    (["token_logprobs"], "targets", lambda: tokens(T) + d, IndexError, f"{d}", f"token numbers in [0, {d})"),
    (["token_logprobs"], "chunk", lambda: 0, ValueError, "0", "at least 1"),
    (["token_logprobs"], "chunk", lambda: 2.0, TypeError, "2.0", "an integer"),
    (["token_logprobs"], "ignore_index", lambda: None, TypeError, "None", "an integer"),
    (["token_logprobs"], "temperature", lambda: 0.0, ValueError, "0.0", "a number above 0"),
    (["token_logprobs"], "temperature", lambda: -1, ValueError, "-1", "a number above 0"),
    (["token_logprobs"], "temperature", lambda: NAN, ValueError, "nan", "a finite number"),
    (["token_logprobs"], "temperature", lambda: "hot", TypeError, "'hot'", "a number"),
    (["kl_to_anchor"], "logp", lambda: None, TypeError, "None", "a tensor"),
    (["kl_to_anchor"], "logp_anchor", lambda: 0.5, TypeError, "0.5", "a tensor"),
    (["kl_to_anchor"], "logp_anchor", lambda: t(1), ValueError, "[1] float32", f"the shape of logp [{T}]"),
    (["kl_to_anchor"], "logp_anchor", lambda: t(T, dtype=torch.float64), TypeError, "float64", "float32 as logp"),
    (["kl_to_anchor"], "logp_anchor", lambda: t(T, device="meta"), ValueError, "meta", "cpu as logp"),
    (["kl_to_anchor"], "estimator", lambda: "k2", ValueError, "'k2'", '"k1" or "k3"'),
    (["preference_loss"], "chosen", lambda: None, TypeError, "None", "a tensor"),
    (["preference_loss"], "rejected", lambda: [1.0], TypeError, "[1.0]", "a tensor"),
    (["preference_loss"], "rejected", lambda: t(T, 1), ValueError, f"[{T}, 1]", f"the shape of chosen [{T}]"),
    (["preference_loss"], "rejected", lambda: t(T, dtype=torch.bfloat16), TypeError, "bfloat16", "float32 as chosen"),
    (["preference_loss"], "rejected", lambda: t(T, device="meta"), ValueError, "meta", "cpu as chosen"),
    (["preference_loss"], "reduction", lambda: "average", ValueError, "'average'", '"mean", "sum" or "none"'),
]  # fmt: skip


def cases():
    for functions, argument, value, error, got, wanted, *named in TABLE:
        for function in functions:
            name = f"{function}-{argument}-{got or wanted}"
            yield pytest.param(function, argument, value, error, got, wanted, (named or [argument])[0], id=name)


@pytest.mark.parametrize(("function", "argument", "value", "error", "got", "wanted", "named"), list(cases()))
def test_message(function, argument, value, error, got, wanted, named):
    call = getattr(spectral_ops, function)
    bad = {**arguments(function), argument: value()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        call(**bad)
    assert type(raised.value) is error
    last = str(raised.value).splitlines()[-1]
    prefix = r"(layers\[0\]: )?" if function == "lowrank_linear_group" else ""
    pattern = rf"^{prefix}{re.escape(named)}: got .*{re.escape(got)}.*, wanted .*{re.escape(wanted)}"
    assert re.search(pattern, last), f"{last!r} does not match {pattern!r}"
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew from the generator"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_pass(function):
    """The table's starting point is not itself an error."""
    getattr(spectral_ops, function)(**arguments(function))


@pytest.mark.parametrize("function", DENSE + UPDATES)
def test_the_same_errors_under_autocast(function):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for bad in ("text", None):
            with pytest.raises(TypeError, match="^x: got .*, wanted a tensor"):
                getattr(spectral_ops, function)(**{**arguments(function), "x": bad})
        if "weight" in arguments(function):
            with pytest.raises(TypeError, match="^weight: got .*, wanted a tensor"):
                getattr(spectral_ops, function)(**{**arguments(function), "weight": 3})
            getattr(spectral_ops, function)(**{**arguments(function), "weight": t(d, k, dtype=torch.float16)})


@pytest.mark.parametrize("function", DENSE)
def test_a_trained_weight_is_allowed_where_no_gradient_is_taken(function):
    """Evaluating a model whose base layers still require grad is no error."""
    with torch.no_grad():
        getattr(spectral_ops, function)(**{**arguments(function), "weight": t(d, k, trained=True)})


def test_backend_names():
    for bad in ("gpu", "", "Reference"):
        with pytest.raises(
            ValueError, match=rf"^backend: got {bad!r}, wanted one of 'reference', 'cpu', 'triton', 'cu"
        ):
            with use_backend(bad):
                pass
    with pytest.raises(ValueError, match="^op: got 'nonsense', wanted one of .*block_sum"):
        spectral_ops.explain("nonsense")
    with pytest.raises(ValueError, match="^tensors: got tensors on cpu, meta, wanted one device"):
        spectral_ops.explain("block_sum", t(2), t(2, device="meta"))


def test_a_wrong_environment_variable_is_named_at_import():
    done = fresh_python("import spectral_ops", SPECTRAL_OPS_BACKEND="fast")
    assert done.returncode != 0
    assert "backend: got 'fast', wanted one of 'reference', 'cpu', 'triton', 'cuda'" in done.stderr.splitlines()[-1]


def test_backend_unavailable_is_a_runtime_error():
    assert issubclass(BackendUnavailable, RuntimeError)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="'cuda' was forced, but cannot run block_sum: "):
        spectral_ops.block_sum(t(T, k), r)


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) & set(_library.FUNCTIONS) | {"segmented_lowrank_linear"}))
def test_a_forced_backend_that_cannot_run_raises_in_every_function(function):
    """CPU tensors under "cuda": no function answers with another backend's numbers."""
    if function == "segmented_lowrank_linear":
        given = {"x": t(T, k), "weight": t(d, k), "lora_A_list": [t(r, k)], "lora_B_list": [t(d, r)],
                 "segment_ids": torch.zeros(T, dtype=torch.int64)}  # fmt: skip
    else:
        given = arguments(function)
    getattr(spectral_ops, function)(**given)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="'cuda' was forced, but cannot run"):
        getattr(spectral_ops, function)(**given)


@pytest.mark.parametrize(("k", "d"), [(0, 6), (8, 0), (0, 0)])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (0,)])
def test_no_features(lead, k, d):
    """Without inputs a layer is its bias, without outputs it is empty; gradients have the shapes they should."""
    calls = {
        "lowrank_linear": lambda x, W, b, A, B: spectral_ops.lowrank_linear(x, W, A, B, b),
        "dora_linear": lambda x, W, b, A, B: spectral_ops.dora_linear(x, W, A, B, t(d), b),
        "lowrank_update": lambda x, W, b, A, B: spectral_ops.lowrank_update(x @ W.t() + b, x, A, B),
    }
    if d:
        calls["rosa_linear"] = lambda x, W, b, A, B: spectral_ops.rosa_linear(x, W, empty_csr(d, k), A, B, b)
    for name, call in calls.items():
        x, A, B = t(*lead, k, trained=True), t(2, k, trained=True), t(d, 2, trained=True)
        y = call(x, t(d, k), t(d), A, B)
        assert y.shape == (*lead, d), name
        if k == 0 and name != "dora_linear":
            assert torch.equal(y, torch.ones_like(y)), name
        for grad, of in zip(torch.autograd.grad(y.sum(), (x, A, B)), (x, A, B), strict=True):
            assert grad.shape == of.shape, name
            assert torch.isfinite(grad).all() or (name == "dora_linear" and k == 0), (
                name
            )  # there c is 0, and m / c is not


def empty_csr(rows, columns):
    return CSR(t(0), torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), (rows, columns))


def test_a_block_needs_features():
    with pytest.raises(ValueError, match="^bone: "):
        spectral_ops.bone_linear(t(3, 0), t(6, 0), t(1, 6))
    with pytest.raises(ValueError, match="^bat: "):
        spectral_ops.bat_linear(t(3, 0), t(6, 0), t(6, 0, 0))
    with pytest.raises(ValueError, match="^bone: "):
        spectral_ops.bone_linear(t(3, 8), t(0, 8), t(2, 0))


@pytest.mark.parametrize("inplace", [False, True])
def test_csr_add_on_an_expanded_weight(inplace):
    expanded = t(1, k).expand(d, k)
    if inplace:
        with pytest.raises(ValueError, match="^weight: "):
            spectral_ops.csr_add(expanded, sparse(), inplace=True)
    else:
        total = spectral_ops.csr_add(expanded, sparse())
        assert torch.equal(total, expanded + sparse().to_dense())
