"""Dense float64 formulas of METHODS 1.1 to 1.5, written straight from that text; they call nothing that they judge.

``v`` is a problem's tensors, ``c`` its constants (scale, mask, norm, minus_one). On absolute values a formula adds up
the absolute values of its terms.
"""

from __future__ import annotations

import torch


def lora(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    h = dropped @ v["A"].T
    if "core" in v:
        h = h * v["core"] if v["core"].dim() == 1 else h @ v["core"]
    y = v["x"] @ v["weight"].T + c["scale"] * (h @ v["B"].T)
    y = y * v["out_scale"] if "out_scale" in v else y
    return y + v["bias"] if "bias" in v else y


def lora_update(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    h = dropped @ v["A"].T
    if "core" in v:
        h = h * v["core"] if v["core"].dim() == 1 else h @ v["core"]
    y = v["base_out"] + c["scale"] * (h @ v["B"].T)
    if "out_scale" not in v:
        return y
    if "bias" not in v:
        return v["out_scale"] * y
    return v["out_scale"] * (y + c["minus_one"] * v["bias"]) + v["bias"]


def dora(v, c):
    g = v["magnitude"] / c["norm"]
    bias = v.get("bias", 0.0)
    if "mask" not in c:
        return g * (v["x"] @ v["weight"].T + c["scale"] * ((v["x"] @ v["A"].T) @ v["B"].T)) + bias
    dropped = v["x"] * c["mask"]  # PEFT's form
    update = c["scale"] * ((dropped @ v["A"].T) @ v["B"].T)
    return v["x"] @ v["weight"].T + bias + (g + c["minus_one"]) * (dropped @ v["weight"].T) + g * update


def dora_update(v, c):
    g = v["magnitude"] / c["norm"]
    y = v["base_out"] + c["scale"] * ((v["x"] @ v["A"].T) @ v["B"].T)
    if "bias" not in v:
        return g * y
    return g * (y + c["minus_one"] * v["bias"]) + v["bias"]


def shard_of(features: int, count: int, spec) -> list[int]:
    """The shard each feature belongs to, counted out one by one."""
    if spec is None:
        return list(range(features))
    if spec == "cyclic":
        return [i % count for i in range(features)]
    return [shard for shard, size in enumerate(spec) for _ in range(size)]


def shard_delta(D: torch.Tensor, k: int, d: int, in_shards="cyclic", out_shards="cyclic") -> torch.Tensor:
    """ΔW [d, k] of DiSHA, formed: ΔW[o, i] = D[shard(i), shard'(o)]."""
    sigma, tau = shard_of(k, D.shape[0], in_shards), shard_of(d, D.shape[1], out_shards)
    return D[sigma][:, tau].T


def shards(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    k, d = v["x"].shape[-1], c["out_features"]
    base = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    y = base + dropped @ shard_delta(v["D"], k, d, c["in_shards"], c["out_shards"]).T
    return y + v["bias"] if "bias" in v else y


def shard_sums(v, c):
    k = v["x"].shape[-1]
    return torch.stack([v["x"][..., p :: c["r"]].sum(-1) for p in range(min(c["r"], k))], -1)


def siblings(v, c):
    outputs = []
    for i in range(c["siblings"]):
        part = {"x": v["x"], **{n[:-1]: t for n, t in v.items() if n.endswith(str(i))}}
        outputs.append(lora(part, {"scale": c["scale"] * (i + 1)}))
    return torch.cat(outputs, -1)


def bat_changed(weight: torch.Tensor, blocks: torch.Tensor, mode: str) -> torch.Tensor:
    """W' [d, k] of Bat: W(o,j)(I + B) + B with the B of block-row o (col) or of block-column j (row). test_bat.py
    compares it with one block after the other."""
    r = blocks.shape[-1]
    W = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).transpose(1, 2)  # [o, j] of blocks
    B = blocks.unsqueeze(1 if mode == "col" else 0)
    return (W @ (torch.eye(r, dtype=blocks.dtype) + B) + B).transpose(1, 2).reshape(weight.shape)


def bat(v, c):
    y = v["x"] @ bat_changed(v["weight"], v["blocks"], c["mode"]).T
    return y + v["bias"] if "bias" in v else y


def vera(v, c):
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    y = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    y = y + ((dropped @ v["random_A"].T * v["lambda_d"]) @ v["random_B"].T) * v["lambda_b"]
    return y + v["bias"] if "bias" in v else y


def randlora(v, c):
    S = v["lambda_"].unsqueeze(2) * v["random_A"].unsqueeze(1) * v["gamma"]
    delta = c["scale"] * v["random_B"] @ S.flatten(0, 1)
    if delta.shape[1] != v["x"].shape[-1]:
        delta = delta.T
    y = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    y = y + v["x"] @ delta.T
    return y + v["bias"] if "bias" in v else y


def sparse_delta(values: torch.Tensor, row_offsets, columns, shape) -> torch.Tensor:
    """S [d, k] formed from CSR, row by row."""
    rows = [o for o, (a, b) in enumerate(zip(row_offsets, row_offsets[1:], strict=False)) for _ in range(a, b)]
    places = tuple(torch.tensor(index, dtype=torch.int64) for index in (rows, columns))
    return torch.zeros(shape, dtype=values.dtype).index_put(places, values)


def rosa(v, c):
    k, d = v["x"].shape[-1], c["out_features"]
    S = sparse_delta(v["values"], c["row_offsets"], c["columns"], (d, k))
    if "weight" in v:
        y = v["x"] @ v["weight"].T
    else:
        y = v["base_out"] if "base_out" in v else 0.0
    y = y + v["x"] @ S.T
    if "A" in v:
        dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
        y = y + c["scale"] * ((dropped @ v["A"].T) @ v["B"].T)
    return y + v["bias"] if "bias" in v else y


def hadamard(v, c):
    other = v["w2_a"] @ v["w2_b"] if "w2_a" in v else v["weight"]
    y = v["x"] @ (c["scale"] * (v["w1_a"] @ v["w1_b"]) * other).T
    y = y + (v["x"] @ v["weight"].T if "weight" in v else v["base_out"])
    return y + v["bias"] if "bias" in v else y


def kron(v, c):
    w1, w2 = (v[w] @ v[f"{w}_b"] if f"{w}_b" in v else v[w] for w in ("w1", "w2"))
    y = c["scale"] * v["x"] @ torch.kron(w1, w2).T
    y = y + (v["x"] @ v["weight"].T if "weight" in v else v["base_out"])
    return y + v["bias"] if "bias" in v else y


def svft(v, c):
    m = v["Vh"].shape[0]
    M = sparse_delta(v["values"], c["row_offsets"], c["columns"], (m, m))
    y = v["x"] @ v["weight"].T + (v["x"] @ v["Vh"].T @ M.T) @ v["U"].T
    return y + v["bias"] if "bias" in v else y


def segments(v, c):
    """One adapter after the other, over the rows that are its own."""
    y = v["base_out"] if "base_out" in v else v["x"] @ v["weight"].T
    dropped = v["x"] * c["mask"] if "mask" in c else v["x"]
    for s, scale in enumerate(c["scales"]):
        own = (c["ids"] == s).unsqueeze(-1).to(y.dtype)
        y = y + own * ((c["scale"] * scale) * ((dropped @ v[f"A{s}"].T) @ v[f"B{s}"].T))
    return y + v["bias"] if "bias" in v else y


def experts(v, c):
    """One expert after the other on every row, times how much of it a row has: 0 or 1, or its routing weights."""
    x = v["x"].reshape(-1, v["x"].shape[-1])
    dropped = x * c["mask"] if "mask" in c else x
    own = c["own"].to(x.dtype)
    if "routing" in v:
        own = (own * v["routing"].unsqueeze(-1)).sum(1)
    y = x.new_zeros(x.shape[0], v["weight0"].shape[1])
    for e in range(own.shape[1]):
        part = x @ v["weight0"][e].T + c["scale"] * ((dropped @ v["A0"][e].T) @ v["B0"][e].T)
        y = y + own[:, e : e + 1] * (part + v["bias"][e] if "bias" in v else part)
    return y.reshape(*v["x"].shape[:-1], y.shape[1])


def weight_norm(weight, A, B, scale) -> torch.Tensor:
    """‖W + scale B A‖ per row, formed, in float64."""
    return (weight.double() + scale * (B.double() @ A.double())).square().sum(1).sqrt()


def sampled_columns(d, k) -> torch.Tensor:
    """The columns [d, n] of W [d, k] that DoRA's fingerprint reads in each row; the last ones may lie beyond k."""
    spacing = 1
    while 2 * spacing <= min(d, k, d * k // 4096):
        spacing *= 2
    first = torch.arange(d) * (spacing * 40503 // 2**16 | 1) % spacing  # 40503 / 2**16: the golden ratio's fraction
    return first[:, None] + torch.arange(0, k, spacing)


def sampled_entries(d, k) -> torch.Tensor:
    """Which entries [d, k] those are."""
    columns = sampled_columns(d, k)
    wide = torch.zeros(d, columns.max() + 1, dtype=torch.bool)
    return wide.scatter_(1, columns, True)[:, :k]
