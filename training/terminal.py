"""The progress bar of a run."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from cli import progress

_SHOWN = {"loss": "train_loss", "valid": "valid_score", "sparsity": "sparsity_expected", "target": "sparsity_target"}


class UpdateProgressBar(Callback):
    """Shows one bar over all updates: loss, the last score, expected sparsity and its target, time left."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            total, done = trainer.max_steps, trainer.global_step
            self._bar = progress(None, self._stage, total=total, initial=done, unit="update", delay=0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._bar is not None and self._bar.n < trainer.global_step:
            metrics = trainer.callback_metrics
            shown = {label: f"{metrics[name]:.3f}" for label, name in _SHOWN.items() if name in metrics}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
