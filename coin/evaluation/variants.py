"""What is evaluated: coded models and replicas read from files, and the references."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from coin.coding import Answers, Code, DecoderKind
from coin.coding.decoder_config import REPLICA
from coin.errors import FileError
from coin.networks import BatchNormPolicy, load_network
from coin.networks.adapted import resident_nbytes
from coin.networks.files import NetworkFile, nbytes_together, open_network

NONE, ORACLE = "none", "oracle"
"""The references: the surviving experts alone, and Σβ_if_i itself as the coded output."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One coded system under evaluation: a merge method with its options, or one of the two references.

    Args:
        method: The method's label.
        code: The code, R×N.
        batchnorm: The BatchNorm policy, as results have it.
        networks: The places of its coded models among all; none for the references.
        samples_per_task, merge_seconds, merge_passes: How the coded models were made, as results have it.
        chosen: What was chosen for each coded model.
        kind: The method's own name.
        memory: The bytes of the coded models as stored, with the base of compressed ones.
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

    def decoders(self, every: Sequence[DecoderKind]) -> Sequence[DecoderKind]:
        """Return those of the decoders that apply; ``none`` has ``ridge`` at least where any reads survivors."""
        linear = [kind for kind in every if kind is DecoderKind.linear]
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


class Replica(NamedTuple):
    """The file of the compressed expert of one task; `variant` has the costs of all copies of its label."""

    variant: Variant
    task: int
    path: Path


def read_coded(
    paths: Sequence[Path], fingerprints: Sequence[str]
) -> tuple[list[nn.Module], list[Variant]]:
    """Return coded models, of these experts, and a variant for the rows of each code, which must all be there."""
    files = [open_network(path) for path in paths]
    modules = [file.module() for file in files]
    groups: dict[tuple[str, str], list[int]] = {}
    for place, file in enumerate(files):
        made = file.provenance
        if "code" not in made:
            raise FileError(
                f"'{file.path}' is no coded model, expected a file that coin merge wrote"
            )
        if made.get("experts") != list(fingerprints):
            raise FileError(
                f"'{file.path}' was made from other experts, or in another order; run coin merge again"
            )
        variant = (made["label"], made["batchnorm"])
        groups.setdefault(variant, []).append(place)
    variants = []
    for places in groups.values():
        in_order = sorted(places, key=lambda place: int(files[place].provenance["row"]))
        rows = [files[place] for place in in_order]
        resident = sum(resident_nbytes(modules[place]) for place in in_order)
        variants.append(_variant(rows, tuple(in_order), resident))
    return modules, variants


def _variant(files: Sequence[NetworkFile], places: tuple[int, ...], resident: int) -> Variant:
    """Return the variant of the files of all rows of a code, in their order."""
    rows = [file.provenance for file in files]
    first = rows[0]
    code = Code(first["code"])
    found = [row["row"] for row in rows]
    has_one_code = all(row["code"] == first["code"] for row in rows)
    expected = list(range(code.num_coded))
    if found != expected or not has_one_code:
        raise FileError(
            f"found rows {found} of method {first['label']}, expected all {code.num_coded} of one code; "
            "run coin merge again"
        )
    chosen = tuple(row.get("chosen") or {} for row in rows)
    policy = first["batchnorm"]
    taken = [str(each["batchnorm"]) for each in chosen if "batchnorm" in each]
    if policy == BatchNormPolicy.auto and taken:
        policy = f"{policy}:{'+'.join(dict.fromkeys(taken))}"
    return Variant(
        method=first["label"],
        code=code,
        batchnorm=policy,
        networks=places,
        samples_per_task=first["samples_per_task"],
        merge_seconds=sum(float(row["seconds"]) for row in rows),
        merge_passes=sum(float(row["passes"]) for row in rows),
        chosen=chosen,
        kind=(first.get("method") or {}).get("name"),
        memory=nbytes_together(files),
        resident=resident,
        adapted=any(file.adapters for file in files),
    )


def read_replicas(paths: Sequence[Path], fingerprints: Sequence[str], code: Code) -> list[Replica]:
    """Return the files of compressed experts; a FileError where one is of none of the `fingerprints`."""
    groups: dict[str, list[NetworkFile]] = {}
    largest: dict[str, int] = {}  # bytes of a whole copy
    for path in paths:
        file = load_network(path)
        if file.provenance.get("of") not in fingerprints:
            raise FileError(
                f"'{path}' is not a compressed copy of these experts; compress them again"
            )
        label = str(file.provenance.get("label", REPLICA))
        whole = resident_nbytes(file.network)
        largest[label] = max(whole, largest.get(label, 0))
        groups.setdefault(label, []).append(replace(file, content={}))  # without its tensors
    found = []
    for label, files in groups.items():
        memory = nbytes_together(files)
        variant = Variant(
            method=label,
            code=code,
            merge_seconds=sum(float(file.provenance["seconds"]) for file in files),
            chosen=(files[0].provenance["compression"],),
            kind=REPLICA,
            memory=memory,
            resident=memory + largest[label],  # all as stored, and one of them whole to answer
        )
        # Of equal experts each has a copy.
        without_copy = list(fingerprints)
        for file in files:
            of = file.provenance["of"]
            if of not in without_copy:
                raise FileError(
                    f"'{file.path}' is a second copy of an expert, expected one of each; leave it out"
                )
            task = without_copy.index(of)
            without_copy[task] = ""
            found.append(Replica(variant, task, file.path))
    return found
