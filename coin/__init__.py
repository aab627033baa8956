"""Erasure-coded neural networks: one coded model, built in closed form, stands in for a lost expert.

The names below are the library without a Trainer and without files: estimate a Fisher, merge, encode, decode, score.
They are imported when they are first used, so that the command line can set up the process before PyTorch starts.
The examples in their docstrings start from three networks, a batch of inputs for each, and a code:

>>> import coin, torch
>>> experts = [torch.nn.Linear(4, 3) for _ in range(3)]
>>> inputs, code = [[torch.randn(60, 4)] for _ in experts], coin.uniform(3)

Source: Jhunjhunwala, Jali, Joshi and Wang, *Erasure Coded Neural Network Inference via Fisher Averaging*, ISIT 2024,
arXiv 2409.01420.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coin.core.lazy import exported

if TYPE_CHECKING:
    from coin.coding import (
        Answers as Answers,
        Code as Code,
        DecoderConfig as DecoderConfig,
        DecoderKind as DecoderKind,
        Promise as Promise,
        convex as convex,
        decoding_risk as decoding_risk,
        fault_score as fault_score,
        make_decoder as make_decoder,
        parity_residual as parity_residual,
        parity_significance as parity_significance,
        promised_risk as promised_risk,
        uniform as uniform,
    )
    from coin.coding.metrics import DecodingAccuracy as DecodingAccuracy, Residual as Residual
    from coin.distillation import (
        Distillation as Distillation,
        ReadoutDistillation as ReadoutDistillation,
        distill as distill,
    )
    from coin.merging import (
        Average as Average,
        Base as Base,
        CodedModel as CodedModel,
        Coin as Coin,
        Experts as Experts,
        HeadFit as HeadFit,
        Merged as Merged,
        MergeMethod as MergeMethod,
        Method as Method,
        Refit as Refit,
        RegMean as RegMean,
        TaskArithmetic as TaskArithmetic,
        Ties as Ties,
        UserMethod as UserMethod,
        Wudi as Wudi,
        merge_networks as merge_networks,
    )
    from coin.modules import Coded as Coded, evaluate as evaluate
    from coin.networks import (
        BatchNormPolicy as BatchNormPolicy,
        Compressed as Compressed,
        compress as compress,
        recalibrate as recalibrate,
    )
    from coin.reporting.choice import choose as choose
    from coin.statistics import (
        FisherKind as FisherKind,
        Precision as Precision,
        fisher_diagonal as fisher_diagonal,
        gram_sums as gram_sums,
        load_statistic as load_statistic,
        save_statistic as save_statistic,
    )

_HOMES = exported(__file__)
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "oddness":
        from coin.errors import CoinWarning

        told = "coin.oddness is now coin.fault_score; the next version knows only the new name"
        warnings.warn(told, CoinWarning, stacklevel=2)
        name = "fault_score"
    if name not in _HOMES:
        raise AttributeError(f"module 'coin' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
