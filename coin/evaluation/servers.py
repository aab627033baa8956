"""Experts and coded models as servers: what they answer, how many classes they have, and the experts' heads."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from coin.coding import Answers, DecoderConfig, DecoderKind
from coin.coding.decoders import Head
from coin.core.batches import Batch, as_input, take
from coin.errors import CoinWarning, HeadError
from coin.networks import linear_heads, run_network
from coin.statistics.guard import eval_mode


def server_answers(
    experts: nn.ModuleList, coded: nn.ModuleList, inputs: Batch, features: bool, idle: Collection[int] = ()
) -> Answers:
    """Run every server once but those in `idle`, numbered experts first, then coded models; see `Coded.answers`."""
    servers = [None if index in idle else network for index, network in enumerate((*experts, *coded))]
    runs = [None if network is None else run_network(network, inputs, features) for network in servers]
    return Answers.of_servers(runs, len(experts))


def num_classes(expert: nn.Module, inputs: Any) -> int:
    """Return an expert's number of logits before padding."""
    with torch.no_grad(), eval_mode(expert):
        return int(expert(take(as_input(inputs, expert), slice(0, 1))).shape[1])


def with_heads(
    decoders: list[DecoderConfig], experts: Sequence[nn.Module], inputs: Batch | None, needed: bool
) -> tuple[list[DecoderConfig], list[Head] | None]:
    """Return the decoders, and the experts' heads on the CPU if one of them needs these.

    Where heads are not linear (`linear_heads`), expert_head is left out with a warning, unless it is needed.
    """
    if not any(config.kind is DecoderKind.expert_head for config in decoders):
        return decoders, None
    try:
        return decoders, [(weight.cpu(), bias.cpu()) for weight, bias in linear_heads(experts, inputs)]
    except HeadError as error:
        if needed:
            raise
        warnings.warn(f"expert_head is left out: {error}", CoinWarning, stacklevel=3)
        return [config for config in decoders if config.kind is not DecoderKind.expert_head], None
