"""A coded system that an experiment has evaluated, read from its folder."""

from pathlib import Path

from coin.coding import DecoderKind
from coin.errors import ConfigurationError
from coin.modules.coded import Coded
from coin.modules.coded_file import SystemFile
from coin.networks import load_network
from coin.reporting.choice import recommended
from coin.reporting.standins import standins
from coin.reporting.summary import read_run


def system_of_run(
    folder: Path,
    method: str | None = None,
    decoder: str | None = None,
    survivors: bool | None = None,
) -> Coded:
    """Return a coded system that an experiment has evaluated, with its decoders and promises.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        method: The method's name in the results.
        decoder: The decoder's name in the results. Of all pairs that fit, the `recommended` one is taken.
        survivors: Whether the decoder reads survivors; None takes either.

    Raises what `Coded.load` does, and ConfigurationError where there are no such results.
    """
    path, kind = _chosen(folder, method, decoder, survivors)
    file = SystemFile.load(path)
    experts = []
    for task, place in zip(file.names, file.expert_files, strict=True):
        of_run = path.parent.parent / "experts" / task / "expert.safetensors"
        experts.append(load_network(of_run if of_run.is_file() else place))
    networks = [expert.network for expert in experts]
    system = Coded(file.code, networks, file.coded_models(networks), file.names)
    system.decoders = {each.erased: each for each in file.decoders if each.kind is kind}
    system.classes = file.classes
    system.method = path.stem
    system.files = (*(expert.path for expert in experts), *file.coded_files)
    system.class_names = []
    for expert in experts:
        names = expert.provenance.get("classes") or range(expert.num_classes)
        system.class_names.append([str(name) for name in names])
    return system


def _chosen(
    folder: Path, method: str | None, decoder: str | None, survivors: bool | None
) -> tuple[Path, DecoderKind]:
    """Return the file of the recommended system, and the decoder it is recommended with."""
    seeds, rows = read_run(folder)
    systems = {path.stem: path for path in (seeds[0] / "systems").glob("*.safetensors")}
    kept = standins(rows)
    kept = kept[kept["method"].isin(list(systems))]
    fitting = kept
    if method is not None:
        fitting = fitting[fitting["method"] == method]
    if decoder is not None:
        fitting = fitting[fitting["decoder"] == decoder]
    if survivors is not None:
        names = [each.name for each in DecoderKind if each.reads_survivors is survivors]
        fitting = fitting[fitting["decoder"].isin(names)]
    if fitting.empty:
        kinds = {None: "one", True: "a decoder that reads the survivors, such as ridge,"}
        kind = kinds.get(survivors, "a decoder that reads none, such as expert_head,")
        pairs = [f"{row.method} with {row.decoder}" for row in kept.itertuples()]
        raise ConfigurationError(
            f"found method '{method or '*'}' with decoder '{decoder or '*'}', expected {kind} that '{seeds[0]}' has a "
            f"system and a known NDA of: {', '.join(pairs) or 'none'}"
        )
    row = recommended(fitting)
    return systems[row["method"]], DecoderKind(row["decoder"])
