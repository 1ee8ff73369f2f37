"""Every field of every PEFT config has a place here: what it does, why it has no effect, or that it is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

import spectral_ops as so  # noqa: E402
from spectral_ops.adapters.files.saved_config import read_config  # noqa: E402

PAIRS = {
    so.LoRAConfig: peft.LoraConfig, so.DoRAConfig: peft.LoraConfig, so.AdaLoRAConfig: peft.AdaLoraConfig,
    so.BoneConfig: peft.MissConfig, so.BatConfig: peft.MissConfig, so.VeRAConfig: peft.VeraConfig,
}  # fmt: skip
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS.items(), ids=[config.__name__ for config in PAIRS])
NEEDED = {"target_modules": ["0"], "total_step": 10}


def build(config, **fields):
    names = {f.name for f in dataclasses.fields(config)}
    return config(**{name: value for name, value in {**NEEDED, **fields}.items() if name in names})


def fields_of(config):
    return {f.name for f in dataclasses.fields(config)}


@pairs
def test_every_field_of_pefts_is_known(ours, theirs):
    assert fields_of(theirs) <= ours.known_fields() | set(ours.peft_refused)


@pairs
def test_what_a_file_says_is_pefts(ours, theirs):
    """No field is written that PEFT would leave out, but for those that say so."""
    written = set(build(ours).peft_fields())
    assert written <= fields_of(theirs) | {"peft_type", *ours.peft_flags}
    lacking = fields_of(ours) - fields_of(theirs)
    newer = {"trainable_token_indices", "ensure_weight_tying"}  # than the oldest PEFT
    assert lacking - newer == set(ours.ours_only)


@pairs
def test_the_same_defaults(ours, theirs):
    """A field that both have means the same where nobody gave it."""
    mine, other = build(ours), build(theirs, r=build(ours).r)
    for name in fields_of(ours) & fields_of(theirs) - set(NEEDED) - {"bias", "r", "inference_mode"}:
        got, want = getattr(mine, name), getattr(other, name)
        assert got == want or (not got and not want), name


@pairs
def test_refused_and_idle_fields(ours, theirs, tmp_path):
    so.save_adapter(so.attach(nn.Sequential(nn.Linear(64, 64)), build(ours, r=8)), tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for name, what in ours.peft_refused.items():
        path.write_text(json.dumps({**saved, name: True}))
        with pytest.raises(ValueError, match=f"got {name}=True, which {what}"):
            read_config(tmp_path)
        path.write_text(json.dumps({**saved, name: None}))
        read_config(tmp_path)
    path.write_text(json.dumps(saved))
    want, idle = read_config(tmp_path), set(ours.peft_idle) - {"peft_type"}
    path.write_text(json.dumps({**saved, **dict.fromkeys(idle, "anything")}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(tmp_path) == want
