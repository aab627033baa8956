"""The compression step: a network's file in, its packed delta from a base's as a file out."""

import time
from dataclasses import dataclass
from pathlib import Path

from coin.coding.decoder_config import REPLICA
from coin.errors import ConfigurationError
from coin.files.atomic import hashes
from coin.files.tensors import fingerprint
from coin.networks import Compression, compress_as, int8_path, kept_base, load_network, save_compressed
from coin.pipeline.step import Step
from coin.pipeline.steps.train import ExpertStep, WriteInitial


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressExperts(Step):
    """Writes a compressed copy of every expert."""

    compression: Compression
    experts: dict[str, ExpertStep]
    initial: WriteInitial

    @property
    def doing(self) -> str:
        """What it does."""
        return "compressing"

    @property
    def outputs(self) -> dict[str, Path]:
        """The copies by task."""
        return {task: self.folder / f"{task}.{self.compression.name}.safetensors" for task in self.experts}

    def run(self) -> None:
        """Write the copies, and the 8-bit base of some beside them."""
        for task, output in self.outputs.items():
            compress_file(self.experts[task].output, output, self.initial.output, self.compression)


def compress_file(network: Path, output: Path, base: Path | None, compression: Compression) -> None:
    """Compress a network's file to another one; a compressed coded model keeps its metadata, with its own label."""
    read = [network, *([base, int8_path(output, base)] if base else [])]
    if output.resolve() in [path.resolve() for path in read]:
        raise ConfigurationError(f"found the output '{output}', which is read; expected another file, give --output")
    file = load_network(network)
    made = file.provenance
    if "code" in made:
        metadata = {**made, "label": f"{made['label']}-{compression.name}"}
    else:
        metadata = {"label": f"{REPLICA}-{compression.name}", "task": made.get("task")}
    inputs = hashes(each for each in (network, base) if each)
    metadata |= {"made_by": "coin compress", "of": fingerprint(file.network.state_dict()), "sha256": inputs}
    started = time.perf_counter()
    base, beside = kept_base(output, base, compression)
    packed = compress_as(compression, file.network, beside)
    metadata["seconds"] = made.get("seconds", 0.0) + time.perf_counter() - started
    save_compressed(output, packed, file.config, file.num_classes, base, compression, metadata)


def compress_network(
    network: str,
    base: str | None = None,
    output: str | None = None,
    bits: int | None = None,
    rank: int | None = None,
    base_bits: int = 32,
) -> Path:
    """Compress a network, an expert or a coded model, to its delta from the shared initialisation.

    Args:
        network: The network's safetensors file.
        base: The file of the shared initialisation. The compressed file refers to it by path: leave it there, or in the
            same folder.
        output: The compressed file; by default beside the network, with the compression in its name.
        bits: 1 … 8 bits a value; or
        rank: the rank of every delta.
        base_bits: How the base is stored: 32: unchanged; 8: with 8 bits a value, in a file beside the output, and the
            delta is taken from it; 0: not at all, the network itself is rounded.

    Returns:
        The compressed file.
    """
    compression, source = Compression(bits, rank, base_bits), Path(network)
    path = source.with_name(f"{source.stem}-{compression.name}.safetensors") if output is None else Path(output)
    compress_file(source, path, None if base is None else Path(base), compression)
    return path
