"""Packed self-attention spelled out, so that its projections are ordinary linear calls with the samples first."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def packed_attention(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Compute `torch.nn.functional.multi_head_attention_forward` for self-attention, under masks or not.

    As in torch, what is_causal says replaces the mask only where there is neither padding nor a call for the weights.

    Args:
        arguments: The function's positional arguments: query, key, value [T, B, E], …
        options: Its keyword arguments.

    Returns:
        (output [T, B, E], attention weights or None), or None for every other form of attention (cross attention, extra
        keys, separate projections, dropout), which is left to the function itself.
    """
    bound = _SIGNATURE.bind(*arguments, **options)
    bound.apply_defaults()
    a = bound.arguments
    query, mask, padding, causal = (a[name] for name in ("query", "attn_mask", "key_padding_mask", "is_causal"))
    plain = query is a["key"] and query is a["value"] and query.ndim == 3 and a["in_proj_weight"] is not None
    extras = any(a[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]
    stochastic = a["training"] and a["dropout_p"] > 0
    if not plain or extras or a["use_separate_proj_weight"] or stochastic or (causal and mask is None):
        return None
    x = query.transpose(0, 1)
    b, t, _ = x.shape
    packed = F.linear(x, a["in_proj_weight"], a["in_proj_bias"]).view(b, t, 3, a["num_heads"], -1)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D]
    if causal and padding is None and not a["need_weights"]:
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
    bias = None if mask is None else _added(mask if mask.ndim == 2 else mask.view(b, -1, t, t), x)  # to the scores
    if padding is not None:  # [B, T]
        padded = _added(padding[:, None, None, :], x)
        bias = padded if bias is None else bias + padded
    weights = None
    if a["need_weights"]:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        weights = (scores if bias is None else scores + bias).softmax(-1)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, bias)
    output = F.linear(mixed.transpose(1, 2).flatten(2), a["out_proj_weight"], a["out_proj_bias"]).transpose(0, 1)
    return output, weights.mean(1) if weights is not None and a["average_attn_weights"] else weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return what a mask adds to the scores: itself, or minus infinity where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
