"""The training of a coded model on samples in memory; `coin.pipeline.steps.merge.Training` is that of a run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer

from coin.core.batches import as_input, joined, take
from coin.core.lightning import silence_lightning
from coin.data import Calibration, pooled
from coin.data.sampling import batch_loader
from coin.data.tasks import PositionedSamples
from coin.merging import Experts
from coin.modules.distillation import DistillationModule
from coin.statistics.guard import differentiable, trainable


def fit_in_memory(module: DistillationModule, experts: Experts, held_out: float, options: dict[str, Any]) -> None:
    """Run a Trainer with these options, silently, on the samples but a held-out share, on which it validates."""
    # On the networks' device and of their type; a DataError where samples differ in shape.
    whole = as_input(joined(list(experts.pooled)), experts.networks[0])
    own = [take(whole, (experts.tasks == task).nonzero().flatten()) for task in range(experts.count)]
    size, seed = module.hparams["batch_size"], module.hparams["seed"] or 0
    samples = replace(pooled([Calibration.of_batches([batch]) for batch in own]), batch_size=size)
    module.samples, left_out = samples.split(held_out) if held_out else (samples, None)
    train = batch_loader(PositionedSamples(module.samples), size, seed, None, shuffle=True)
    validation: Any = batch_loader(PositionedSamples(left_out), size, seed, None) if left_out else []
    parameters = trainable(module.student).values()
    device = next(iter(parameters)).device
    with _quietly(), differentiable(parameters):
        trainer = Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        trainer.fit(module, train, validation)
    module.student.to(device).zero_grad()


@contextmanager
def _quietly() -> Iterator[None]:
    """Run a block without Lightning's notices and its warnings about intended behaviour."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            silence_lightning()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
