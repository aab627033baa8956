"""Self-attention whose projections are linear calls with the samples first, as rules and regressions need them."""

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
    **others: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Return what `torch.nn.functional.multi_head_attention_forward` returns for one and the same query, key and value.

    The projections are called with the samples first, [B, T, E]. None stands for every other form of the call. A row
    that is wholly masked gives zeros, as torch has it without `need_weights`; with them torch has NaN.
    """
    is_self = query is key and query is value
    is_plain = query.ndim == 3 and in_weight is not None
    extras = (bias_k, bias_v, others.get("static_k"), others.get("static_v"))
    has_extras = add_zeros or any(each is not None for each in extras)
    is_random = training and dropout > 0
    lacks_mask = is_causal and attn_mask is None
    if not is_self or not is_plain or has_extras or is_random or lacks_mask:
        return None
    x = query.transpose(0, 1)  # [B, T, E]
    samples, positions, _ = x.shape
    packed = F.linear(x, in_weight, in_bias).view(samples, positions, 3, heads, -1)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D]
    mask = None  # what is added to the scores [B, H, T, T]
    if attn_mask is not None:
        mask = _added(attn_mask, x)
        if mask.ndim == 3:
            mask = mask.view(samples, heads, positions, positions)
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, x)[:, None, None]
        mask = padding if mask is None else mask + padding
    mixed = F.scaled_dot_product_attention(q, k, v, mask)
    rows = mixed.transpose(1, 2).flatten(2)  # [B, T, E]
    output = F.linear(rows, out_weight, out_bias).transpose(0, 1)
    if not need_weights:
        return output, None
    # Mixing the rows of the identity gives the weights themselves.
    identity = torch.eye(positions).to(x).expand(samples, heads, -1, -1)
    weights = F.scaled_dot_product_attention(q, k, identity, mask)
    return output, weights.mean(1) if average_attn_weights else weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as what it adds to scores: of truth values −∞ where it is set."""
    if mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, -math.inf)
