"""What is evaluated: coded models and compressed copies, described by their files, and the references."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Answers, Code, Decoder, DecoderKind, make_decoder
from coin.coding.decoder import Head
from coin.coding.decoder_config import REPLICA
from coin.errors import FileError
from coin.merging.provenance import Provenance
from coin.networks import BatchNormPolicy
from coin.networks.adapted import resident_nbytes
from coin.networks.files import NetworkFile, nbytes_together, open_network
from coin.networks.registry import empty_network

NONE, ORACLE = "none", "oracle"
"""The references: the surviving experts alone, and Σβ_if_i itself as the coded output."""


class Copied(Decoder):
    """The decoder of a lost expert's compressed copy, which answers in its place."""

    def decode(self, answers: Answers) -> Tensor:
        """Return the copy's logits ``[1, B, C]``."""
        return answers.coded


@dataclass(frozen=True, eq=False)
class Variant:
    """One system under evaluation: a merge method with its options, a reference, or one expert's compressed copy.

    Args:
        method: The method's label.
        code: The code, R×N.
        batchnorm: The BatchNorm policy, as results have it.
        networks: The places of its coded models, or of the copy, behind the experts; none for the references.
        samples_per_task, merge_seconds, merge_passes: How the coded models were made, as results have it.
        chosen: What was chosen for each coded model.
        kind: The method's own name.
        memory: The bytes of the coded models as stored; of copies those of all experts', with their base.
        resident: The bytes of weights that processes hold which answer with them.
        lost: The erasures to measure, by default all that the code can decode.
        adapted: Whether the coded models are bodies with adapters.
    """

    method: str
    code: Code
    batchnorm: str = ""
    networks: tuple[int, ...] = ()
    samples_per_task: int | None = None
    merge_seconds: float = 0.0
    merge_passes: float = 0.0
    chosen: tuple[dict[str, Any], ...] = ()
    kind: str | None = None
    memory: float = 0
    resident: float = 0
    lost: tuple[tuple[int, ...], ...] | None = None
    adapted: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether it is a compressed copy, whose answer is the lost expert's."""
        return self.kind == REPLICA

    def decoders(self, every: Sequence[DecoderKind]) -> Sequence[DecoderKind]:
        """Return those of the decoders that apply; ``none`` has ``ridge`` at least where any reads survivors.

        A copy costs what ``expert_head`` does: one network answers, and any number may be lost.
        """
        linear = [kind for kind in every if kind is DecoderKind.linear]
        if self.is_copy:
            return [DecoderKind.expert_head]
        if self.adapted:  # which has no one output for all experts, from which another is decoded
            return [kind for kind in every if kind is DecoderKind.expert_head]
        if self.method == ORACLE:
            return linear
        if self.method == NONE:
            with_survivors = [kind for kind in every if kind.reads_survivors]
            regressions = [kind for kind in with_survivors if kind not in linear]
            if with_survivors and not regressions:
                return [DecoderKind.ridge]
            return regressions
        return every

    def decoder(
        self, kind: DecoderKind, erased: Sequence[int], heads: Sequence[Head] | None
    ) -> Decoder:
        """Return a decoder of a kind for lost experts, unfitted; of a copy that of its own expert."""
        if self.is_copy:
            return Copied(kind, self.code, self.erasures()[0])
        return make_decoder(kind, self.code, erased, heads)

    def costs(self, kind: DecoderKind, kept: int, num_lost: int) -> dict[str, float]:
        """Return the columns of costs, NaN for the oracle; both memories have the bytes `kept` to decode."""
        if self.method == ORACLE:
            return dict.fromkeys(("memory_mib", "resident_mib", "forwards", "losses"), math.nan)
        num_experts = self.code.num_experts
        losses = kind.losses(num_experts, self.code.num_coded)
        if self.method == NONE:
            losses = min(losses, num_experts - 1)
        return {
            "memory_mib": (self.memory + kept) / 2**20,
            "resident_mib": (self.resident + kept) / 2**20,
            "forwards": kind.forwards(num_experts, len(self.networks), num_lost),
            "losses": losses,
        }

    def seen(self, answers: Answers) -> Answers:
        """Return the answers in this system: those of the experts and of its own coded models."""
        if self.method == ORACLE:
            coded = self.code.encode(answers.experts)
            return Answers(answers.experts, coded, tasks=answers.tasks)
        return answers.with_coded(self.networks)

    def erasures(self) -> list[tuple[int, ...]]:
        """Return the erasures to measure; for `NONE` not the loss of every expert."""
        every = self.code.erasures()
        if self.lost is not None:
            every = list(self.lost)
        if self.method == NONE:
            return [erased for erased in every if len(erased) < self.code.num_experts]
        return every


def read_coded(
    paths: Sequence[Path], fingerprints: Sequence[str]
) -> tuple[list[nn.Module], list[Variant]]:
    """Return coded models, of these experts, and a variant for the rows of each code, which must all be there."""
    files = [open_network(path) for path in paths]
    rows = [Provenance.of(file) for file in files]
    by_label: dict[str, list[int]] = {}
    for place, (file, made) in enumerate(zip(files, rows, strict=True)):
        if made.experts != list(fingerprints):
            raise FileError(
                f"'{file.path}' was made from other experts, or in another order; run coin merge again"
            )
        by_label.setdefault(made.label, []).append(place)
    modules = [file.module() for file in files]
    variants = []
    for places in by_label.values():
        places.sort(key=lambda place: rows[place].row)
        variant = _variant([files[place] for place in places], [rows[place] for place in places])
        resident = sum(resident_nbytes(modules[place]) for place in places)
        variants.append(replace(variant, networks=tuple(places), resident=resident))
    return modules, variants


def _variant(files: Sequence[NetworkFile], rows: Sequence[Provenance]) -> Variant:
    """Return the variant of the files of all rows of a code, in their order."""
    first = rows[0]
    code = Code(first.code)
    found = [made.row for made in rows]
    has_one_code = all(made.code == first.code for made in rows)
    if found != list(range(code.num_coded)) or not has_one_code:
        raise FileError(
            f"found rows {found} of method {first.label}, expected all {code.num_coded} of one code; "
            "run coin merge again"
        )
    policy = first.batchnorm
    taken = [str(made.chosen["batchnorm"]) for made in rows if "batchnorm" in made.chosen]
    if policy == BatchNormPolicy.auto and taken:
        policy = f"{policy}:{'+'.join(dict.fromkeys(taken))}"
    return Variant(
        method=first.label,
        code=code,
        batchnorm=policy,
        samples_per_task=first.samples_per_task,
        merge_seconds=sum(made.seconds for made in rows),
        merge_passes=sum(made.passes for made in rows),
        chosen=tuple(dict(made.chosen) for made in rows),
        kind=first.method.get("name"),
        memory=nbytes_together(files),
        adapted=any(file.adapters for file in files),
    )


def read_copies(
    paths: Sequence[Path], fingerprints: Sequence[str], code: Code, first: int
) -> list[Variant]:
    """Return a variant for each expert's compressed copy, in files; their places begin at `first`.

    Its costs are those of all copies of its label. Raises FileError where a file is of none of the `fingerprints`, or
    the second of one.
    """
    by_label: dict[str, list[Variant]] = {}
    without_copy: dict[
        str, list[str]
    ] = {}  # by label the fingerprints of experts, "" where a copy is found
    bases: dict[str, int] = {}  # bytes
    for place, path in enumerate(paths):
        file = open_network(path)
        label = str(file.provenance.get("label", REPLICA))
        marks = without_copy.setdefault(label, list(fingerprints))
        of = file.provenance.get("of")
        if of not in marks:
            raise FileError(
                f"'{path}' is not a compressed copy of these experts, or a second one of the same; compress them again"
            )
        expert = marks.index(of)
        marks[expert] = ""
        copy = Variant(
            method=label,
            code=code,
            networks=(first + place,),
            merge_seconds=float(file.provenance["seconds"]),
            chosen=(file.provenance["compression"],),
            kind=REPLICA,
            memory=file.nbytes,
            resident=resident_nbytes(empty_network(file.config, file.num_classes)),
            lost=((expert,),),
        )
        by_label.setdefault(label, []).append(copy)
        bases[label] = max(bases.get(label, 0), file.base_nbytes)
    found: list[Variant] = []
    for label, copies in by_label.items():
        memory = sum(each.memory for each in copies) + bases[label]
        seconds = sum(each.merge_seconds for each in copies)
        # All are held as stored, and one of them whole to answer.
        resident = memory + max(each.resident for each in copies)
        costs: dict[str, Any] = {"memory": memory, "resident": resident, "merge_seconds": seconds}
        found += [replace(each, **costs) for each in copies]
    return found
