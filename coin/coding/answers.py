"""What the servers answer for one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from coin.errors import DecodingError


@dataclass(frozen=True)
class Answers:
    """The outputs of all experts and coded models for the same inputs.

    The entries of a lost expert may hold anything, NaN included: no decoder reads them. To lose an expert whose
    class count is smaller than the largest, pad its logits with zeros.

    Args:
        experts: Logits ``[N, B, C]``, padded with zeros to the largest class count C.
        coded: Logits of the coded models ``[R, B, C]``; R is 0 for the row ``method: none``.
        expert_features: Penultimate features, one ``[B, F]`` per expert, or nothing where servers answer with logits
            only. A lost expert may have none, ``[B, 0]``.
        coded_features: One ``[B, F]`` per coded model, or nothing; widths may differ between networks.
        tasks: The index of each input's task, int64 ``[B]``; None if unknown.

    Raises DecodingError where the shapes do not fit together.

    >>> answers = coin.Answers(experts=torch.randn(2, 5, 3), coded=torch.randn(1, 5, 3))
    >>> answers.num_experts, answers.num_coded, answers.num_samples
    (2, 1, 5)
    """

    experts: Tensor
    coded: Tensor
    expert_features: Sequence[Tensor] = ()
    coded_features: Sequence[Tensor] = ()
    tasks: Tensor | None = None

    def __post_init__(self) -> None:
        own = list(self.experts.shape)
        coded = list(self.coded.shape)
        are_alike = len(own) == len(coded) == 3 and own[1:] == coded[1:]
        if not are_alike:
            raise DecodingError(
                f"found experts' logits {own} and coded logits {coded}, expected [N, B, C], [R, B, C]"
            )
        found = len(self.expert_features), len(self.coded_features)
        every = self.num_experts, self.num_coded
        if found not in ((0, 0), every):
            raise DecodingError(
                f"found features of {found} experts and coded models, expected those of all {every}, or none"
            )
        if self.tasks is not None and self.tasks.shape != (self.num_samples,):
            raise DecodingError(
                f"found tasks {list(self.tasks.shape)}, expected [{self.num_samples}]"
            )

    @classmethod
    def of_servers(
        cls,
        outputs: Sequence[tuple[Tensor, Tensor] | None],
        num_experts: int,
    ) -> Self:
        """Return the answers of servers, experts first, then coded models: features ``[B, F]`` and logits ``[B, ·]``.

        Logits are padded with zeros to the largest class count. A server that does not answer, None, has NaN as logits
        and no features; features of width 0 everywhere are none at all.
        """
        arrived = [output for output in outputs if output is not None]
        some_features, some_logits = arrived[0]
        width = max(logits.shape[1] for _, logits in arrived)
        silent = some_features[:, :0], some_logits.new_full((len(some_logits), width), torch.nan)
        features = []
        padded = []
        for output in outputs:
            own_features, own_logits = silent if output is None else output
            features.append(own_features)
            padded.append(pad(own_logits, (0, width - own_logits.shape[1])))
        logits = torch.stack(padded)  # [N + R, B, C]
        if not any(each.shape[1] for each in features):
            features = []
        return cls(
            logits[:num_experts],
            logits[num_experts:],
            features[:num_experts],
            features[num_experts:],
        )

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

    def with_coded(self, rows: Sequence[int]) -> Self:
        """Return the answers of the experts and of some coded models, by index; ``method: none`` has those of none."""
        features = [self.coded_features[row] for row in rows] if self.coded_features else []
        return replace(self, coded=self.coded[list(rows)], coded_features=features)

    def select(self, samples: Tensor | slice) -> Self:
        """Return the answers for some of the inputs: an index tensor ``[K]``, a mask ``[B]`` or a slice."""

        def selected(tensor: Tensor) -> Tensor:
            has_width = tensor.ndim > 1  # all but tasks [B]
            return tensor[..., samples, :] if has_width else tensor[samples]

        return self._each(selected)

    def cpu(self) -> Self:
        """Return the answers in the CPU's memory."""
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the answers with every tensor changed."""
        return replace(self, **tree_map_only(Tensor, change, vars(self)))

    @classmethod
    def concatenate(cls, batches: Sequence["Answers"]) -> Self:
        """Return the answers of the same servers for several batches as one, in their order."""
        tasks = [batch.tasks for batch in batches if batch.tasks is not None]
        if len(tasks) not in (0, len(batches)):
            raise DecodingError(
                f"found the tasks of {len(tasks)} of {len(batches)} batches, expected those of all, or of none"
            )
        return cls(
            torch.cat([batch.experts for batch in batches], dim=1),
            torch.cat([batch.coded for batch in batches], dim=1),
            _joined([batch.expert_features for batch in batches]),
            _joined([batch.coded_features for batch in batches]),
            torch.cat(tasks) if tasks else None,
        )


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return every network's features of all batches ``[B, F]``."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]
