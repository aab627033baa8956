"""The evaluation of a coded system in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from coin.coding import Answers, DecoderConfig, DecoderKind, FeatureCache, distinct_decoders, make_decoder
from coin.coding.code import check_erasure
from coin.coding.decoders import ExpertHeadDecoder
from coin.coding.metrics import Residual
from coin.core.batches import as_input
from coin.errors import ConfigurationError, DataError
from coin.evaluation.scores import FittedDecoder, Scores
from coin.evaluation.servers import num_classes, with_heads
from coin.evaluation.variants import Variant
from coin.modules.coded import Coded
from coin.statistics.guard import disable_tf32, eval_mode


def evaluate(
    system: Coded,
    loaders: Sequence[Iterable[Any]],
    *,
    decoders: Sequence[DecoderKind | str | dict[str, Any] | DecoderConfig] | None = None,
    calibration: Sequence[Iterable[Any]] | None = None,
    erasures: Sequence[Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Measure how well lost experts are decoded, each on its own task.

    Each network runs once on the inputs, for any number of decoders. The numbers equal those of ``coin run``.

    Args:
        system: The code, its experts and its coded models.
        loaders: For every expert the batches (inputs, labels) of its task's test set; labels are classes ``[B]``.
        decoders: Kinds or configurations; by default all kinds, but expert_head only if head and features give the
            experts' logits.
        calibration: For every expert the batches of its own task's samples, on which decoders are fitted without
            labels; the linear decoder and an expert_head that is not corrected need them for the risk alone.
        erasures: Which experts are lost together; each alone by default.

    Returns:
        One row a decoder, erasure and lost expert, with the columns ``decoder``, ``erased`` (names joined by ``+``),
        ``task``, ``expert_accuracy``, ``decoded_accuracy``, ``nda``, ``agreement`` (`coin.DecodingAccuracy`), ``risk``
        (the mean of `coin.decoding_risk`), ``residual`` (`coin.Residual`), ``decoder_passes`` (networks run to fit the
        decoder, a sample each), and what the stand-in costs: ``memory_mib`` (the coded models, and the heads or
        regressions), ``forwards`` (networks run for one lost answer) and ``losses`` (the most at once).

    Raises ConfigurationError where numbers of tasks differ, or a decoder does not exist, comes twice or finds no
    calibration data; DecodingError where an erasure names no expert or is beyond what a decoder can; DataError where a
    batch is no pair (inputs, labels), or a task has none.

    >>> code = coin.convex(3, 2)
    >>> system = coin.Coded(code, experts, coin.merge_networks(coin.Average(), experts, code), names="abc")
    >>> tests = [[(torch.randn(40, 4), torch.randint(3, (40,)))] for _ in experts]
    >>> table = coin.evaluate(system, tests, decoders=["linear"], erasures=[[0, 1]])
    >>> table[["erased", "task", "nda", "forwards", "losses"]].values.tolist()
    [['a+b', 'a', 1.0, 3, 2], ['a+b', 'b', 1.0, 3, 2]]
    """
    configs, count = distinct_decoders(decoders), len(system.experts)
    for what, given in (("loaders", loaders), ("calibration data", calibration)):
        if given is not None and len(given) != count:
            raise ConfigurationError(f"found {what} of {len(given)} tasks, expected {count}; give every expert's")
    lost = [check_erasure(erased, count) for erased in erasures or [[task] for task in range(count)]]
    if len({frozenset(erased) for erased in lost}) < len(lost):
        raise ConfigurationError(f"found erasures {[list(erased) for erased in lost]}, expected each loss once")
    every, first = [make_decoder(config, system.code, erased) for config in configs for erased in lost], None
    if calibration is not None:
        parts: list[Answers] = []
        for task, batches in enumerate(calibration):
            for batch in batches:
                first = batch if first is None else first
                found = _answers(system, batch, configs)
                parts.append(replace(found, tasks=torch.full((found.num_samples,), task)))
    elif to_fit := [decoder for decoder in every if decoder.needs_fit]:
        raise ConfigurationError(
            f"found no calibration samples, needed to fit the decoder {to_fit[0].config.name}; give them, or "
            "decoders=['linear']"
        )
    with eval_mode(system.experts):
        probe = None if first is None else as_input(first, system.coded[0])
        configs, heads = with_heads(configs, list(system.experts), probe, needed=decoders is not None)
    every = [make_decoder(config, system.code, erased, heads) for config in configs for erased in lost]
    if calibration is not None:
        answers, kept = Answers.concatenate(parts), FeatureCache()
        for decoder in every:
            decoder.fit(answers, kept)
    fitted = [FittedDecoder(decoder) for decoder in every]
    residuals = [
        _scored(system, [each for each in fitted if task in each.decoder.erased], task, loader)
        for task, loader in enumerate(loaders)
    ]
    nbytes = sum(tensor.nbytes for network in system.coded for tensor in network.state_dict().values())
    rows = system.code.num_coded
    coded = Variant("coded", system.code, networks=tuple(range(rows)), memory=nbytes)
    return pd.DataFrame(
        {
            "decoder": decoder.config.name,
            "erased": "+".join(system.names[expert] for expert in decoder.erased),
            "task": system.names[task],
            **{name: float(value) for name, value in each.scores[task].accuracy.compute().items()},
            "risk": float(each.scores[task].curves.compute()[1][:, 0].double().mean()),
            "residual": residuals[task],
            "decoder_passes": decoder.passes(rows),
            **each.costs(coded, len(decoder.erased), fitted),
        }
        for each, decoder in zip(fitted, every, strict=True)
        for task in decoder.erased
    )


def _scored(system: Coded, fitted: Sequence[FittedDecoder], task: int, loader: Iterable[Any]) -> float:
    """Score every decoder that decodes an expert on that expert's task, and return the coded models' residual."""
    residual, seen = Residual(), 0
    for batch in loader if fitted else ():
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            found = f"found a test batch of type {type(batch).__name__}"
            raise DataError(f"{found}, expected pairs (inputs, labels) of a task's test set")
        inputs, labels = batch
        answers = _answers(system, inputs, [each.decoder.config for each in fitted])
        if not seen:
            classes = num_classes(system.experts[task], inputs)
            if any(isinstance(each.decoder, ExpertHeadDecoder) and each.decoder.moments is None for each in fitted):
                system.heads(inputs)  # no calibration input has told whether they are linear ones
            for each in fitted:
                each.scores[task] = Scores(classes)
        positions = torch.arange(seen, seen + len(labels))
        seen += len(labels)
        with torch.autocast("cpu", enabled=False), disable_tf32():
            residual.update(answers.coded.flatten(0, 1), system.code.encode(answers.experts).flatten(0, 1))
            for each in fitted:
                each.update(task, answers, labels.cpu(), positions)
    if fitted and not seen:
        raise DataError(f"found no test batches of task '{system.names[task]}', expected at least one")
    return float(residual.compute())


def _answers(system: Coded, inputs: Any, configs: Sequence[DecoderConfig]) -> Answers:
    """Return all servers' answers on the CPU, where decoders are fitted: not every device has float64."""
    features, stages = (any(getattr(each, name) for each in configs) for name in ("reads_features", "reads_stages"))
    return system.answers(as_input(inputs, system.coded[0]), features=features, stages=stages).cpu()
