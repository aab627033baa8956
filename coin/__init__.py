"""Erasure-coded neural networks: one small body and an adapter for each expert keep answering when servers are lost.

Begin with these (`help(coin.Coded)` and so on); `coin.data` has the tasks, `coin.errors` what is raised:

    stand_in          the recommended system in one call: a packed body with adapters for experts in memory
    uniform, convex   codes: which weighted sums of the experts the coded models stand for
    merge_networks    makes coded models by a method: Average, Coin, RegMean, Refit, Distillation, or your own
    Coded             experts, code and coded models: fit_decoder, decode, accept, save, load, from_run
    evaluate          measures how well lost experts are decoded
    compress          the simple rival: what an expert adds to its start, in a few bits a weight
    choose            the cheapest stand-in of an experiment that meets your wishes

`stand_in` is the method `Refit`, or `Base`, which needs no merge, with the options ``adapters={"rank": 16}``
and ``compress={"bits": 4}``, read by the decoder ``expert_head``.

Names are imported when they are first used, so that the command line can set up the process before PyTorch starts.
The examples in their docstrings start from three networks, a batch of inputs for each, and a code:

>>> import coin, torch
>>> experts = [torch.nn.Linear(4, 3) for _ in range(3)]
>>> inputs, code = [[torch.randn(60, 4)] for _ in experts], coin.uniform(3)

Source: Jhunjhunwala, Jali, Joshi and Wang, *Erasure Coded Neural Network Inference via Fisher Averaging*, ISIT 2024,
arXiv 2409.01420.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coin.coding import *  # noqa: F403
    from coin.coding.metrics import *  # noqa: F403
    from coin.distillation import *  # noqa: F403
    from coin.merging import *  # noqa: F403
    from coin.modules import *  # noqa: F403
    from coin.networks import *  # noqa: F403
    from coin.reporting.choice import *  # noqa: F403
    from coin.statistics import *  # noqa: F403

_HOMES = {  # the rooms and their names
    "coding": "Answers Code DecoderKind Promise answer_score convex make_decoder "
    "promised_threshold uniform",
    "coding.metrics": "DecodingAccuracy Residual",
    "distillation": "Distillation",
    "merging": "Average Base CodedModel Coin Experts HeadFit MergeMethod Merged Method "
    "Refit RegMean UserMethod extract_lora fit_adapters merge_networks",
    "modules": "Coded evaluate stand_in",
    "networks": "Adapted Adapter BatchNormPolicy Compressed compress recalibrate",
    "reporting.choice": "choose",
    "statistics": "FisherKind fisher_diagonal gram_sums load_statistic save_statistic",
}
__all__ = sorted(name for names in _HOMES.values() for name in names.split())


def __dir__() -> list[str]:
    return [*__all__, "data", "errors"]


def __getattr__(name: str) -> Any:
    if name in ("data", "errors"):
        return import_module(f"coin.{name}")
    for room, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"coin.{room}"), name)
    raise AttributeError(f"module 'coin' has no attribute '{name}'")
