"""Architectures by name, their heads and features, BatchNorm policies, and networks as files."""

from coin.networks.adapters import Adapter as Adapter
from coin.networks.batchnorm import (
    BatchNormPolicy as BatchNormPolicy,
    has_batchnorm as has_batchnorm,
    recalibrate as recalibrate,
)
from coin.networks.compressed import Compressed as Compressed, compress as compress
from coin.networks.compression import Compression as Compression
from coin.networks.files import (
    check_heads as check_heads,
    fill_head as fill_head,
    import_checkpoint as import_checkpoint,
    import_pretrained as import_pretrained,
    initial_network as initial_network,
    int8_path as int8_path,
    kept_base as kept_base,
    load_network as load_network,
    nbytes_together as nbytes_together,
    save_compressed as save_compressed,
    save_network as save_network,
)
from coin.networks.heads import (
    Run as Run,
    check_head as check_head,
    features_and_logits as features_and_logits,
    head_name as head_name,
    linear_heads as linear_heads,
    pad_head as pad_head,
    run_network as run_network,
)
from coin.networks.registry import NetworkConfig as NetworkConfig, build_network as build_network
from coin.networks.weights import (
    fill_network as fill_network,
    read_weights as read_weights,
    without_frozen as without_frozen,
)
