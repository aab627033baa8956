"""The decoders of a served system: the best available one for the replies that have arrived."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch

from coin.coding import Answers, Code, Decoder, answer_score, decode_linear
from coin.coding.code import MAX_AMPLIFICATION
from coin.errors import DecodingError
from coin.serving.layout import Layout
from coin.serving.replies import Decoded, Reply


class Decodings:
    """Decodes missing experts' answers from the replies that have arrived.

    A decoder that needs no survivor decodes any missing expert. Otherwise, if all coded models have answered and a
    decoder was fitted for exactly the missing experts, it is used; else the code's equations are solved with the
    available rows.

    Args:
        code: The code.
        fitted: Decoders of different erasures, or one of all experts that needs no survivor.
        feature_widths: The widths of the stages within the servers' features, for decoders that read several stages.
        class_counts: Every expert's class count, for the risk of its decoded answers; by default all outputs.
        thresholds: The risk up to which an expert's answers are accepted, by the lost experts and this one; for a
            decoder that needs no survivor, by this one alone.
    """

    def __init__(
        self,
        code: Code,
        fitted: Iterable[Decoder] = (),
        feature_widths: Sequence[int] | None = None,
        class_counts: Sequence[int] | None = None,
        thresholds: Mapping[tuple[tuple[int, ...], int], float] | None = None,
    ) -> None:
        self.code, self.feature_widths, self.class_counts = code, feature_widths, class_counts
        self.thresholds = thresholds or {}
        self.fitted = {tuple(sorted(decoder.erased)): decoder for decoder in fitted}
        every = self.fitted.get(tuple(range(code.num_experts)))
        self._alone = every if every is not None and not every.config.reads_survivors else None

    def decode(
        self, replies: Mapping[int, Reply], wanted: Iterable[int] | None = None
    ) -> tuple[dict[int, Decoded], tuple[int, ...]]:
        """Return the `wanted` experts' decoded answers, by default all missing ones', and the servers that were read.

        `replies` are those to one batch by server, at least one of a coded model. Raises DecodingError where they do
        not suffice, or decoded answers are not finite.
        """
        count, decoder = self.code.num_experts, self._alone
        present = [expert for expert in range(count) if expert in replies]
        missing = tuple(expert for expert in range(count) if expert not in replies)
        rows = [row for row in range(self.code.num_coded) if count + row in replies]
        if decoder is not None:
            present = []
        elif len(rows) == self.code.num_coded:
            decoder = self.fitted.get(missing)
        if decoder is None:
            coded = torch.stack([replies[count + row].logits for row in rows])
            survivors = torch.stack([replies[expert].logits for expert in present]) if present else coded[:0]
            logits = dict(zip(missing, decode_linear(self.code.matrix[rows], coded, survivors, missing), strict=True))
        else:
            logits = dict(zip(decoder.erased, decoder.decode(self._answers(replies)), strict=True))
        found = {}
        for expert in missing if wanted is None else wanted:
            if not bool(torch.isfinite(logits[expert]).all()):
                raise DecodingError(
                    f"the decoded answers of {list(missing)} are not finite; the servers' answers are too large"
                )
            risk = answer_score(logits[expert][:, : self.class_counts[expert] if self.class_counts else None])
            threshold = self.thresholds.get(((expert,) if self._alone else missing, expert), -torch.inf)
            found[expert] = Decoded(logits[expert], risk, risk <= threshold)
        return found, (*present, *(count + row for row in rows))

    def _answers(self, replies: Mapping[int, Reply]) -> Answers:
        count, some = self.code.num_experts, next(iter(replies.values()))
        unknown = None if some.features is None else torch.full_like(some.features, torch.nan)
        nothing = Reply(torch.full_like(some.logits, torch.nan), unknown)
        every = [replies.get(server, nothing) for server in range(count + self.code.num_coded)]
        features = [reply.features for reply in every if reply.features is not None]
        return Answers(
            experts=torch.stack([reply.logits for reply in every[:count]]),
            coded=torch.stack([reply.logits for reply in every[count:]]),
            expert_features=features[:count] or None,
            coded_features=features[count:] or None,
        )


def coded_layout(code: Code) -> Layout:
    """Return the servers of a code: experts, coded models, and which coded models can replace which experts."""
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
    """Return the servers of a code whose decoder needs no survivor, but `every_row` or an expert's heaviest one."""
    best = code.matrix.argmax(0).tolist()
    rows = [(1 << code.num_coded) - 1 if every_row else 1 << row for row in best]
    return Layout(code.num_experts, code.num_coded, alone=tuple(rows))
