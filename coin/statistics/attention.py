"""Self-attention spelled out: its projections are then ordinary linear calls."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Any,
    in_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zeros: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    static_k: Any = None,
    static_v: Any = None,
    **separate: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Return what `torch.nn.functional.multi_head_attention_forward` returns for one and the same query, key and value.

    The projections are called with the samples first, [B, T, E]. None stands for every other form of the call.
    """
    is_self = query is key and query is value
    is_plain = query.ndim == 3 and in_weight is not None
    extras = (bias_k, bias_v, static_k, static_v)
    has_extras = add_zeros or any(each is not None for each in extras)
    is_random = training and dropout > 0
    lacks_mask = is_causal and attn_mask is None
    if not is_self or not is_plain or has_extras or is_random or lacks_mask:
        return None
    x = query.transpose(0, 1)  # [B, T, E]
    samples, positions, _ = x.shape
    packed = F.linear(x, in_weight, in_bias)
    by_head = packed.view(samples, positions, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = by_head.unbind(0)  # [B, H, T, D]
    scaled = q / math.sqrt(q.shape[-1])
    scores = scaled @ k.mT  # [B, H, T, T]
    is_masked = attn_mask is not None or key_padding_mask is not None
    if attn_mask is not None:
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.view(samples, heads, positions, positions)
        scores = _masked(scores, attn_mask)
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask[:, None, None, :])
    # Torch's fused attention gives a row that is wholly masked zeros, else NaN.
    if is_masked and not need_weights:
        masked = scores.isneginf().all(-1, keepdim=True)
        finite = scores.masked_fill(masked, 0)  # NaN would stay in gradients
        weights = finite.softmax(-1).masked_fill(masked, 0)
    else:
        weights = scores.softmax(-1)
    rows = (weights @ v).transpose(1, 2).flatten(2)  # [B, T, E]
    output = F.linear(rows, out_weight, out_bias).transpose(0, 1)
    if not need_weights:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores under a mask: of truth values where it is set, of numbers by adding them."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask, -math.inf)
    return scores + mask
