"""Metrics of decoding over pure functions. They hold totals, so batches, processes and their order do not matter."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric

from coin.errors import ConfigurationError, DataError

COVERAGES = (1.0, 0.95, 0.8)
"""The coverages (shares of lowest-risk samples) at which accuracy is reported."""


class DecodingAccuracy(Metric):
    """How well one decoded expert replaces the expert itself, on its own task's test set.

    `compute` returns float64 scalars, NaN before the first sample: ``expert_accuracy`` and ``decoded_accuracy``, shares
    of samples that are classified correctly, ``nda``, their ratio (`normalized_decoding_accuracy`), and ``agreement``,
    the share of samples where both predict the same class. The state is four integer counts, summed over processes.

    Only the first C_j outputs are read, the task's `num_classes`, which drops the padding; None reads all. Raises
    ConfigurationError where it is less than 1.

    >>> metric = coin.DecodingAccuracy()
    >>> metric.update(torch.eye(4)[[0, 1, 2, 2]], torch.eye(4), torch.arange(4))  # decoded, the expert's, labels
    >>> float(metric.compute()["nda"])
    0.75
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ConfigurationError(f"found num_classes={num_classes}, expected at least 1")
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decoded: Tensor, expert: Tensor, labels: Tensor) -> None:
        """Add a batch: logits f̂_j and f_j ``[B, C]`` with C ≥ C_j, and labels ``[B]``; DataError for other shapes.

        A decoded row that is not finite is never right and never agrees: an answer of NaN is no answer.
        """
        if decoded.ndim != 2 or decoded.shape != expert.shape or labels.shape != decoded.shape[:1]:
            raise DataError(
                f"found decoded logits {list(decoded.shape)}, expert's logits {list(expert.shape)} and labels "
                f"{list(labels.shape)}, expected [B, C], [B, C] and [B]"
            )
        if self.num_classes is not None:
            if decoded.shape[1] < self.num_classes:
                raise DataError(f"found {decoded.shape[1]} outputs, expected at least {self.num_classes}")
            decoded, expert = decoded[:, : self.num_classes], expert[:, : self.num_classes]
        self.counts += _judged(decoded, expert, labels).sum(1).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the four numbers; see the class."""
        expert, decoded, agreeing, total = self.counts.to(torch.float64)
        return {
            "expert_accuracy": expert / total,
            "decoded_accuracy": decoded / total,
            "nda": normalized_decoding_accuracy(decoded, expert),
            "agreement": agreeing / total,
        }


class RiskPoint(NamedTuple):
    """A subset of the test samples, with their mean `risk` and results.

    On the curve ``coverage`` they are the share `at` with the least risk, on ``calibration`` those whose risk is within
    0.05 above `at`. The rest is as in `DecodingAccuracy`.
    """

    curve: str
    at: float
    samples: int
    risk: float
    agreement: float
    decoded_accuracy: float
    expert_accuracy: float


class RiskCurves(Metric):
    """How well the risk predicts errors of decoded answers, on one expert's own task.

    `compute` returns a list of `RiskPoint`, and of every sample its risk and whether the decoded answer differs from
    the expert's ``[n, 2]``. Every sample of the test set, whose size may be left out in one process, has a row, which
    one process fills in; rows are summed over processes.
    """

    full_state_update = False
    seen: Tensor

    def __init__(self, samples: int = 0) -> None:
        super().__init__()
        self.add_state("seen", torch.zeros(samples, 5), dist_reduce_fx="sum")

    def update(self, positions: Tensor, risk: Tensor, decoded: Tensor, expert: Tensor, labels: Tensor) -> None:
        """Add a batch: places in the test set, risks and labels ``[B]``, and logits without padding ``[B, C]``."""
        if (lacking := int(positions.max()) + 1 - len(self.seen)) > 0:
            self.seen = pad(self.seen, (0, 0, 0, lacking))
        self.seen[positions] = torch.stack([risk, *_judged(decoded, expert, labels)], 1).to(self.seen)

    def compute(self) -> tuple[list[RiskPoint], Tensor]:
        """Return the points of both curves, bins without a sample left out, and the samples in their order."""
        seen = self.seen[self.seen[:, 4] > 0].cpu()
        samples = torch.stack([seen[:, 0], 1 - seen[:, 3]], 1)
        seen = seen.double()
        seen = seen[seen[:, 0].argsort(stable=True)]
        parts = [("coverage", share, seen[: round(share * len(seen))]) for share in COVERAGES]
        bins = (20 * seen[:, 0]).long().clamp_max(19)
        parts += [("calibration", place / 20, seen[bins == place]) for place in range(20)]
        points = []
        for curve, at, part in parts:
            if len(part):
                risk, right, decoded_right, agreeing, _ = part.mean(0).tolist()
                points.append(RiskPoint(curve, at, len(part), risk, agreeing, decoded_right, right))
        return points, samples


class Residual(Metric):
    """The relative residual of a coded model, ‖f_c − Σβ_if_i‖ / ‖Σβ_if_i‖ over a data set.

    The norms are over all samples and outputs, summed over processes in float64. NaN before the first sample and where
    the target is exactly zero everywhere.

    >>> metric = coin.Residual()
    >>> metric.update(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
    >>> float(metric.compute())
    0.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, coded: Tensor, target: Tensor) -> None:
        """Add a batch: the coded model's logits and Σ_i β_i f_i, both ``[B, C]``, else a DataError."""
        if coded.shape != target.shape:
            raise DataError(
                f"found coded logits {list(coded.shape)} for targets {list(target.shape)}, expected the same"
            )
        wanted = target.to(torch.float64)
        norms = torch.stack([(coded.to(torch.float64) - wanted).square().sum(), wanted.square().sum()])
        self.squares += norms.to(self.squares.device)

    def compute(self) -> Tensor:
        """Return the residual, a float64 scalar, dimensionless."""
        error, wanted = self.squares
        return torch.where(wanted > 0, (error / wanted).sqrt(), torch.full_like(error, torch.nan))


def _judged(decoded: Tensor, expert: Tensor, labels: Tensor) -> Tensor:
    """Return ``[4, B]``: whether the expert is right, the decoded answer is, both agree; and 1 for every sample."""
    answered = torch.isfinite(decoded).all(1)
    from_decoded, from_expert = decoded.argmax(1), expert.argmax(1)
    right, stand_in_right = from_expert == labels, (from_decoded == labels) & answered
    return torch.stack([right, stand_in_right, (from_decoded == from_expert) & answered, torch.ones_like(answered)])


def normalized_decoding_accuracy(decoded_correct: Tensor, expert_correct: Tensor) -> Tensor:
    """Return NDA in float64 from how many test samples the decoded output and the expert itself classify correctly.

    Both accuracies divide by the same number of samples, so the counts' ratio is theirs, never a mean of the batches'.
    NaN where the expert is never right, which leaves nothing to recover. Source: arXiv 2409.01420, section IV.
    """
    ratio = decoded_correct.to(torch.float64) / expert_correct
    return torch.where(expert_correct > 0, ratio, torch.full_like(ratio, torch.nan))
