"""Attention in plain operations: matrix products and a softmax, which can be quantized like any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.graph.masks import is_mask

__all__ = ["attend", "attends_to_itself", "attention_to_products"]

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)
# what a masked score becomes: finite, so that a row without any key is no NaN
MASKED = torch.finfo(torch.float32).min


def attends_to_itself(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `attend` computes what this call does: attention of batches to themselves.

    Between different tensors there is a weight for each, in one Parameter, which no layer can hold.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    return (
        given.get("query") is given.get("key") is given.get("value") is not None
        and type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of nn.MultiheadAttention where `attends_to_itself`, operation by operation."""
    x = query if module.batch_first else query.transpose(0, 1)
    heads, width = module.num_heads, module.head_dim
    projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = (t.reshape(*t.shape[:2], heads, width).transpose(1, 2) for t in projected.chunk(3, -1))
    scores = torch.matmul(q, k.transpose(-2, -1)) * width**-0.5
    if attn_mask is not None:
        if attn_mask.dim() == 3:  # a mask for each head of each sample
            attn_mask = attn_mask.reshape(-1, heads, *attn_mask.shape[-2:])
        scores = _masked(scores, attn_mask)
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask[:, None, None, :])
    weights = torch.softmax(scores, -1)
    y = module.out_proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))
    y = y if module.batch_first else y.transpose(0, 1)
    if not need_weights:
        return y, None
    return y, weights.mean(1) if average_attn_weights else weights


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, MASKED) if mask.dtype == torch.bool else scores + mask


def attention_to_products(gm: fx.GraphModule) -> None:
    """Write scaled_dot_product_attention out, in place; where it drops weights or shares heads it stays."""
    for node in list(gm.graph.nodes):
        if node.target is not F.scaled_dot_product_attention:
            continue
        given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        if (
            given.get("dropout_p", 0.0) != 0.0
            or given.get("enable_gqa")
            or isinstance(given.get("scale"), fx.Node)
        ):
            continue
        with gm.graph.inserting_before(node):
            result = _products(given, node)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def _products(given: dict[str, Any], node: fx.Node) -> fx.Node:
    query, key, mask, scale = (given.get(name) for name in ("query", "key", "attn_mask", "scale"))
    width = query.meta["value"].shape[-1]

    def call(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        return _call(node, function, *args, **kwargs)

    scores = call(torch.matmul, query, call("transpose", key, -2, -1))
    scores = call(torch.mul, scores, width**-0.5 if scale is None else scale)
    if given.get("is_causal"):
        sizes = (call("size", query, -2), call("size", key, -2))
        mask = call("tril", call("new_ones", query, sizes, dtype=torch.bool))
    if mask is not None:
        if mask.meta["value"].dtype == torch.bool:
            scores = call("masked_fill", scores, call(torch.logical_not, mask), MASKED)
        else:
            scores = call(torch.add, scores, mask)
    return call(torch.matmul, call(torch.softmax, scores, -1), given["value"])


def _call(like: fx.Node, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node of the scope of `like`, which knows its value."""
    values: Any = fx.node.map_arg(args, lambda n: n.meta["value"])
    if isinstance(function, str):
        made = like.graph.call_method(function, args, kwargs)
        value = getattr(values[0], function)(*values[1:], **kwargs)
    else:
        made = like.graph.call_function(function, args, kwargs)
        value = function(*values, **kwargs)
    made.meta.update(scope=like.meta["scope"], value=value)
    made.meta["mask"] = is_mask(made, value)
    return made
