"""What the servers answer for one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from coin.coding.ridge import block_kernel
from coin.core.devices import double, has_float64
from coin.errors import DecodingError


@dataclass(frozen=True)
class Answers:
    """The outputs of all experts and coded models for the same inputs.

    The entries of a lost expert may hold anything, NaN included: no decoder reads them. To lose an expert whose
    class count is smaller than the largest, pad its logits with zeros.

    Args:
        experts: Logits ``[N, B, C]``, padded with zeros to the largest class count C.
        coded: Logits of the coded models ``[R, B, C]``; R is 0 for the row ``method: none``.
        expert_features: Penultimate features, one ``[B, F]`` per expert, or None where servers answer with logits only.
            A lost expert may have none, ``[B, 0]``.
        coded_features: One ``[B, F]`` per coded model, or None; widths may differ between networks.
        tasks: The index of each input's task, int64 ``[B]``; None if unknown.
        kernels: See `with_kernels`.

    Raises DecodingError where the shapes do not fit together, or a task is none of the experts'.

    >>> answers = coin.Answers(experts=torch.randn(2, 5, 3), coded=torch.randn(1, 5, 3))
    >>> answers.num_experts, answers.num_coded, answers.num_samples
    (2, 1, 5)
    """

    experts: Tensor
    coded: Tensor
    expert_features: Sequence[Tensor] | None = None
    coded_features: Sequence[Tensor] | None = None
    tasks: Tensor | None = None
    kernels: Sequence[Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or self.coded.ndim != 3 or self.experts.shape[1:] != self.coded.shape[1:]:
            told = f"found experts' logits {list(self.experts.shape)} and coded logits {list(self.coded.shape)}"
            raise DecodingError(f"{told}, expected [N, B, C] and [R, B, C]")
        if (self.expert_features is None) != (self.coded_features is None):
            raise DecodingError("found features of the experts or of the coded models only, expected both or neither")
        groups = (("experts", self.experts, self.expert_features), ("coded models", self.coded, self.coded_features))
        for whose, logits, features in groups:
            if features is not None and len(features) != len(logits):
                raise DecodingError(f"found features of {len(features)} {whose}, expected {len(logits)}")
            for feature in features or ():
                if feature.ndim != 2 or feature.shape[0] != logits.shape[1]:
                    found = f"found features {list(feature.shape)} of the {whose}"
                    raise DecodingError(f"{found}, expected [{logits.shape[1]}, F]")
        if self.tasks is not None:
            if (self.tasks.dtype, self.tasks.shape) != (torch.int64, self.experts.shape[1:2]):
                found = f"found tasks {list(self.tasks.shape)} of {self.tasks.dtype}"
                raise DecodingError(f"{found}, expected int64 [{self.num_samples}]")
            if outside := sorted(set(self.tasks.tolist()) - set(range(self.num_experts))):
                raise DecodingError(f"found samples of task {outside[0]}, expected indices below {self.num_experts}")

    @classmethod
    def of_servers(
        cls, outputs: Sequence[tuple[Tensor, Tensor] | None], num_experts: int, tasks: Tensor | None = None
    ) -> Self:
        """Return the answers of servers, experts first, then coded models: features ``[B, F]`` and logits ``[B, ·]``.

        Logits are padded with zeros to the largest class count. A server that does not answer, None, has NaN as logits
        and no features; features of width 0 everywhere are none at all.
        """
        arrived = [output for output in outputs if output is not None]
        width = max(logits.shape[1] for _, logits in arrived)
        features, like = arrived[0]
        silent = features[:, :0], torch.full_like(like[:, :1], torch.nan).expand(-1, width)
        every = [silent if output is None else output for output in outputs]
        logits = torch.stack([pad(each, (0, width - each.shape[1])) for _, each in every])
        experts, coded, sent = logits[:num_experts], logits[num_experts:], [each for each, _ in every]
        if not any(each.shape[1] for each, _ in arrived):
            return cls(experts, coded, tasks=tasks)
        return cls(experts, coded, sent[:num_experts], sent[num_experts:], tasks)

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

    def with_kernels(self) -> Self:
        """Return the same answers with the kernel ``[B, B]`` of every network's features (`block_kernel`).

        Decoders of several systems and erasures that are fitted on them then share what is the same. Only regressions
        with more features than samples read a kernel: where there are fewer altogether, it has none.
        """
        features = [*(self.expert_features or ()), *(self.coded_features or ())]
        if sum(each.shape[1] for each in features) <= self.num_samples:
            return self
        return replace(self, kernels=[block_kernel(double(each)) for each in features])

    def with_coded(self, rows: Sequence[int]) -> Self:
        """Return the answers of the experts and of some of the coded models, in the order of their indices."""
        features = None if self.coded_features is None else [self.coded_features[row] for row in rows]
        servers = [*range(self.num_experts), *(self.num_experts + row for row in rows)]
        kernels = None if self.kernels is None else [self.kernels[server] for server in servers]
        return replace(self, coded=self.coded[list(rows)], coded_features=features, kernels=kernels)

    def without_coded(self) -> Self:
        """Return the experts' answers alone: what the row ``method: none`` decodes from."""
        return self.with_coded([])

    def select(self, samples: Tensor | slice) -> Self:
        """Return the answers for some of the inputs: an index tensor ``[K]``, a mask ``[B]`` or a slice."""
        return self._each(lambda each: each[samples] if each.ndim == 1 else each[..., samples, :])

    def cpu(self) -> Self:
        """Return the answers in the CPU's memory."""
        return self._each(Tensor.cpu)

    def with_float64(self) -> Self:
        """Return the answers where there is float64: on their device, or on the CPU."""
        return self if has_float64(self.experts.device) else self.cpu()

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the answers with every tensor changed, without kernels."""
        return replace(self, **tree_map_only(Tensor, change, {**vars(self), "kernels": None}))

    @classmethod
    def concatenate(cls, batches: Sequence["Answers"]) -> Self:
        """Return the answers for several batches as one, in their order; a DecodingError unless they fit together."""
        kinds = [tree_map_only(Tensor, lambda each: each.shape, vars(batch.select(slice(0)))) for batch in batches]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            told = f"found {len(batches)} batches of answers that do not fit together"
            raise DecodingError(f"{told}, expected the same networks, classes and features, all with tasks or none")
        tasks = [batch.tasks for batch in batches if batch.tasks is not None]
        return cls(
            torch.cat([batch.experts for batch in batches], dim=1),
            torch.cat([batch.coded for batch in batches], dim=1),
            _joined([batch.expert_features for batch in batches]),
            _joined([batch.coded_features for batch in batches]),
            torch.cat(tasks) if tasks else None,
        )


def _joined(batches: Sequence[Sequence[Tensor] | None]) -> list[Tensor] | None:
    present = [batch for batch in batches if batch is not None]
    return [torch.cat(parts) for parts in zip(*present, strict=True)] if present else None
