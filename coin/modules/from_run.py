"""Which of the coded systems that an experiment has evaluated is read from its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from coin.coding import DecoderKind
from coin.errors import ConfigurationError
from coin.files.safetensors import load_provenance
from coin.reporting.choice import recommended
from coin.reporting.results import read_results, requested_policy
from coin.reporting.standins import standins
from coin.reporting.summary import read_run


@dataclass(frozen=True)
class Evaluated:
    """A coded system's file, and one of the decoders that it was measured with."""

    path: Path  # named after the method's variant, as in tables
    method: str  # the merge method's label
    decoder: str
    rows: pd.DataFrame  # of ``results.csv``, with this method and decoder


def chosen_system(
    folder: Path,
    method: str | None,
    decoder: str | None,
    survivors: bool | None,
) -> Evaluated:
    """Return the recommended one of an experiment's systems with this method and decoder; see `Coded.from_run`."""
    seeds, every_row = read_run(folder)
    systems = evaluated_systems(seeds[0])
    fitting = []
    for each in systems:
        has_method = method in (None, each.method, each.path.stem)
        has_decoder = decoder in (None, each.decoder)
        reads_survivors = DecoderKind(each.decoder).reads_survivors
        if has_method and has_decoder and survivors in (None, reads_survivors):
            fitting.append(each)
    if not fitting:
        pairs = [f"{each.path.stem} with {each.decoder}" for each in systems]
        known = ", ".join(pairs) or "none"
        kinds = {None: "one", True: "a decoder that reads the survivors, such as ridge,"}
        kind = kinds.get(survivors, "a decoder that reads none, such as expert_head,")
        raise ConfigurationError(
            f"found method '{method or '*'}' with decoder '{decoder or '*'}', expected {kind} "
            f"that '{seeds[0]}' has results and systems of: {known}"
        )
    return fitting[0] if len(fitting) == 1 else _recommended(fitting, every_row)


def evaluated_systems(seed: Path) -> list[Evaluated]:
    """Return every system in a seed's folder with every decoder that it was measured with."""
    frame = read_results(seed)
    policies = frame["batchnorm"].map(requested_policy)
    systems = []
    for path in sorted((seed / "systems").glob("*.safetensors")):
        made = load_provenance(path)
        has_method = frame["method"] == made["method"]
        has_policy = policies == made["batchnorm"]
        own = frame[has_method & has_policy]
        for decoder, rows in own.groupby("decoder", sort=False):
            systems.append(Evaluated(path, made["method"], str(decoder), rows))
    return systems


def _recommended(systems: Sequence[Evaluated], every_row: pd.DataFrame) -> Evaluated:
    """Return the system that is `recommended` of these."""
    kept = standins(every_row)
    by_name = {(each.method, each.decoder): each for each in systems}
    pairs = zip(kept["method"], kept["decoder"], strict=True)
    is_one = [pair in by_name for pair in pairs]
    if not any(is_one):
        raise ConfigurationError(
            "found no NDA in the results, expected experts that are right at times; look at their accuracy first"
        )
    row = recommended(kept[is_one])
    return by_name[row["method"], row["decoder"]]
