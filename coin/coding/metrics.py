"""Metrics of decoding over pure functions. They hold totals, so batches, processes and their order do not matter."""

import torch
from torch import Tensor
from torchmetrics import Metric

from coin.errors import DataError


class DecodingAccuracy(Metric):
    """How well one decoded expert replaces the expert itself, on its own task's test set.

    `compute` returns float64 scalars, NaN before the first sample: ``expert_accuracy`` and ``decoded_accuracy``, shares
    of samples that are classified correctly, ``nda``, their ratio, ``agreement``, the share of samples where both
    predict the same class, and of a promise ``coverage``, the share of accepted answers, and ``found``, the share of
    these that differ. The state is six integer counts, summed over processes.

    Only the first C_j outputs are read, the task's `num_classes`; None reads all.

    >>> metric = coin.DecodingAccuracy()
    >>> metric.update(torch.eye(4)[[0, 1, 2, 2]], torch.eye(4), torch.arange(4))  # decoded, the expert's, labels
    >>> float(metric.compute()["nda"])
    0.75
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(6, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        decoded: Tensor,
        expert: Tensor,
        labels: Tensor,
        accepted: Tensor | None = None,
    ) -> None:
        """Add a batch: logits f̂_j and f_j ``[B, C]`` with C ≥ C_j, labels and which answers are accepted ``[B]``.

        Raises DataError for other shapes or labels. NaN counts as wrong: a decoded row that is not finite is never
        right and never agrees.
        """
        shapes = [list(each.shape) for each in (decoded, expert, labels)]
        if decoded.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
            raise DataError(
                f"found decoded and expert's logits and labels {shapes}, expected [B, C], [B, C] and [B]"
            )
        width = self.num_classes or decoded.shape[1]
        is_class = (labels >= 0) & (labels < width)
        if not bool(is_class.all()):
            found = sorted(set(labels[~is_class].tolist()))
            raise DataError(f"found labels {found}, expected 0 to {width - 1}")
        decoded = decoded[:, :width]
        is_finite = torch.isfinite(decoded).all(1)
        expert_class = expert[:, :width].argmax(1)
        decoded_class = decoded.argmax(1).where(is_finite, -1)
        agrees = decoded_class == expert_class
        if accepted is None:
            accepted = torch.zeros_like(agrees)
        counted = [
            expert_class == labels,
            decoded_class == labels,
            agrees,
            accepted,
            accepted & ~agrees,
            torch.ones_like(agrees),
        ]
        counts = torch.stack(counted).sum(1)
        self.counts += counts.to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers; see the class."""
        expert, decoded, agreeing, accepted, differing, total = self.counts.to(torch.float64)
        return {
            "expert_accuracy": expert / total,
            "decoded_accuracy": decoded / total,
            # Of totals, never a mean of batches'; NaN where the expert is never right (arXiv 2409.01420, section IV).
            "nda": torch.where(expert > 0, decoded / expert, torch.nan),
            "agreement": agreeing / total,
            "coverage": accepted / total,
            "found": differing / accepted,
        }


class Residual(Metric):
    """The relative residual of a coded model, ‖f_c − Σβ_if_i‖ / ‖Σβ_if_i‖ over a data set.

    The norms are over all samples and outputs, summed over processes in float64. NaN before the first sample and where
    the target is exactly zero everywhere.

    >>> metric = coin.Residual()
    >>> metric.update(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
    >>> float(metric.compute())
    0.25
    """

    full_state_update = False
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, coded: Tensor, target: Tensor) -> None:
        """Add a batch: the coded model's logits and Σ_i β_i f_i, both ``[B, C]``, else a DataError."""
        found = list(coded.shape)
        expected = list(target.shape)
        if found != expected:
            raise DataError(f"found coded logits {found} for targets {expected}, expected the same")
        wanted = target.to(torch.float64)
        error = coded.to(torch.float64) - wanted
        squared_error = error.square().sum()
        squared_norm = wanted.square().sum()
        squares = torch.stack([squared_error, squared_norm])
        self.squares += squares.to(self.squares.device)

    def compute(self) -> Tensor:
        """Return the residual, a float64 scalar, dimensionless."""
        error, wanted = self.squares
        return torch.where(wanted > 0, (error / wanted).sqrt(), torch.nan)
