"""The decoders of a served system: the best one that there is for whatever has arrived."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from coin.coding import Answers, Code, Decoder, decode_linear
from coin.coding.code import MAX_AMPLIFICATION
from coin.errors import DecodingError
from coin.serving.layout import Layout
from coin.serving.replies import Reply


class Decodings:
    """Decodes missing experts' answers from the replies that have arrived.

    Where all coded models have answered and there is a fitted decoder for just the missing experts, it is used;
    otherwise the code's equations are solved with the rows that are there.

    Args:
        code: The code.
        fitted: Fitted decoders of different erasures.
        feature_widths: The widths of the stages within the servers' features, for decoders that read several stages.
        class_counts: Of every expert, for the risk of its decoded answers; none takes all outputs.
    """

    def __init__(
        self,
        code: Code,
        fitted: Iterable[Decoder] = (),
        feature_widths: Sequence[int] | None = None,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        self.code = code
        self.feature_widths = feature_widths
        self.class_counts = class_counts
        self.fitted = {tuple(sorted(decoder.erased)): decoder for decoder in fitted}

    def decode(self, replies: Mapping[int, Reply]) -> tuple[dict[int, Tensor], tuple[int, ...], dict[int, Tensor]]:
        """Decode every expert whose reply is missing.

        Args:
            replies: By server, of one batch: at least one of a coded model.

        Returns:
            The missing experts' logits ``[B, C]``, the servers that they were decoded from, and the risk of each
            answer ``[B]`` where a fitted decoder gave it.

        Raises:
            DecodingError: The replies do not suffice, or what comes out is not finite.
        """
        count = self.code.num_experts
        present = [expert for expert in range(count) if expert in replies]
        erased = tuple(expert for expert in range(count) if expert not in replies)
        rows = [row for row in range(self.code.num_coded) if count + row in replies]
        order: Sequence[int] = erased
        risks: dict[int, Tensor] = {}
        if erased in self.fitted and len(rows) == self.code.num_coded:
            decoder = self.fitted[erased]
            decoded, order = decoder.decode(self._answers(replies)), decoder.erased
            for lost, logits in zip(order, decoded, strict=True):
                risks[lost] = decoder.risk(lost, logits, self.class_counts[lost] if self.class_counts else None)
        else:
            coded = torch.stack([replies[count + row].logits for row in rows])
            survivors = torch.stack([replies[expert].logits for expert in present]) if present else coded[:0]
            decoded = decode_linear(self.code.matrix[rows], coded, survivors, erased)
        if not bool(torch.isfinite(decoded).all()):
            raise DecodingError(
                f"the decoded answers of {list(erased)} are not finite; the servers' answers are too large"
            )
        return dict(zip(order, decoded, strict=True)), (*present, *(count + row for row in rows)), risks

    def _answers(self, replies: Mapping[int, Reply]) -> Answers:
        count = self.code.num_experts
        some = next(iter(replies.values()))
        nothing = Reply(torch.full_like(some.logits, torch.nan), some.logits[:, :0])
        every = [replies.get(server, nothing) for server in range(count + self.code.num_coded)]
        features = [reply.features for reply in every if reply.features is not None]
        whole = len(features) == len(every)
        return Answers(
            experts=torch.stack([reply.logits for reply in every[:count]]),
            coded=torch.stack([reply.logits for reply in every[count:]]),
            expert_features=features[:count] if whole else None,
            coded_features=features[count:] if whole else None,
            feature_widths=self.feature_widths if whole else None,
        )


def coded_layout(code: Code) -> Layout:
    """Return the servers of a code: its experts and coded models, and which of these make up for which experts."""
    solvable = set()
    rows = range(code.num_coded)
    for erased in code.erasures():
        missing = sum(1 << expert for expert in erased)
        for size in range(len(erased), code.num_coded + 1):
            for chosen in combinations(rows, size):
                columns = code.matrix[list(chosen)][:, list(erased)]
                if float(torch.linalg.svdvals(columns)[-1]) * MAX_AMPLIFICATION >= 1:
                    solvable.add((sum(1 << row for row in chosen), missing))
    return Layout(code.num_experts, code.num_coded, solvable=frozenset(solvable))


def standin_layout(code: Code, every_row: bool) -> Layout:
    """Return the servers of a code whose decoder reads no survivor.

    Args:
        code: The code.
        every_row: Whether it reads all coded models for an expert, or the one in which that weighs most.
    """
    best = code.matrix.argmax(0).tolist()
    rows = [(1 << code.num_coded) - 1 if every_row else 1 << row for row in best]
    return Layout(code.num_experts, code.num_coded, alone=tuple(rows))
