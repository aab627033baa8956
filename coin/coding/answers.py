"""What the servers answer for one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from coin.errors import DecodingError


@dataclass(frozen=True)
class Answers:
    """The outputs of all experts and coded models for the same inputs.

    The entries of a lost expert may hold anything, NaN included: no decoder reads them. To lose an expert whose
    class count is smaller than the largest, pad its logits with zeros.

    Args:
        experts: Logits ``[N, B, C]``, padded with zeros to the largest class count C.
        coded: Logits of the coded models ``[R, B, C]``; R is 0 for the row ``method: none``.
        expert_features: One ``[B, F]`` per expert, or None where servers answer with logits only.
        coded_features: One ``[B, F]`` per coded model, or None; widths may differ between networks.
        feature_widths: The widths of the stages of every network within F, the last one that of the penultimate
            features; None where there are only these. A lost expert may then have no features, ``[B, 0]``.
        tasks: The index of each input's task, int64 ``[B]``; None if unknown.

    Raises DecodingError where the shapes do not fit together, or a task is none of the experts'.

    >>> answers = coin.Answers(experts=torch.randn(2, 5, 3), coded=torch.randn(1, 5, 3))
    >>> answers.num_experts, answers.num_coded, answers.num_samples
    (2, 1, 5)
    """

    experts: Tensor
    coded: Tensor
    expert_features: Sequence[Tensor] | None = None
    coded_features: Sequence[Tensor] | None = None
    feature_widths: Sequence[int] | None = None
    tasks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or self.coded.ndim != 3 or self.experts.shape[1:] != self.coded.shape[1:]:
            raise DecodingError(
                f"found experts' logits {list(self.experts.shape)} and coded logits {list(self.coded.shape)}, "
                "expected [N, B, C] and [R, B, C]"
            )
        if (self.expert_features is None) != (self.coded_features is None):
            raise DecodingError("found features of the experts or of the coded models only, expected both or neither")
        for whose, logits, features in (
            ("experts", self.experts, self.expert_features),
            ("coded models", self.coded, self.coded_features),
        ):
            if features is not None and len(features) != len(logits):
                raise DecodingError(f"found features of {len(features)} {whose}, expected {len(logits)}")
            for feature in features or ():
                if feature.ndim != 2 or feature.shape[0] != logits.shape[1]:
                    raise DecodingError(
                        f"found features {list(feature.shape)} of the {whose}, expected [{logits.shape[1]}, F]"
                    )
        if self.feature_widths is not None:
            self._check_widths(self.feature_widths)
        if self.tasks is not None:
            self._check_tasks(self.tasks)

    def _check_widths(self, widths: Sequence[int]) -> None:
        if self.expert_features is None or self.coded_features is None:
            raise DecodingError("found widths of stages but no features, expected both or neither")
        if not widths or min(widths) < 1:
            raise DecodingError(f"found stages of widths {list(widths)}, expected at least 1 each")
        whole = sum(widths)
        found = {feature.shape[1] for feature in self.expert_features} - {0}
        if wrong := sorted((found | {feature.shape[1] for feature in self.coded_features}) - {whole}):
            raise DecodingError(
                f"found features of width {wrong[0]}, expected {whole}: stages of widths {list(widths)}"
            )

    def _check_tasks(self, tasks: Tensor) -> None:
        if (tasks.dtype, tasks.shape) != (torch.int64, self.experts.shape[1:2]):
            raise DecodingError(
                f"found tasks {list(tasks.shape)} of {tasks.dtype}, expected int64 [{self.num_samples}]"
            )
        if outside := sorted(set(tasks.tolist()) - set(range(self.num_experts))):
            raise DecodingError(f"found samples of task {outside[0]}, expected indices below {self.num_experts}")

    @property
    def num_experts(self) -> int:
        """N, lost ones included."""
        return self.experts.shape[0]

    @property
    def num_coded(self) -> int:
        """R, the number of coded models that answered."""
        return self.coded.shape[0]

    @property
    def num_samples(self) -> int:
        """B, the number of inputs."""
        return self.experts.shape[1]

    def without_coded(self) -> Self:
        """Return the experts' answers alone: what the row ``method: none`` decodes from."""
        return self.with_coded([])

    def with_coded(self, rows: Sequence[int]) -> Self:
        """Return the answers of the experts and of some of the coded models, in the order of their indices."""
        features = None if self.coded_features is None else [self.coded_features[row] for row in rows]
        return replace(self, coded=self.coded[list(rows)], coded_features=features)

    def stages(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return one network's features ``[B, F]`` by stage ``[B, ·]``, the penultimate ones last."""
        return (features,) if self.feature_widths is None else torch.split(features, list(self.feature_widths), 1)

    def select(self, samples: Tensor | slice) -> Self:
        """Return the answers for some of the inputs: an index tensor ``[K]``, a mask ``[B]`` or a slice."""
        return self._each(lambda outputs: outputs[..., samples, :], None if self.tasks is None else self.tasks[samples])

    def cpu(self) -> Self:
        """Return the answers in the CPU's memory."""
        return self._each(Tensor.cpu, None if self.tasks is None else self.tasks.cpu())

    def _each(self, change: Callable[[Tensor], Tensor], tasks: Tensor | None) -> Self:
        experts, coded = (
            None if group is None else [change(each) for each in group]
            for group in (self.expert_features, self.coded_features)
        )
        return replace(
            self,
            experts=change(self.experts),
            coded=change(self.coded),
            expert_features=experts,
            coded_features=coded,
            tasks=tasks,
        )

    @classmethod
    def concatenate(cls, batches: Sequence["Answers"]) -> Self:
        """Return the answers for several batches as one, in their order; a DecodingError unless they fit together."""
        if not batches:
            raise DecodingError("found no batches of answers, expected at least one")
        if any(batch._kind != batches[0]._kind for batch in batches):
            raise DecodingError(
                "the batches of answers differ in networks, classes, features, stages or whether they tell the tasks, "
                "expected the same"
            )
        tasks = [batch.tasks for batch in batches if batch.tasks is not None]
        return cls(
            torch.cat([batch.experts for batch in batches], dim=1),
            torch.cat([batch.coded for batch in batches], dim=1),
            _joined([batch.expert_features for batch in batches]),
            _joined([batch.coded_features for batch in batches]),
            batches[0].feature_widths,
            torch.cat(tasks) if tasks else None,
        )

    @property
    def _kind(self) -> tuple[object, ...]:
        """What all batches of one data set have in common."""
        features = (self.expert_features, self.coded_features)
        columns = [None if each is None else [feature.shape[1] for feature in each] for each in features]
        shape = (self.num_experts, self.num_coded, self.experts.shape[2])
        return (*shape, *columns, tuple(self.feature_widths or ()), self.tasks is None)


def _joined(batches: Sequence[Sequence[Tensor] | None]) -> list[Tensor] | None:
    present = [batch for batch in batches if batch is not None]
    return [torch.cat(parts) for parts in zip(*present, strict=True)] if present else None
