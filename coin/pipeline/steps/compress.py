"""The compression step: a network's file in, its packed delta from a base's as a file out."""

import time
from dataclasses import dataclass
from pathlib import Path

from coin.coding.decoder_config import REPLICA
from coin.errors import ConfigurationError
from coin.files.atomic import hashes
from coin.files.tensors import fingerprint
from coin.networks import Compression, compress_as, int8_path, kept_base, load_network, save_compressed
from coin.pipeline.step import Step, unkeyed
from coin.pipeline.steps.train import ExpertStep, WriteInitial


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressExperts(Step):
    """Writes a compressed copy of every expert."""

    compression: Compression
    experts: dict[str, ExpertStep]
    initial: WriteInitial
    doing: str = unkeyed(default="compressing")

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
