"""The coded systems under evaluation: coded models read from their files, and the references beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from coin.coding import Answers, Code, DecoderKind
from coin.errors import FileError
from coin.networks import load_network

NONE = "none"
ORACLE = "oracle"


@dataclass(frozen=True)
class Variant:
    """One coded system under evaluation: a merge method with its options, or one of the two references.

    Attributes:
        method: What the results call it.
        batchnorm: Its BatchNorm policy; empty where it does not apply.
        code: The code; none for `NONE`.
        networks: Indices of its coded models among all coded models of the evaluation; empty for the references.
        samples_per_task: P, the calibration samples of each task that made it; none without any.
        seconds: What making it took, wall time.
        passes: What making it took, in forward-equivalents.
    """

    method: str
    batchnorm: str
    code: Code | None
    networks: tuple[int, ...]
    samples_per_task: int | None
    seconds: float
    passes: float

    @property
    def is_none(self) -> bool:
        """Whether this is the reference that decodes from the surviving experts alone."""
        return self.code is None

    @property
    def is_oracle(self) -> bool:
        """Whether this is the reference whose coded outputs are Σβ_if_i itself."""
        return self.code is not None and not self.networks

    def applies(self, kind: DecoderKind) -> bool:
        """Whether the decoder can be tried: features need a network, and the linear decoder needs coded outputs."""
        if self.is_none:
            return kind is not DecoderKind.linear
        return not self.is_oracle or kind is DecoderKind.linear

    def seen(self, answers: Answers) -> Answers:
        """Return what arrives in this system of the answers of all networks: the experts, and its own coded models."""
        if self.is_oracle:
            assert self.code is not None
            return Answers(experts=answers.experts, coded=self.code.encode(answers.experts))
        return answers.with_coded(self.networks)

    def erasures(self, code: Code) -> list[tuple[int, ...]]:
        """Return the erasures to measure: all that the code promises, but never the loss of every expert for `NONE`."""
        erasures = code.erasures()
        if self.is_none:
            return [erased for erased in erasures if len(erased) < code.num_experts]
        return erasures


_PROVENANCE: dict[str, type | tuple[type, ...]] = {
    "experts": list,
    "label": str,
    "batchnorm": str,
    "code": list,
    "row": int,
    "samples_per_task": (int, type(None)),
    **dict.fromkeys(("seconds", "passes", "shared_seconds", "shared_passes"), (int, float)),
}


def _check_provenance(path: Path, made: dict[str, Any]) -> None:
    for name, kind in _PROVENANCE.items():
        if name not in made or not isinstance(made[name], kind):
            raise FileError(
                f"'{path}' says {made.get(name)!r:.60} for its '{name}', expected what coin merge writes there; "
                "run coin merge again"
            )


def read_coded(paths: Sequence[Path], marks: Sequence[str]) -> tuple[list[nn.Module], list[Variant]]:
    """Read coded models, and group the rows of each code into a variant.

    Args:
        paths: The coded models' safetensors files.
        marks: The fingerprints of the experts that they must have been made of.

    Raises:
        FileError: A file is missing or damaged, was made of other experts, or lacks the other rows of its code.
    """
    networks: list[nn.Module] = []
    groups: dict[tuple[str, str], list[tuple[int, dict[str, Any], int]]] = {}
    for path in paths:
        file = load_network(path)
        made = file.provenance
        if "code" not in made:
            raise FileError(f"'{path}' is no coded model, expected a file that coin merge wrote")
        _check_provenance(path, made)
        if made["experts"] != list(marks):
            raise FileError(
                f"'{path}' was made of other experts than those given, or in another order; run coin merge again"
            )
        networks.append(file.network)
        key = (str(made["label"]), str(made["batchnorm"]))
        groups.setdefault(key, []).append((int(made["row"]), made, len(networks) - 1))
    variants = []
    for (method, policy), members in groups.items():
        members.sort(key=lambda member: member[0])
        code = Code(members[0][1]["code"])
        if [row for row, _, _ in members] != list(range(code.num_coded)) or any(
            made["code"] != members[0][1]["code"] for _, made, _ in members
        ):
            raise FileError(
                f"found rows {[row for row, _, _ in members]} of method {method}, expected one file for each of "
                f"the {code.num_coded} rows of one code; run coin merge again"
            )
        variants.append(
            Variant(
                method=method,
                batchnorm=policy,
                code=code,
                networks=tuple(network for _, _, network in members),
                samples_per_task=members[0][1]["samples_per_task"],
                seconds=sum(float(made["seconds"]) for _, made, _ in members) + float(members[0][1]["shared_seconds"]),
                passes=sum(float(made["passes"]) for _, made, _ in members) + float(members[0][1]["shared_passes"]),
            )
        )
    return networks, variants
