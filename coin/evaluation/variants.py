"""The coded systems under evaluation: coded models and replicas read from files, and the references."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from coin.coding import Answers, Code, DecoderConfig, DecoderKind
from coin.coding.decoder_config import REPLICA
from coin.errors import FileError
from coin.networks import BatchNormPolicy, load_network, nbytes_together, pad_head

NONE = "none"
ORACLE = "oracle"
MADE = ("samples_per_task", "merge_seconds", "merge_passes")


@dataclass(frozen=True)
class Variant:
    """One coded system under evaluation: a merge method with its options, or one of the two references.

    `networks` are its coded models among all of the evaluation, none for the references; `chosen` is what was chosen
    for each, `kind` the method's own name, `memory` the bytes of the coded models as stored, with the base of
    compressed ones; `lost` are the erasures to measure, by default all that the code can decode; `made` are columns of
    ``results.csv`` on how it was made, its `samples_per_task` None where none were used.
    """

    method: str
    code: Code
    batchnorm: str = ""
    networks: tuple[int, ...] = ()
    made: Mapping[str, Any] = field(default_factory=lambda: dict.fromkeys(MADE, 0.0) | {"samples_per_task": None})
    chosen: tuple[dict[str, Any], ...] = ()
    kind: str | None = None
    memory: float = 0
    lost: tuple[tuple[int, ...], ...] | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What ``results.csv`` says of it."""
        row = "+".join(map(str, range(len(self.networks))))
        return {"method": self.method, "batchnorm": self.batchnorm, "code_row": row, **self.made}

    @property
    def is_none(self) -> bool:
        """Whether this is the reference that decodes from the surviving experts alone."""
        return self.method == NONE

    @property
    def is_oracle(self) -> bool:
        """Whether this is the reference whose coded outputs are Σβ_if_i itself."""
        return self.method == ORACLE

    def decoders(self, every: Sequence[DecoderConfig]) -> Sequence[DecoderConfig]:
        """Return those of the decoders that apply: features need a network, and all but regressions coded outputs.

        Where none reads the survivors alone, ``none`` has ``ridge``: no table is without it.
        """
        if self.is_oracle:
            return [config for config in every if config.kind is DecoderKind.linear]
        if not self.is_none:
            return every
        alone = [config for config in every if config.kind is not DecoderKind.linear and config.reads_survivors]
        return alone or [DecoderConfig(DecoderKind.ridge)]

    def costs(self, config: DecoderConfig, kept: int, num_lost: int) -> dict[str, float]:
        """Return the columns ``memory_mib``, ``forwards`` and ``losses``; `kept` is the bytes stored for decoding.

        All are NaN for the oracle, which cannot be deployed.
        """
        if self.is_oracle:
            return dict.fromkeys(("memory_mib", "forwards", "losses"), math.nan)
        experts, most = self.code.num_experts, self.code.num_experts - self.is_none
        return {
            "memory_mib": (self.memory + kept) / 2**20,
            "forwards": config.forwards(experts, len(self.networks), num_lost),
            "losses": min(config.losses(experts, self.code.num_coded), most),
        }

    def seen(self, answers: Answers) -> Answers:
        """Return the answers in this system: those of the experts and of its own coded models."""
        if self.is_oracle:
            return Answers(answers.experts, self.code.encode(answers.experts), tasks=answers.tasks)
        return answers.with_coded(self.networks)

    def erasures(self) -> list[tuple[int, ...]]:
        """Return the erasures to measure; for `NONE` not the loss of every expert."""
        every = self.code.erasures() if self.lost is None else self.lost
        return [erased for erased in every if not self.is_none or len(erased) < self.code.num_experts]


class Replica(NamedTuple):
    """The compressed copy of the expert of one task; `variant` has the costs of all copies of its label."""

    variant: Variant
    task: int
    network: nn.Module


def read_coded(paths: Sequence[Path], fingerprints: Sequence[str]) -> tuple[list[nn.Module], list[Variant]]:
    """Read coded models, and group the rows of each code into a variant.

    Raises FileError if a file is missing or damaged, lacks the other rows of its code, or was made from experts with
    other `fingerprints`.
    """
    files = [load_network(path) for path in paths]
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
            raise FileError(
                f"found rows {found} of method {method}, expected one file for each of the {code.num_coded} rows of "
                "one code; run coin merge again"
            )
        chosen = tuple(row.get("chosen") or {} for row in rows)
        taken = "+".join(dict.fromkeys(str(each["batchnorm"]) for each in chosen if "batchnorm" in each))
        variants.append(
            Variant(
                method=method,
                code=code,
                batchnorm=f"{policy}:{taken}" if policy == BatchNormPolicy.auto and taken else policy,
                networks=tuple(networks),
                made={
                    "samples_per_task": first["samples_per_task"],
                    "merge_seconds": sum(float(row["seconds"]) for row in rows),
                    "merge_passes": sum(float(row["passes"]) for row in rows),
                },
                chosen=chosen,
                kind=(first.get("method") or {}).get("name"),
                memory=nbytes_together(files[index] for index in networks),
            )
        )
    return [file.network for file in files], variants


def read_replicas(paths: Sequence[Path], fingerprints: Sequence[str], width: int, code: Code) -> list[Replica]:
    """Read compressed experts, with the total cost and memory of each label; logits are padded to `width`.

    Raises FileError where a file is missing or damaged, or not a copy of an expert with one of the `fingerprints`.
    """
    groups: dict[str, list[Any]] = {}
    for file in map(load_network, paths):
        if file.provenance.get("of") not in fingerprints:
            raise FileError(f"'{file.path}' is not a compressed copy of these experts; compress them again")
        groups.setdefault(str(file.provenance.get("label", REPLICA)), []).append(file)
    found = []
    for label, own in groups.items():
        made = {"samples_per_task": None, "merge_passes": 0.0}
        made["merge_seconds"] = sum(float(file.provenance["seconds"]) for file in own)
        chosen, memory = (own[0].provenance["compression"],), nbytes_together(own)
        variant = Variant(label, code, made=made, chosen=chosen, kind=REPLICA, memory=memory)
        for file in own:
            task = fingerprints.index(file.provenance["of"])
            found.append(Replica(variant, task, pad_head(file.network, width)))
    return found
