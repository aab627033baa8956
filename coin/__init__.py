"""Erasure-coded neural networks: one coded model, built in closed form, stands in for a lost expert.

The names below are the library without a Trainer and without files: estimate a Fisher, merge, encode, decode, score.
They are imported when they are first used, so that the command line can set up the process before PyTorch starts.

Source: Jhunjhunwala, Jali, Joshi and Wang, *Erasure Coded Neural Network Inference via Fisher Averaging*, ISIT 2024,
arXiv 2409.01420.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coin.coding import Answers, Code, DecoderConfig, DecoderKind, make_decoder
    from coin.merging import (
        Average,
        Coin,
        Experts,
        FullFisher,
        GaussNewton,
        HeadFit,
        Refit,
        RegMean,
        TaskArithmetic,
        Ties,
        merge_networks,
    )
    from coin.metrics import DecodingAccuracy, Residual
    from coin.modules import Coded, Distillation, ReadoutDistillation, distill, evaluate
    from coin.networks import BatchNormPolicy, recalibrate
    from coin.statistics import FisherKind, fisher_diagonal, gram_sums, load_statistic, save_statistic

_HOMES = {
    "Answers": "coin.coding",
    "Average": "coin.merging",
    "BatchNormPolicy": "coin.networks",
    "Code": "coin.coding",
    "Coded": "coin.modules",
    "Coin": "coin.merging",
    "DecoderConfig": "coin.coding",
    "DecoderKind": "coin.coding",
    "DecodingAccuracy": "coin.metrics",
    "Distillation": "coin.modules",
    "Experts": "coin.merging",
    "FisherKind": "coin.statistics",
    "FullFisher": "coin.merging",
    "GaussNewton": "coin.merging",
    "HeadFit": "coin.merging",
    "ReadoutDistillation": "coin.modules",
    "Refit": "coin.merging",
    "RegMean": "coin.merging",
    "Residual": "coin.metrics",
    "TaskArithmetic": "coin.merging",
    "Ties": "coin.merging",
    "distill": "coin.modules",
    "evaluate": "coin.modules",
    "fisher_diagonal": "coin.statistics",
    "gram_sums": "coin.statistics",
    "load_statistic": "coin.statistics",
    "make_decoder": "coin.coding",
    "merge_networks": "coin.merging",
    "recalibrate": "coin.networks",
    "save_statistic": "coin.statistics",
}

__all__ = [
    "Answers",
    "Average",
    "BatchNormPolicy",
    "Code",
    "Coded",
    "Coin",
    "DecoderConfig",
    "DecoderKind",
    "DecodingAccuracy",
    "Distillation",
    "Experts",
    "FisherKind",
    "FullFisher",
    "GaussNewton",
    "HeadFit",
    "ReadoutDistillation",
    "Refit",
    "RegMean",
    "Residual",
    "TaskArithmetic",
    "Ties",
    "distill",
    "evaluate",
    "fisher_diagonal",
    "gram_sums",
    "load_statistic",
    "make_decoder",
    "merge_networks",
    "recalibrate",
    "save_statistic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coin' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
