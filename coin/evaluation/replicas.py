"""Replicas: the compressed copies of experts, which answer by themselves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coin.coding import Code
from coin.coding.decoder_config import REPLICA
from coin.errors import FileError
from coin.evaluation.scores import Outcome, Scores
from coin.evaluation.variants import Variant
from coin.networks import load_network, nbytes_together, pad_head


@dataclass(frozen=True)
class Replica:
    """The compressed copy of one expert, with its results on that task's test set."""

    variant: Variant
    task: int
    network: nn.Module
    scores: Scores

    def outcome(self, task: str) -> Outcome:
        """Return the results; a replica runs alone, and all experts may be lost at once."""
        return Outcome(
            variant=self.variant,
            decoder=REPLICA,
            erased=(task,),
            task=task,
            residual=math.nan,
            decoder_seconds=0.0,
            decoder_passes=0.0,
            memory_mib=self.variant.memory / 2**20,
            forwards=1,
            losses=self.variant.code.num_experts,
            **self.scores.results(),
        )


def read_replicas(
    paths: Sequence[Path], fingerprints: Sequence[str], counts: Sequence[int], code: Code
) -> list[Replica]:
    """Read files of ``coin run`` or ``coin compress``, with the total cost and memory of each label.

    `fingerprints` are the experts', `counts` their class counts, `code` that of the evaluation. Raises FileError where
    a file is missing or damaged, or not a copy of one of these experts.
    """
    files = [load_network(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        if file.provenance.get("of") not in fingerprints:
            raise FileError(f"'{path}' is not a compressed copy of these experts; compress them again")
    found = []
    for label in dict.fromkeys(str(file.provenance.get("label", REPLICA)) for file in files):
        own = [file for file in files if file.provenance.get("label", REPLICA) == label]
        variant = Variant(
            label,
            code,
            seconds=sum(float(file.provenance["seconds"]) for file in own),
            chosen=(own[0].provenance["compression"],),
            kind=REPLICA,
            memory=nbytes_together(own),
        )
        for file in own:
            task = fingerprints.index(file.provenance["of"])
            network = pad_head(file.network, max(counts))
            found.append(Replica(variant, task, network, Scores(counts[task])))
    return found
