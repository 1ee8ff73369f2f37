"""Lightning: the model is accelerated before the Trainer sees it, or by auto(); numbers are stock PEFT's."""

import copy

import pytest
import torch

lightning = pytest.importorskip("lightning")

from peft import get_peft_model  # noqa: E402
from tiny import ADAPTED, conversations, language_model, tokenizer  # noqa: E402
from training import CONFIGS, STEPS  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches():
    words = tokenizer()
    rows = [words(c["instruction"] + c["output"])["input_ids"][:20] for c in conversations(STEPS)]
    return torch.utils.data.DataLoader(torch.tensor(rows))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("more", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulated"])
def test_same_as_stock_peft(method, more, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(language_model(), CONFIGS[method]())
    plain, fused = Module(copy.deepcopy(adapted)), Module(adapted)
    report = accelerate(fused.model, strict=True)
    for module in (plain, fused):
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path, **more,
        )  # fmt: skip
        trainer.fit(module, batches())
    assert len(plain.losses) == 2 * STEPS and fused.losses == pytest.approx(plain.losses, rel=1e-5)
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=2e-5)
    assert report.counts["fused"] == ADAPTED and {row.calls for row in report.rows} == {2 * STEPS}


def test_a_checkpoint_of_lightnings_loads_into_plain_peft(tmp_path):
    torch.manual_seed(0)
    module = Module(get_peft_model(language_model(), CONFIGS["dora"]()))
    accelerate(module.model, strict=True)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    plain = Module(get_peft_model(language_model(), CONFIGS["dora"]()))
    plain.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    ids = next(iter(batches()))
    with torch.no_grad():
        torch.testing.assert_close(plain.model(ids).logits, module.model(ids).logits, rtol=1e-4, atol=1e-5)
