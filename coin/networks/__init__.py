"""Architectures by name, their heads and features, BatchNorm policies, and networks as files."""

from coin.networks.adapted import Adapted as Adapted
from coin.networks.adapter import Adapter as Adapter
from coin.networks.batchnorm import BatchNormPolicy as BatchNormPolicy, recalibrate as recalibrate
from coin.networks.compressed import (
    Compressed as Compressed,
    Compression as Compression,
    compress as compress,
)
from coin.networks.files import load_network as load_network, save_network as save_network
from coin.networks.heads import head_name as head_name, pad_head as pad_head
from coin.networks.registry import NetworkConfig as NetworkConfig, build_network as build_network
from coin.networks.running import (
    check_head as check_head,
    features_and_logits as features_and_logits,
    linear_heads as linear_heads,
    run_network as run_network,
)
from coin.networks.weights import (
    fill_network as fill_network,
    read_weights as read_weights,
    without_frozen as without_frozen,
)
