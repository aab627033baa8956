"""A code with its networks, the experts and the coded models that stand by for them, and how well it decodes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.batches import Batch, Forward, adapted, as_input, checked, take
from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, Kept, distinct_decoders, make_decoder
from coin.errors import ConfigurationError, DataError
from coin.metrics import DecodingAccuracy, Residual
from coin.networks import Run, pad_logits, run_network
from coin.networks.stages import common_widths
from coin.statistics.guard import eval_mode, full_products


class Coded(LightningModule):
    """N experts, R coded models and the code between them.

    ``forward`` returns the encoded outputs: what the coded models answer in place of Σ_i β_i f_i. `answers` returns
    what all servers answer, and `decode` a lost expert's logits. The networks run in eval mode and without gradients;
    their own modes and what requires gradients are left as found.

    Args:
        code: The code, R×N.
        experts: The N experts.
        coded: The R coded models, one a row of the code.
        names: The experts' tasks; ``0``, ``1``, … by default.
        forward: (network, inputs) → logits ``[B, C]``, where networks are not called with one tensor; inputs may then
            be mappings of tensors too.

    Raises:
        ConfigurationError: The numbers of experts or coded models do not fit the code.
    """

    def __init__(
        self,
        code: Code,
        experts: Sequence[nn.Module],
        coded: Sequence[nn.Module],
        names: Sequence[str] | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if len(experts) != code.num_experts or len(coded) != code.num_coded:
            raise ConfigurationError(
                f"found {len(experts)} experts and {len(coded)} coded models, the code is for {code.num_experts} "
                f"and {code.num_coded}; give as many, or another code"
            )
        self.code = code
        self.names = tuple(names) if names is not None else tuple(str(index) for index in range(len(experts)))
        self.experts = nn.ModuleList([adapted(network, forward) for network in experts])
        self.coded = nn.ModuleList([adapted(network, forward) for network in coded])
        self.decoder: Decoder | None = None
        self.training = False

    def train(self, mode: bool = True) -> "Coded":
        """Leave the networks' modes alone: nothing here is trained, and whatever they are, they run in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded models' logits ``[R, B, C]`` for inputs ``[B, ...]``."""
        with eval_mode(self.coded):
            return _padded([network(checked(inputs, network)) for network in self.coded])

    @torch.no_grad()
    def answers(
        self, inputs: Batch, *, features: bool = False, stages: bool = False, erased: Sequence[int] = ()
    ) -> Answers:
        """Run every server that is not lost, once; a lost expert's entries are NaN.

        Args:
            inputs: ``[B, ...]``.
            features: Whether the servers answer with penultimate features beside their logits.
            stages: Whether these are the features of all stages.
            erased: Lost experts, which do not run.
        """
        with eval_mode(self):
            return server_answers(self.experts, self.coded, checked(inputs, self.coded[0]), features, stages, erased)

    def fit_decoder(
        self,
        calibration: Sequence[Batch],
        erased: Sequence[int],
        kind: DecoderKind | str | DecoderConfig,
        tasks: Tensor | None = None,
    ) -> "Coded":
        """Choose how lost experts are decoded from here on.

        Args:
            calibration: Batches of inputs ``[B, ...]``, unlabelled; the linear decoder does not look at them.
            erased: Indices of the lost experts.
            kind: The decoder: a kind with its default options, or a configuration.
            tasks: Of which expert's task each input is, int64 over all batches, for ``fitted_on: own``.
        """
        decoder = make_decoder(kind, self.code, erased)
        if decoder.needs_fit:
            parts = [self._answers_for([decoder.config], batch) for batch in calibration]
            decoder.fit(replace(Answers.concatenate(parts), tasks=tasks))
        self.decoder = decoder
        return self

    def decode(self, inputs: Batch) -> Tensor:
        """Return the lost experts' logits ``[|erased|, B, C]``, from the servers that are left, after `fit_decoder`."""
        if self.decoder is None:
            raise ConfigurationError("found no decoder; call fit_decoder with the lost experts first")
        return self.decoder.decode(self._answers_for([self.decoder.config], inputs, self.decoder.erased))

    def _answers_for(self, decoders: Sequence[DecoderConfig], inputs: Batch, erased: Sequence[int] = ()) -> Answers:
        """Return the answers that these decoders read."""
        features = any(config.reads_features for config in decoders)
        stages = any(config.reads_stages for config in decoders)
        return self.answers(inputs, features=features, stages=stages, erased=erased)


def server_answers(
    experts: nn.ModuleList, coded: nn.ModuleList, inputs: Batch, features: bool, stages: bool, erased: Sequence[int]
) -> Answers:
    """Run every server that is not lost, once; see `Coded.answers`."""
    servers = [*(None if index in erased else network for index, network in enumerate(experts)), *coded]
    found = [None if network is None else run_network(network, inputs, features, stages) for network in servers]
    arrived = [run for run in found if run is not None]
    missing = Run(arrived[0].features[:, :0], torch.full_like(arrived[0].logits, torch.nan))
    runs = [missing if run is None else run for run in found]
    logits, count = _padded([run.logits for run in runs]), len(experts)
    return Answers(
        experts=logits[:count],
        coded=logits[count:],
        expert_features=[run.features for run in runs[:count]] if features else None,
        coded_features=[run.features for run in runs[count:]] if features else None,
        feature_widths=common_widths(arrived),
    )


def _padded(logits: Sequence[Tensor]) -> Tensor:
    width = max(entry.shape[1] for entry in logits)
    return torch.stack([pad_logits(entry, width) for entry in logits])


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

    Raises ConfigurationError where numbers of tasks differ, or a decoder does not exist, comes twice or finds no
    calibration data; DataError where a batch is no pair (inputs, labels), or a task has none.
    """
    configs, count = distinct_decoders(list(decoders)), len(system.experts)
    for what, given in (("loaders", loaders), ("calibration data", calibration)):
        if given is not None and len(given) != count:
            raise ConfigurationError(f"found {what} of {len(given)} tasks, expected {count}; give every expert's")
    by_task = [[make_decoder(config, system.code, [task]) for config in configs] for task in range(count)]
    if to_fit := [decoder for each in by_task for decoder in each if decoder.needs_fit]:
        if calibration is None:
            raise ConfigurationError(
                f"found no calibration, on which the decoder {to_fit[0].config.name} is fitted; give it, or "
                "decoders=['linear']"
            )
        parts = []
        for task, batches in enumerate(calibration):
            each = [_answers(system, batch, configs) for batch in batches]
            parts += [replace(answers, tasks=torch.full((answers.num_samples,), task)) for answers in each]
        answers, kept = Answers.concatenate(parts), Kept()
        for decoder in to_fit:
            decoder.fit(answers, kept)
    measured = [_measured(system, by_task[task], task, loader) for task, loader in enumerate(loaders)]
    return pd.DataFrame(
        {"decoder": config.name, "task": system.names[task], **measured[task][index]}
        for index, config in enumerate(configs)
        for task in range(count)
    )


def _measured(system: Coded, decoders: Sequence[Decoder], task: int, loader: Iterable[Any]) -> list[dict[str, float]]:
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
        answers = _answers(system, inputs, [decoder.config for decoder in decoders])
        if not accuracies:
            accuracies = [DecodingAccuracy(_num_classes(system.experts[task], inputs)) for _ in decoders]
        with torch.autocast("cpu", enabled=False), full_products():
            residual.update(answers.coded.flatten(0, 1), system.code.encode(answers.experts).flatten(0, 1))
            for decoder, accuracy in zip(decoders, accuracies, strict=True):
                accuracy.update(decoder.decode(answers)[0], answers.experts[task], labels.cpu())
    if not accuracies:
        raise DataError(f"found no test batches of task '{system.names[task]}', expected at least one")
    shared = {"residual": float(residual.compute())}
    return [{name: float(value) for name, value in each.compute().items()} | shared for each in accuracies]


def _num_classes(expert: nn.Module, inputs: Any) -> int:
    """Return how many logits an expert has of its own, which answers pad."""
    with torch.no_grad(), eval_mode(expert):
        logits: Tensor = expert(take(as_input(inputs, expert), slice(0, 1)))
    return logits.shape[1]


def _answers(system: Coded, inputs: Any, configs: Sequence[DecoderConfig]) -> Answers:
    """Return all servers' answers, on the CPU: there decoders are fitted, and not every device has float64."""
    return system._answers_for(configs, as_input(inputs, system.coded[0])).cpu()
