"""The evaluation of a coded system in memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from coin.coding import DecoderKind
from coin.coding.code import check_erasure
from coin.core.batches import Batch, size_of
from coin.errors import ConfigurationError, DataError
from coin.evaluation.scores import Evaluation
from coin.evaluation.variants import Variant
from coin.modules.coded import Coded
from coin.networks.adapted import resident_nbytes
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


@torch.no_grad()
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
    tests = {
        task: _pairs(loaders[task], system.names[task], system.coded[0])
        for task in sorted(set(chain(*lost)))
    }
    start = min(tests)
    first = next(tests[start])
    tests[start] = chain([first], tests[start])
    networks = [*system.experts, *system.coded]
    variant = Variant(
        "coded",
        system.code,
        networks=tuple(range(len(system.coded))),
        memory=system.nbytes,
        resident=sum(map(resident_nbytes, system.coded)),
        lost=lost,
        adapted=system.is_adapted,
    )
    with eval_mode(system):
        evaluation = Evaluation(
            lambda places: {place: networks[place] for place in places},
            [variant],
            decoders,
            system.count_classes(first[0]),
            first[0],
        )
        evaluation.fit(_of_tasks(calibration or (), system.coded[0]))
        for task, pairs in tests.items():
            for inputs, labels in pairs:
                evaluation.update(task, inputs, labels)
    names = [kind.name for kind in evaluation.kinds]
    measured = evaluation.measurements(system.names)
    measured.sort(key=lambda each: names.index(each.columns["decoder"]))
    return pd.DataFrame([each.columns for each in measured], columns=_COLUMNS)


def _of_tasks(
    calibration: Sequence[Iterable[Any]], network: nn.Module
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the calibration inputs of every task as a network reads them, with their tasks ``[B]``."""
    for task, batches in enumerate(calibration):
        for batch in batches:
            inputs = as_input(batch, network)
            yield inputs, torch.full((size_of(inputs),), task)


def _pairs(loader: Iterable[Any], task: str, network: nn.Module) -> Iterator[tuple[Batch, Tensor]]:
    """Yield a task's test inputs as a network reads them, and labels; DataError for other batches, or for none."""
    is_empty = True
    for batch in loader:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not is_pair or not isinstance(batch[1], Tensor):
            raise DataError(
                f"found a test batch of type {type(batch).__name__}, expected pairs (inputs, labels)"
            )
        is_empty = False
        yield as_input(batch[0], network), batch[1]
    if is_empty:
        raise DataError(f"found no test batches of task '{task}', expected at least one")
