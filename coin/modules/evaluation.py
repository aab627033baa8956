"""How well a coded system in memory stands in for each of its experts, as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from coin.batches import as_input, take
from coin.coding import Answers, Decoder, DecoderConfig, DecoderKind, distinct_decoders, make_decoder
from coin.errors import ConfigurationError, DataError
from coin.metrics import DecodingAccuracy, Residual
from coin.modules.coded import Coded
from coin.statistics.guard import eval_mode, full_products


def evaluate(
    system: Coded,
    loaders: Sequence[Iterable[Any]],
    *,
    decoders: Sequence[DecoderKind | str | dict[str, Any] | DecoderConfig] = tuple(DecoderKind),
    calibration: Sequence[Iterable[Any]] | None = None,
) -> pd.DataFrame:
    """Measure how well every expert is decoded, on its own task, where it alone is lost.

    Every network runs once over the inputs, whatever the number of decoders. The numbers are those of a run's results.

    Args:
        system: The code, its experts and its coded models.
        loaders: For every expert the batches (inputs, labels) of its task's test set; labels are classes ``[B]``.
        decoders: Kinds, or configurations of one.
        calibration: For every expert the batches of its own task's samples, on which decoders are fitted without
            labels; the linear one needs none.

    Returns:
        One row a decoder and task, with the columns ``decoder``, ``task`` (the system's name of it),
        ``expert_accuracy``, ``decoded_accuracy``, ``nda``, ``agreement`` (`coin.metrics.DecodingAccuracy`) and
        ``residual`` (`coin.metrics.Residual`).

    Raises:
        ConfigurationError: The loaders or the calibration data are of another number of experts, a decoder does not
            exist or comes twice, or one that is to be fitted finds no calibration data.
        DataError: A batch of a loader is no pair of inputs and labels, or a task has none.
        DecodingError: The code cannot make up for the loss of an expert.
    """
    configs, count = distinct_decoders(list(decoders)), len(system.experts)
    for what, given in (("loaders", loaders), ("calibration data", calibration)):
        if given is not None and len(given) != count:
            raise ConfigurationError(f"found {what} of {len(given)} tasks, expected {count}; give every expert's")
    made = [(config, [make_decoder(config, system.code, [task]) for task in range(count)]) for config in configs]
    needy = [config.name for config, each in made if each[0].needs_fit]
    if needy and calibration is None:
        raise ConfigurationError(
            f"found no calibration, on which the decoder {needy[0]} is fitted; give it, or decoders=['linear']"
        )
    if needy:
        answers = _calibration_answers(system, configs, calibration or ())
        for config, each in made:
            for decoder in each if config.name in needy else ():
                decoder.fit(answers)
    rows: list[dict[str, Any]] = []
    for task, loader in enumerate(loaders):
        measured = _measured(system, configs, [each[task] for _, each in made], task, loader)
        rows += [{"decoder": config.name, "task": system.names[task], **found} for config, found in measured]
    order = [config.name for config in configs]
    rows.sort(key=lambda row: order.index(row["decoder"]))
    return pd.DataFrame(rows)


def _measured(
    system: Coded, configs: Sequence[DecoderConfig], decoders: Sequence[Decoder], task: int, loader: Iterable[Any]
) -> list[tuple[DecoderConfig, dict[str, float]]]:
    """Return the numbers of every decoder of the loss of one expert, on its task."""
    accuracies: list[DecodingAccuracy] = []
    residual = Residual()
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise DataError(
                f"found a test batch of type {type(batch).__name__}, expected pairs (inputs, labels) of a task's test "
                "set"
            )
        inputs, labels = batch
        answers = _answers(system, inputs, configs)
        if not accuracies:
            accuracies = [DecodingAccuracy(_num_classes(system.experts[task], inputs)) for _ in decoders]
        with torch.autocast("cpu", enabled=False), full_products():
            residual.update(answers.coded.flatten(0, 1), system.code.encode(answers.experts).flatten(0, 1))
            for decoder, accuracy in zip(decoders, accuracies, strict=True):
                accuracy.update(decoder.decode(answers)[0], answers.experts[task], labels.cpu())
    if not accuracies:
        raise DataError(f"found no test batches of task '{system.names[task]}', expected at least one")
    shared = {"residual": float(residual.compute())}
    return [
        (config, {name: float(value) for name, value in accuracy.compute().items()} | shared)
        for config, accuracy in zip(configs, accuracies, strict=True)
    ]


def _calibration_answers(
    system: Coded, configs: Sequence[DecoderConfig], calibration: Sequence[Iterable[Any]]
) -> Answers:
    """Return all servers' answers to the calibration samples, which tell their tasks."""
    parts = []
    for task, batches in enumerate(calibration):
        for batch in batches:
            answers = _answers(system, batch, configs)
            parts.append(replace(answers, tasks=torch.full((answers.num_samples,), task)))
    return Answers.concatenate(parts)


def _num_classes(expert: nn.Module, inputs: Any) -> int:
    """Return how many logits an expert has of its own, which answers pad."""
    with torch.no_grad(), eval_mode(expert):
        logits: Tensor = expert(take(as_input(inputs, expert), slice(0, 1)))
    return logits.shape[1]


def _answers(system: Coded, inputs: Any, configs: Sequence[DecoderConfig]) -> Answers:
    """Return all servers' answers, on the CPU: there decoders are fitted, and not every device has float64."""
    features = any(config.reads_features for config in configs)
    stages = any(config.reads_stages for config in configs)
    return system.answers(as_input(inputs, system.coded[0]), features=features, stages=stages).cpu()
