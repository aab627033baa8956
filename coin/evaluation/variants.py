"""What is evaluated: coded models and replicas read from files, and the references."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from coin.coding import Answers, Code, DecoderConfig, DecoderKind
from coin.coding.decoder_config import REPLICA
from coin.errors import FileError
from coin.networks import BatchNormPolicy, load_network, pad_head
from coin.networks.adapted import resident_nbytes
from coin.networks.files import nbytes_together, open_network, resident_copies

NONE, ORACLE = "none", "oracle"
"""The references: the surviving experts alone, and Σβ_if_i itself as the coded output."""
MADE = ("samples_per_task", "merge_seconds", "merge_passes")
"""Columns on how coded models were made; without samples the first is None."""


@dataclass(frozen=True)
class Variant:
    """One coded system under evaluation: a merge method with its options, or one of the two references.

    `networks` are the places of its coded models among all, none for the references; `made` are the columns `MADE`,
    `chosen` is what was chosen for each, `kind` the method's own name, `memory` their bytes as stored, with the base of
    compressed ones; `resident` are the bytes of weights that processes hold which answer with them; `lost` are the
    erasures to measure, by default all that the code can decode; `adapted` says whether they are bodies with adapters.
    """

    method: str
    code: Code
    batchnorm: str = ""
    networks: tuple[int, ...] = ()
    made: Mapping[str, Any] = field(default_factory=lambda: dict(zip(MADE, (None, 0.0, 0.0), strict=True)))
    chosen: tuple[dict[str, Any], ...] = ()
    kind: str | None = None
    memory: float = 0
    resident: float = 0
    lost: tuple[tuple[int, ...], ...] | None = None
    adapted: bool = False

    def decoders(self, every: Sequence[DecoderConfig]) -> Sequence[DecoderConfig]:
        """Return those of the decoders that apply; ``none`` has ``ridge`` at least, so that every table has it."""
        if self.adapted:  # which has no one output for all experts, from which another is decoded
            return [config for config in every if config.kind is DecoderKind.expert_head]
        if self.method == ORACLE:
            return [config for config in every if config.kind is DecoderKind.linear]
        if self.method != NONE:
            return every
        alone = [config for config in every if config.kind is not DecoderKind.linear and config.reads_survivors]
        return alone or [DecoderConfig(DecoderKind.ridge)]

    def costs(self, config: DecoderConfig, kept: int, num_lost: int) -> dict[str, float]:
        """Return the columns of costs, NaN for the oracle; both memories have the bytes `kept` to decode."""
        if self.method == ORACLE:
            return dict.fromkeys(("memory_mib", "resident_mib", "forwards", "losses"), math.nan)
        experts = self.code.num_experts
        return {
            "memory_mib": (self.memory + kept) / 2**20,
            "resident_mib": (self.resident + kept) / 2**20,
            "forwards": config.forwards(experts, len(self.networks), num_lost),
            "losses": min(config.losses(experts, self.code.num_coded), experts - (self.method == NONE)),
        }

    def seen(self, answers: Answers) -> Answers:
        """Return the answers in this system: those of the experts and of its own coded models."""
        if self.method == ORACLE:
            return Answers(answers.experts, self.code.encode(answers.experts), tasks=answers.tasks)
        return answers.with_coded(self.networks)

    def erasures(self) -> list[tuple[int, ...]]:
        """Return the erasures to measure; for `NONE` not the loss of every expert."""
        every = self.code.erasures() if self.lost is None else self.lost
        return [erased for erased in every if self.method != NONE or len(erased) < self.code.num_experts]


class Replica(NamedTuple):
    """The compressed copy of the expert of one task; `variant` has the costs of all copies of its label."""

    variant: Variant
    task: int
    network: nn.Module


def read_coded(paths: Sequence[Path], fingerprints: Sequence[str]) -> tuple[list[nn.Module], list[Variant]]:
    """Return coded models, of these experts, and a variant for the rows of each code, which must all be there."""
    files = [open_network(path) for path in paths]
    modules = [file.module() for file in files]
    groups: dict[tuple[str, str], list[int]] = {}
    for index, file in enumerate(files):
        made = file.provenance
        if "code" not in made:
            raise FileError(f"'{file.path}' is no coded model, expected a file that coin merge wrote")
        if made.get("experts") != list(fingerprints):
            raise FileError(f"'{file.path}' was made from other experts, or in another order; run coin merge again")
        groups.setdefault((made["label"], made["batchnorm"]), []).append(index)
    variants = []
    for (method, policy), indices in groups.items():
        networks = sorted(indices, key=lambda index: int(files[index].provenance["row"]))
        rows = [files[index].provenance for index in networks]
        first, found = rows[0], [row["row"] for row in rows]
        code = Code(first["code"])
        if found != list(range(code.num_coded)) or any(row["code"] != first["code"] for row in rows):
            expected = f"all {code.num_coded} of one code; run coin merge again"
            raise FileError(f"found rows {found} of method {method}, expected {expected}")
        chosen = tuple(row.get("chosen") or {} for row in rows)
        taken = "+".join(dict.fromkeys(str(each["batchnorm"]) for each in chosen if "batchnorm" in each))
        policy = f"{policy}:{taken}" if policy == BatchNormPolicy.auto and taken else policy
        seconds, passes = (sum(float(row[name]) for row in rows) for name in ("seconds", "passes"))
        made = dict(zip(MADE, (first["samples_per_task"], seconds, passes), strict=True))
        kind = (first.get("method") or {}).get("name")
        own = [files[index] for index in networks]
        memory = nbytes_together(own)
        resident = sum(resident_nbytes(modules[index]) for index in networks)
        adapted = any(file.adapters for file in own)
        variant = Variant(
            method, code, policy, tuple(networks), made, chosen, kind, memory, resident=resident, adapted=adapted
        )
        variants.append(variant)
    return modules, variants


def read_replicas(paths: Sequence[Path], fingerprints: Sequence[str], width: int, code: Code) -> list[Replica]:
    """Return compressed copies of experts, padded to `width`; a FileError where one has none of the `fingerprints`."""
    groups: dict[str, list[Any]] = {}
    for file in map(load_network, paths):
        if file.provenance.get("of") not in fingerprints:
            raise FileError(f"'{file.path}' is not a compressed copy of these experts; compress them again")
        groups.setdefault(str(file.provenance.get("label", REPLICA)), []).append(file)
    found = []
    for label, own in groups.items():
        made = dict(zip(MADE, (None, sum(float(file.provenance["seconds"]) for file in own), 0.0), strict=True))
        chosen = (own[0].provenance["compression"],)
        memory = nbytes_together(own)
        resident = resident_copies(own)
        variant = Variant(label, code, made=made, chosen=chosen, kind=REPLICA, memory=memory, resident=resident)
        tasks = [fingerprints.index(file.provenance["of"]) for file in own]
        found += [Replica(variant, task, pad_head(file.network, width)) for task, file in zip(tasks, own, strict=True)]
    return found
