"""Fewer numbers per answer: what a server may send in the place of all its features."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decomposition import thin_svd
from coin.errors import ConfigurationError, DecodingError


class ProjectionKind(StrEnum):
    """How features are reduced."""

    principal = "principal"
    """To their principal components on the calibration data."""
    random = "random"
    """To random orthogonal directions, which need no data."""


@dataclass(frozen=True)
class Projection:
    """The affine map x ↦ (x − mean) · directions of one network's features.

    Args:
        mean: ``[F]``.
        directions: Orthonormal columns ``[F, K]``.
    """

    mean: Tensor
    directions: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return ``[B, K]`` for features ``[B, F]``, in their type."""
        return (features - self.mean.to(features)) @ self.directions.to(features)


def fit_projection(features: Tensor, components: int, kind: ProjectionKind | str) -> Projection:
    """Return a projection of one network's features to `components` numbers.

    Args:
        features: The network's features on calibration data ``[P, F]``.
        components: K, at least 1; where F, or for the principal kind P, is smaller, that many.
        kind: Principal or random.

    Raises:
        ConfigurationError: There is no such kind, or `components` is less than 1.
    """
    if components < 1:
        raise ConfigurationError(f"found {components} components, expected at least 1")
    try:
        kind = ProjectionKind(kind)
    except ValueError as error:
        raise ConfigurationError(f"found projection '{kind}', expected one of {', '.join(ProjectionKind)}") from error
    x = features.to(torch.float64)
    mean = x.mean(0)
    if kind is ProjectionKind.principal:
        directions = thin_svd(x - mean)[2][:components].T
    else:
        width = features.shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(width, min(components, width), generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(drawn).Q.to(features.device)
    return Projection(mean, directions)


def project_answers(answers: Answers, experts: Sequence[Projection], coded: Sequence[Projection]) -> Answers:
    """Return the answers with every network's features, all stages together, reduced by its own projection.

    Raises:
        DecodingError: The answers hold no features, or those of another number of networks.
    """
    if answers.expert_features is None or answers.coded_features is None:
        raise DecodingError("found answers without features, expected features to project")
    if (len(experts), len(coded)) != (answers.num_experts, answers.num_coded):
        raise DecodingError(
            f"found projections for {len(experts)} experts and {len(coded)} coded models, "
            f"expected {answers.num_experts} and {answers.num_coded}"
        )
    return Answers(
        answers.experts,
        answers.coded,
        [project(feature) for project, feature in zip(experts, answers.expert_features, strict=True)],
        [project(feature) for project, feature in zip(coded, answers.coded_features, strict=True)],
        tasks=answers.tasks,
    )
