"""examples/experts.py on the mixture that it builds: PEFT's experts accelerated and ours train alike."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_both_ways_train_alike(capsys):
    import experts

    experts.main()
    shown = capsys.readouterr().out
    assert "4 layers fused" in shown and "0 left to PEFT" in shown
    losses = [re.findall(r"\d\.\d{4}", line) for line in shown.splitlines() if line.startswith(("PEFT,", "native:"))]
    assert len(losses) == 2 and losses[0] == losses[1] and float(losses[0][-1]) < float(losses[0][0])
