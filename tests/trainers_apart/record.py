"""What a run did, written down by a callback as the last thing: losses, and what ran in each adapted layer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

import spectral_ops


class Record(TrainerCallback):
    def __init__(self, path: str | Path):
        self.path, self.losses = Path(path), []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        found = {"losses": self.losses}
        try:
            report = spectral_ops.report(model)
        except ValueError as nothing:
            found["refused"] = str(nothing)
        else:
            found |= {"counts": report.counts, "reasons": report.grouped(), "calls": [row.calls for row in report.rows]}
        self.path.write_text(json.dumps(found))
