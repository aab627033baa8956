"""The numbers behind the metrics, as pure functions of tensors."""

import torch
from torch import Tensor

from coin.errors import DataError


def decoding_counts(decoded: Tensor, expert: Tensor, labels: Tensor) -> Tensor:
    """Count, over a batch, how often the expert and its decoded stand-in are right and agree.

    A decoded row that is not finite is never right and never agrees: an answer of NaN is no answer.

    Args:
        decoded: Logits f̂_j ``[B, C]``, cut to the task's classes.
        expert: Logits f_j ``[B, C]``.
        labels: Classes ``[B]``.

    Returns:
        Counts ``[4]``, int64: expert correct, decoded correct, both predict the same class, samples.

    Raises:
        DataError: The shapes do not fit together.
    """
    if decoded.ndim != 2 or decoded.shape != expert.shape or labels.shape != decoded.shape[:1]:
        raise DataError(
            f"found decoded logits {list(decoded.shape)}, expert's logits {list(expert.shape)} and labels "
            f"{list(labels.shape)}, expected [B, C], [B, C] and [B]"
        )
    answered = torch.isfinite(decoded).all(1)
    from_decoded, from_expert = decoded.argmax(1), expert.argmax(1)
    return torch.stack(
        [
            (from_expert == labels).sum(),
            ((from_decoded == labels) & answered).sum(),
            ((from_decoded == from_expert) & answered).sum(),
            torch.tensor(len(labels), device=labels.device),
        ]
    ).to(torch.int64)


def normalized_decoding_accuracy(decoded_correct: Tensor, expert_correct: Tensor) -> Tensor:
    """Return NDA, the decoded accuracy over the expert's accuracy, from totals over the whole test set.

    Both accuracies divide by the same number of samples, so the counts' ratio is theirs. An expert that is never
    right leaves nothing to recover: NDA is then NaN, whatever was decoded.

    Source: arXiv 2409.01420, section IV.

    Args:
        decoded_correct: Number of test samples that the decoded output classifies correctly, any shape.
        expert_correct: The same for the expert itself.

    Returns:
        The ratio, float64.
    """
    ratio = decoded_correct.to(torch.float64) / expert_correct
    return torch.where(expert_correct > 0, ratio, torch.full_like(ratio, torch.nan))


def squared_residual(coded: Tensor, target: Tensor) -> Tensor:
    """Return Σ‖f_c − Σ_i β_i f_i‖² and Σ‖Σ_i β_i f_i‖² over a batch.

    Args:
        coded: Logits of the coded model ``[B, C]``.
        target: Σ_i β_i f_i ``[B, C]``.

    Returns:
        ``[2]``, float64.

    Raises:
        DataError: The shapes differ.
    """
    if coded.shape != target.shape:
        raise DataError(f"found coded logits {list(coded.shape)} for targets {list(target.shape)}, expected the same")
    wanted = target.to(torch.float64)
    return torch.stack([(coded.to(torch.float64) - wanted).square().sum(), wanted.square().sum()])
