"""Metrics of decoding over pure functions. They hold totals, so batches, processes and their order do not matter."""

import torch
from torch import Tensor
from torchmetrics import Metric

from coin.errors import ConfigurationError, DataError


class DecodingAccuracy(Metric):
    """How well one decoded expert replaces the expert itself, on its own task's test set.

    `compute` returns float64 scalars, NaN before the first sample: ``expert_accuracy`` and ``decoded_accuracy``, shares
    of samples that are classified correctly, ``nda``, their ratio, ``agreement``, the share of samples where both
    predict the same class, and of a promise ``coverage``, the share of accepted answers, and ``found``, the share of
    these that differ. The state is six integer counts, summed over processes.

    Only the first C_j outputs are read, the task's `num_classes`; None reads all. A ConfigurationError below 1.

    >>> metric = coin.DecodingAccuracy()
    >>> metric.update(torch.eye(4)[[0, 1, 2, 2]], torch.eye(4), torch.arange(4))  # decoded, the expert's, labels
    >>> float(metric.compute()["nda"])
    0.75
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ConfigurationError(f"found num_classes={num_classes}, expected at least 1")
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(6, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decoded: Tensor, expert: Tensor, labels: Tensor, accepted: Tensor | None = None) -> None:
        """Add a batch: logits f̂_j and f_j ``[B, C]`` with C ≥ C_j, labels and which answers are accepted ``[B]``.

        Raises DataError for other shapes. A decoded row that is not finite is never right and never agrees: an answer
        of NaN is no answer.
        """
        if decoded.ndim != 2 or decoded.shape != expert.shape or labels.shape != decoded.shape[:1]:
            shapes = [list(each.shape) for each in (decoded, expert, labels)]
            raise DataError(f"found decoded and expert's logits and labels {shapes}, expected [B, C], [B, C] and [B]")
        if decoded.shape[1] < (width := self.num_classes or decoded.shape[1]):
            raise DataError(f"found {decoded.shape[1]} outputs, expected at least {width}")
        if bool(((labels < 0) | (labels >= width)).any()):
            raise DataError(f"found labels {int(labels.min())} to {int(labels.max())}, expected 0 to {width - 1}")
        decoded, expert = decoded[:, :width], expert[:, :width]
        answered = torch.isfinite(decoded).all(1)
        agrees = (decoded.argmax(1) == expert.argmax(1)) & answered
        right = (decoded.argmax(1) == labels) & answered
        accepted = torch.zeros_like(answered) if accepted is None else accepted
        judged = (expert.argmax(1) == labels, right, agrees, accepted, accepted & ~agrees, torch.ones_like(answered))
        self.counts += torch.stack(judged).sum(1).to(self.counts.device)

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
        if coded.shape != target.shape:
            raise DataError(f"found coded logits {[*coded.shape]} for targets {[*target.shape]}, expected the same")
        wanted = target.to(torch.float64)
        norms = torch.stack([(coded.to(torch.float64) - wanted).square().sum(), wanted.square().sum()])
        self.squares += norms.to(self.squares.device)

    def compute(self) -> Tensor:
        """Return the residual, a float64 scalar, dimensionless."""
        error, wanted = self.squares
        return torch.where(wanted > 0, (error / wanted).sqrt(), torch.full_like(error, torch.nan))
