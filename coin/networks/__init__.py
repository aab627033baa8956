"""Architectures by name, their heads and features, BatchNorm policies, and networks as files."""

from coin.networks.batchnorm import BatchNormPolicy, has_batchnorm, recalibrate
from coin.networks.compressed import Compressed, compress, compress_as
from coin.networks.compression import Compression
from coin.networks.files import (
    NetworkFile,
    Unpacked,
    import_checkpoint,
    initial_network,
    int8_path,
    kept_base,
    load_network,
    nbytes_together,
    open_network,
    save_compressed,
    save_network,
)
from coin.networks.heads import (
    check_head,
    features_and_logits,
    head_name,
    linear_heads,
    pad_head,
    pad_logits,
    padded_rows,
    padded_state,
)
from coin.networks.lora import Lora, add_adapters, unwrap
from coin.networks.pretrained import check_heads, fill_head, import_pretrained
from coin.networks.registry import NetworkConfig, build_network
from coin.networks.stages import Run, run_network
from coin.networks.weights import check_layout, fill_network, read_weights

__all__ = [
    "BatchNormPolicy",
    "Compressed",
    "Compression",
    "Lora",
    "NetworkConfig",
    "NetworkFile",
    "Run",
    "Unpacked",
    "add_adapters",
    "build_network",
    "check_head",
    "check_heads",
    "check_layout",
    "compress",
    "compress_as",
    "features_and_logits",
    "fill_head",
    "fill_network",
    "has_batchnorm",
    "head_name",
    "import_checkpoint",
    "import_pretrained",
    "initial_network",
    "int8_path",
    "kept_base",
    "linear_heads",
    "load_network",
    "nbytes_together",
    "open_network",
    "pad_head",
    "pad_logits",
    "padded_rows",
    "padded_state",
    "read_weights",
    "recalibrate",
    "run_network",
    "save_compressed",
    "save_network",
    "unwrap",
]
