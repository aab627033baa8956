"""Servers' replies, the check of a reply, and the answers to a query."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coin.errors import ServingError


@dataclass(frozen=True)
class Reply:
    """One server's reply to a batch: logits ``[B, C]`` and, for decoders that read them, features ``[B, F]``."""

    logits: Tensor
    features: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Reply":
        """Return the reply to some of the inputs."""
        return Reply(self.logits[start:stop], None if self.features is None else self.features[start:stop])


Server = Callable[[Tensor], Awaitable[Reply]]
"""Answers a batch of inputs ``[B, ...]``; raises where it cannot."""


@dataclass(frozen=True)
class ReplyFormat:
    """The format of a valid reply: C logits and F features of every server, None if they return logits only."""

    outputs: int
    features: int | None = None

    def check(self, reply: Reply, samples: int) -> None:
        """Raise `ServingError` unless the reply is finite and has the shapes for this number of inputs."""
        for what, values, width in (
            ("logits", reply.logits, self.outputs),
            ("features", reply.features, self.features),
        ):
            if width is None:
                continue
            if values is None or values.shape != (samples, width):
                found = None if values is None else list(values.shape)
                raise ServingError(f"found {what} {found}, expected [{samples}, {width}]")
            if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
                raise ServingError(f"found {what} that are not finite numbers")


class Decoded(NamedTuple):
    """One expert's decoded answers: logits ``[B, C]``, their risk ``[B]``, and whether they are accepted ``[B]``."""

    logits: Tensor
    risk: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Answer:
    """The answer to a query for one expert.

    Attributes:
        expert: The expert; its logits are ``[B, C]``.
        decoded: Whether any were decoded from other servers' answers; otherwise they are the expert's own.
        answered_by: The names of the servers whose answers these are or were decoded from.
        seconds: The time from the query to its answer.
        risk: The probability that the expert's own is another class ``[B]`` (`coin.coding`): 0 of its own, NaN if
            unknown.
        accepted: Whether it is the expert's own, or its risk is below the threshold of the run's promise ``[B]``.
    """

    expert: int
    logits: Tensor
    decoded: bool
    answered_by: tuple[str, ...]
    seconds: float
    risk: Tensor
    accepted: Tensor
