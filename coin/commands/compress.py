"""``coin compress``: a network's file in, its packed delta from a base's, or itself packed, as a file out."""

from pathlib import Path

from coin.networks import Compression
from coin.pipeline.steps.merge import compress_file


def compress_network(
    network: Path,
    base: Path | None = None,
    output: Path | None = None,
    bits: int | None = None,
    base_bits: int = 32,
) -> Path:
    """Compress an expert to its delta from the shared initialisation; or, with 0 base bits, any network alone.

    Args:
        network: The network's safetensors file.
        base: The file of the shared initialisation. The compressed file refers to it by path: leave it there, or in the
            same folder.
        output: The compressed file; by default beside the network, with the compression in its name.
        bits: 1 … 8 bits a value.
        base_bits: How the base is stored: 32: unchanged; 8: with 8 bits a value, in a file beside the output, and the
            delta is taken from it; 0: not at all, the network itself is rounded.
    """
    compression = Compression.of({"bits": bits, "base_bits": base_bits})
    path = output or network.with_name(f"{network.stem}-{compression.name}.safetensors")
    compress_file(network, path, base, compression)
    return path
