"""The evaluation of a coded system in memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from coin.coding import Answers, DecoderKind, distinct_decoders
from coin.coding.code import check_erasure
from coin.errors import ConfigurationError, DataError
from coin.evaluation.scores import Evaluation, with_heads
from coin.evaluation.variants import Variant
from coin.modules.coded import Coded
from coin.networks.calling import as_input
from coin.networks.guard import eval_mode

_COLUMNS = [
    "decoder",
    "erased",
    "task",
    "expert_accuracy",
    "decoded_accuracy",
    "nda",
    "agreement",
    "residual",
]
_COLUMNS += ["decoder_passes", "memory_mib", "resident_mib", "forwards", "losses"]


def evaluate(
    system: Coded,
    loaders: Sequence[Iterable[Any]],
    *,
    decoders: Sequence[DecoderKind | str] | None = None,
    calibration: Sequence[Iterable[Any]] | None = None,
    erasures: Sequence[Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Measure how well lost experts are decoded, each on its own task; the numbers equal those of ``coin run``.

    Args:
        system: The code, its experts and its coded models.
        loaders: For every expert the batches (inputs, labels) of its task's test set; labels are classes ``[B]``.
        decoders: Their kinds; by default all, but expert_head only if head and features give the
            experts' logits.
        calibration: For every expert the batches of its own task's samples, on which decoders are fitted; linear and
            expert_head need none.
        erasures: Which experts are lost together; each alone by default.

    Returns:
        One row a decoder, erasure and lost expert, with the columns ``decoder``, ``erased`` (names joined by ``+``),
        ``task``, ``expert_accuracy``, ``decoded_accuracy``, ``nda``, ``agreement`` (`coin.DecodingAccuracy`),
        ``residual`` (`coin.Residual`), ``decoder_passes`` (forwards to fit the decoder), and the stand-in's costs:
        ``memory_mib`` (coded models, and heads or regressions, as stored), ``resident_mib`` (the same as a process that
        answers holds them), ``forwards`` (for one lost answer) and ``losses`` (the most at once).

    Raises ConfigurationError where numbers of tasks differ, or a decoder comes twice or finds no calibration data, and
    DecodingError where an erasure is beyond what a decoder can.

    >>> code = coin.convex(3, 2)
    >>> system = coin.Coded(code, experts, coin.merge_networks(coin.Average(), experts, code), names="abc")
    >>> tests = [[(torch.randn(40, 4), torch.randint(3, (40,)))] for _ in experts]
    >>> table = coin.evaluate(system, tests, decoders=["linear"], erasures=[[0, 1]])
    >>> table[["erased", "task", "nda", "forwards", "losses"]].values.tolist()
    [['a+b', 'a', 1.0, 3, 2], ['a+b', 'b', 1.0, 3, 2]]
    """
    count = len(system.experts)
    for what, given in (("loaders", loaders), ("calibration data", calibration)):
        tasks = count if given is None else len(given)
        if tasks != count:
            raise ConfigurationError(
                f"found {what} of {tasks} tasks, expected {count}; give every expert's"
            )
    each_alone = [[task] for task in range(count)]
    lost = tuple(check_erasure(erased, count) for erased in erasures or each_alone)
    if len({frozenset(erased) for erased in lost}) < len(lost):
        given = [list(erased) for erased in lost]
        raise ConfigurationError(f"found erasures {given}, expected each loss once")
    tests = {}
    for task in sorted(set(chain(*lost))):
        tests[task] = _pairs(loaders[task], system.names[task])
    start = min(tests)
    first = next(tests[start])
    tests[start] = chain([first], tests[start])
    kinds = distinct_decoders(decoders)
    with eval_mode(system.experts):
        inputs = as_input(first[0], system.coded[0])
        is_asked = decoders is not None
        kinds, heads = with_heads(kinds, list(system.experts), inputs, needed=is_asked)
    features = any(kind.reads_features for kind in kinds)
    variant = Variant(
        "coded",
        system.code,
        networks=tuple(range(len(system.coded))),
        memory=system.nbytes,
        resident=system.resident_nbytes,
        lost=lost,
        adapted=system.is_adapted,
    )
    evaluation = Evaluation([variant], kinds, system.count_classes(first[0]), heads)
    if not evaluation.fitted:
        raise ConfigurationError(
            "found no decoder that reads a body with adapters, expected expert_head"
        )

    def answers_of(inputs: Any, task: int, read: set[int]) -> Answers:
        """Return the answers of the servers at these places to inputs of a task; not all devices have float64."""
        idle = set(range(count)) - read
        silent = [row for row in range(len(system.coded)) if count + row not in read]
        answers = system.answers(
            inputs, features=features, erased=sorted(idle), silent=silent, tasks=task
        )
        return answers.cpu()

    to_fit = evaluation.to_fit()
    if to_fit:
        read = evaluation.read_by_fit()
        parts = []
        for task, batches in enumerate(calibration or ()):
            for batch in batches:
                answers = answers_of(batch, task, read)
                task_of_each = torch.full((answers.num_samples,), task)
                parts.append(replace(answers, tasks=task_of_each))
        if not parts:
            name = to_fit[0].decoder.kind.name
            raise ConfigurationError(
                f"found no calibration samples to fit the decoder {name} on; give them"
            )
        evaluation.fit(Answers.concatenate(parts))
    for task, pairs in tests.items():
        read = evaluation.read_of_task(task)
        for inputs, labels in pairs:
            evaluation.update(task, answers_of(inputs, task, read), labels.cpu())
    names = [kind.name for kind in kinds]
    measured = evaluation.measurements(system.names)
    measured.sort(key=lambda each: names.index(each.columns["decoder"]))
    return pd.DataFrame([each.columns for each in measured], columns=_COLUMNS)


def _pairs(loader: Iterable[Any], task: str) -> Iterator[tuple[Any, Tensor]]:
    """Yield a task's test batches; a DataError where one is no pair (inputs, labels), or there are none."""
    is_empty = True
    for batch in loader:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not is_pair or not isinstance(batch[1], Tensor):
            raise DataError(
                f"found a test batch of type {type(batch).__name__}, expected pairs (inputs, labels)"
            )
        is_empty = False
        yield batch[0], batch[1]
    if is_empty:
        raise DataError(f"found no test batches of task '{task}', expected at least one")
