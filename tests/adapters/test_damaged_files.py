"""Thousands of damaged adapter files: a clear error and an untouched model, or a load that is right."""

from __future__ import annotations

import json
import random
import struct
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

safetensors = pytest.importorskip("safetensors.torch")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors import safe_open  # noqa: E402

import spectral_ops as so  # noqa: E402
from spectral_ops.init import topk_pattern  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ERRORS = (ValueError, TypeError, FileNotFoundError, IndexError)
ON = {"target_modules": ["1", "3"]}
CONFIGS = {
    "lora": so.LoRAConfig(
        r=3, bias="lora_only", modules_to_save=["4"], trainable_token_indices={"0": [2, 5]}, rank_pattern={"3": 2}, **ON
    ),
    "pissa": so.LoRAConfig(r=2, init_lora_weights="pissa", **ON),
    "dora": so.DoRAConfig(r=2, **ON),
    "bone": so.BoneConfig(r=4, bias="all", **ON),
    "bat": so.BatConfig(r=4, **ON),
    "adalora": so.AdaLoRAConfig(init_r=3, target_r=2, total_step=9, **ON),
    "rosa": so.RoSAConfig(r=2, d=0.1, **ON),
    "pica": so.PiCaConfig(r=2, **ON),
    "svft": so.SVFTConfig(off_diag=1, **ON),
    "spectral": so.SpectralConfig(r=2, residual=True, **ON),
    "vera": so.VeRAConfig(r=5, **ON),
    "dash": so.LoRADashConfig(r=2, directions=2, **ON),
}
VALUES = [
    None, True, False, 0, -1, 3, 2.5, 1e30, 10**30, "", "x", "(", "all-linear", [], [1], ["x"], [None], [[]], {},
    {"1": 2}, {"1": -1}, {"1": "x"}, {"[": 1}, {"x": [1, 2]}, [0, 10**30],
]  # fmt: skip


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 4))


def saved(method: str, folder: Path) -> Path:
    model = so.attach(net(), CONFIGS[method])
    for layer in so.adapter_layers(model).values():
        if "rosa_values" in layer.held("default"):
            places = torch.rand(layer.out_features, layer.in_features)
            layer.set_mask(topk_pattern(places, layer.rosa_values["default"].numel()))
    so.save_adapter(model, folder, plain=False)
    return folder


class Trial:
    """A model that is loaded into again and again, and compared with what it was after every failure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, net()
        self.config, self.weights = ((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
        self.failed = self.loaded = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        return safetensors.load(self.weights)

    def metadata(self) -> dict[str, str]:
        (self.folder / WEIGHTS).write_bytes(self.weights)
        with safe_open(str(self.folder / WEIGHTS), framework="pt") as file:
            return file.metadata()

    def run(self, what: str, config: bytes | None = None, weights: bytes | None = None) -> None:
        (self.folder / CONFIG).write_bytes(self.config if config is None else config)
        (self.folder / WEIGHTS).write_bytes(self.weights if weights is None else weights)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                so.load_adapter(self.model, self.folder)
        except ERRORS as error:
            self.failed += 1
            text = str(error)
            assert self.folder.name in text or "adapter_" in text, f"{what}: the error names no file: {error!r}"
            self.untouched(what)
        except BaseException as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            self.loaded += 1
            self.right(what)
            self.model = net()

    def untouched(self, what: str) -> None:
        fresh = net()
        assert [type(m) for m in self.model] == [type(m) for m in fresh], what
        for (name, p), (other, q) in zip(self.model.named_parameters(), fresh.named_parameters(), strict=True):
            assert name == other and torch.equal(p, q) and p.requires_grad, f"{what}: {name}"

    def right(self, what: str) -> None:
        for name, p in self.model.named_parameters():
            assert torch.isfinite(p).all(), f"{what}: {name}"
        out = self.model(torch.arange(9))
        huge = "lora_alpha" in what or what == "edited" or "data byte" in what  # an α, or an exponent, that overflows
        assert out.shape == (9, 4) and (torch.isfinite(out).all() or huge), what
        stored = safetensors.load_file(self.folder / WEIGHTS)
        for layer in so.adapter_layers(self.model).values():
            for key in layer.held("default"):
                own = getattr(layer, key)["default"]
                assert not own.numel() or any(
                    t.shape == own.shape and torch.equal(t.to(own.dtype), own.detach()) for t in stored.values()
                ) or key in layer.settings["default"].unsaved, f"{what}: {key}"  # fmt: skip


@pytest.fixture
def trial(request, tmp_path):
    return Trial(saved(request.param, tmp_path / "adapter"))


every_method = pytest.mark.parametrize("trial", CONFIGS, indirect=True)


@every_method
def test_bytes(trial):
    """Cut at every place that may matter, and with bytes changed in the header and in the data."""
    data, draw = trial.weights, random.Random(5)
    (header,) = struct.unpack("<Q", data[:8])
    start = 8 + header
    cuts = {0, 1, 7, 8, 9, start - 1, start, start + 1, len(data) - 1}
    cuts |= {draw.randrange(len(data)) for _ in range(20)}
    for cut in sorted(cuts):
        trial.run(f"cut at {cut}", weights=data[:cut])
    assert trial.failed == len(cuts) and not trial.loaded
    for size in (0, 1, header - 1, header + 1, len(data), 2**31, 2**63 - 1, 2**64 - 1):
        trial.run(f"a header of {size}", weights=struct.pack("<Q", size) + data[8:])
    for tail in (b"x", b"\0" * 64):
        trial.run("more at the end", weights=data + tail)
    for place in [draw.randrange(8, start) for _ in range(60)]:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        trial.run(f"header byte {place}", weights=bytes(changed))
    for place in [draw.randrange(start, len(data)) for _ in range(25)]:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        trial.run(f"data byte {place}", weights=bytes(changed))


@every_method
def test_tensors(trial):
    metadata = trial.metadata()
    whole = trial.tensors()

    def run(what, tensors):
        trial.run(what, weights=safetensors.save(tensors, metadata))

    for key, tensor in whole.items():
        others = {name: t for name, t in whole.items() if name != key}
        before = trial.failed
        run(f"{key} missing", others)
        for name in (f"{key}.weight", f"x.{key}", key.removeprefix("base_model."), key.upper(), key[:-1], ""):
            run(f"{key} renamed {name}", {**others, name: tensor})
        flat = tensor.reshape(-1)
        for other in (
            flat[:0].clone(), tensor.unsqueeze(0), torch.cat([tensor, tensor]), flat[: max(1, len(flat) // 2)].clone(),
            tensor.new_zeros(()), tensor.new_zeros(1, 1, 1, 1, 1), tensor.to(torch.complex64), tensor.bool(),
            tensor.to(torch.int64), tensor.to(torch.uint8),
        ):  # fmt: skip
            if other.shape != tensor.shape or other.dtype is not tensor.dtype:
                run(f"{key} as {list(other.shape)} {other.dtype}", {**others, key: other.contiguous()})
        if tensor.is_floating_point():
            for value in (float("nan"), float("inf"), -float("inf")):
                broken = tensor.clone().reshape(-1)
                broken[-1] = value
                run(f"{key} with {value}", {**others, key: broken.reshape(tensor.shape)})
        else:
            run(f"{key} as floats", {**others, key: tensor.float()})
            for value in (-1, 10**6, -(2**31)):
                broken = tensor.clone().reshape(-1)
                if "steps" not in key:
                    broken[-1] = value
                    run(f"{key} with {value}", {**others, key: broken.reshape(tensor.shape)})
        assert trial.failed - before >= 12, key
    run("an extra tensor", {**whole, "more": torch.zeros(2)})
    run("nothing", {})
    for note in ("{", "[]", '{"format": 99}', '{"format": "x"}', '{"base": 3}', '{"base": {"1": "!"}}', "null", "3"):
        trial.run(f"note {note}", weights=safetensors.save(whole, {"format": "pt", "spectral_ops": note}))


@every_method
def test_fields(trial):
    whole = json.loads(trial.config)
    for field in (*whole, "unheard_of"):
        for value in VALUES:
            trial.run(f"{field}={value!r}", config=json.dumps({**whole, field: value}).encode())
        trial.run(f"no {field}", config=json.dumps({k: v for k, v in whole.items() if k != field}).encode())
    assert trial.failed > 150 and trial.loaded > 10


@pytest.mark.parametrize("trial", ["lora"], indirect=True)
def test_json(trial):
    for text in ("", "{", "[]", "3", "null", '"x"', "{}", "[" * 10**5, '{"r": NaN}', "\0", '{"peft_type": "LORA"}'):
        trial.run(text[:20], config=text.encode())
    trial.run("no text", config=b"\xff\xfe\x00")
    trial.run("twice", config=trial.config.replace(b'"r": 3', b'"r": 4, "r": 3'))
    assert trial.loaded == 1


def test_the_file_of_another_method(tmp_path):
    folders = {method: saved(method, tmp_path / method) for method in CONFIGS}
    files = {method: [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)] for method, folder in folders.items()}
    for method, folder in folders.items():
        trial = Trial(folder)
        for other, (config, weights) in files.items():
            if other != method:
                trial.run(f"{other}'s tensors", weights=weights)
                trial.run(f"{other}'s config", config=config)
        assert trial.failed == 2 * (len(files) - 1)


@st.composite
def edits(draw, data: bytes) -> bytes:
    """``data`` with up to four stretches overwritten, inserted, cut out or copied elsewhere."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 24)))
        other = draw(st.binary(max_size=12) | st.integers(0, len(data)).map(lambda i, d=data: d[i : i + 12]))
        data = data[:start] + other + data[draw(st.sampled_from([start, end, start + len(other)])) :]
    return data


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
def test_any_edit_of_the_bytes(which, tmp_path):
    """What hypothesis makes of a file, and shrinks where it breaks something."""
    trials = {method: Trial(saved(method, tmp_path / method)) for method in CONFIGS}

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def edited(data):
        trial = trials[data.draw(st.sampled_from(list(CONFIGS)))]
        whole = trial.config if which == CONFIG else trial.weights
        trial.run("edited", **{"config" if which == CONFIG else "weights": data.draw(edits(whole))})

    edited()
    assert sum(trial.failed for trial in trials.values()) > 200
