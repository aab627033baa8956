"""Packed self-attention spelled out, so that its projections are ordinary linear calls with the samples first."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Compute `torch.nn.functional.multi_head_attention_forward` for plain self-attention, with padding or without.

    Args:
        arguments: The function's positional arguments: query, key, value [T, B, E], the embedding size, the number of
            heads, the packed projection's weight and bias, …
        options: Its keyword arguments.

    Returns:
        (output [T, B, E], attention weights or None), or None for every other form of attention (other masks, cross
        attention, extra keys, separate projections), which is left to the function itself.
    """
    (
        query,
        key,
        value,
        _,
        heads,
        in_weight,
        in_bias,
        bias_k,
        bias_v,
        add_zero,
        dropout,
        out_weight,
        out_bias,
        *rest,
    ) = arguments
    plain = query is key and key is value and query.ndim == 3 and in_weight is not None
    extras = (bias_k, bias_v, options.get("attn_mask"))
    separate = options.get("use_separate_proj_weight") or options.get("is_causal") or add_zero
    stochastic = options.get("training", True) and dropout > 0
    if rest or not plain or separate or stochastic or any(extra is not None for extra in extras):
        return None
    x = query.transpose(0, 1)
    packed = F.linear(x, in_weight, in_bias).view(*x.shape[:2], 3, heads, -1)  # [B, T, 3, H, D]
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # [B, H, T, T]
    padding = options.get("key_padding_mask")  # [B, T]: true, or minus infinity, where there is nothing to attend to
    if padding is not None:
        padding = padding[:, None, None, :]
        scores = scores.masked_fill(padding, -math.inf) if padding.dtype == torch.bool else scores + padding
    weights = scores.softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    output = F.linear(mixed, out_weight, out_bias).transpose(0, 1)
    if not options.get("need_weights", True):
        return output, None
    return output, weights.mean(1) if options.get("average_attn_weights", True) else weights
