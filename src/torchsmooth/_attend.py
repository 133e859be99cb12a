"""What attention does between its projections: heads, masks, and scaled dot products, as functions of tensors.

They decide by shapes, so a symbolic trace takes each of them as one step (``torch.fx.wrap`` where they are called).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_attention_inputs(
    tensors: tuple[Tensor, Tensor, Tensor],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    features: tuple[int, int, int],
    *,
    num_heads: int,
    batch_first: bool,
    is_causal: bool,
) -> None:
    """Refuse inputs whose shapes do not fit together.

    Args:
        tensors: query, key and value: each ``(length, features)``, or with a batch axis.
        key_padding_mask: ``(S,)`` or ``(N, S)``, bool or floating.
        attn_mask: ``(L, S)`` or ``(N · num_heads, L, S)``, bool or floating.
        features: what the last axes must be.
        num_heads: number of heads.
        batch_first: whether the batch axis is the first.
        is_causal: whether the mask is said to be causal.

    Raises:
        ValueError: naming the tensor, what was expected and what came.
    """
    query, key, value = tensors
    if query.dim() not in {2, 3}:
        raise ValueError(f"query must have 2 axes, or 3 with a batch, got {query.dim()}.")
    for name, tensor, size in zip(("query", "key", "value"), tensors, features, strict=True):
        if tensor.dim() != query.dim():
            raise ValueError(f"{name} must have {query.dim()} axes, as query has, got {tensor.dim()}.")
        if tensor.shape[-1] != size:
            raise ValueError(f"{name} must have {size} features (its last axis), got shape {tuple(tensor.shape)}.")
    batched, along = query.dim() == 3, int(query.dim() == 3 and batch_first)  # noqa: PLR2004 - with a batch axis
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must be equally long, got shapes {tuple(key.shape)} and {tuple(value.shape)}.")
    if batched and key.shape[1 - along] != query.shape[1 - along]:
        raise ValueError(
            f"query and key must hold equally many samples (axis {1 - along}, as batch_first={batch_first}), "
            f"got shapes {tuple(query.shape)} and {tuple(key.shape)}."
        )
    targets, sources = query.shape[along], key.shape[along]
    samples = query.shape[1 - along] if batched else 1
    _check_mask("key_padding_mask", key_padding_mask, [(samples, sources) if batched else (sources,)])
    _check_mask("attn_mask", attn_mask, [(targets, sources), (samples * num_heads, targets, sources)])
    if is_causal and attn_mask is None:
        raise ValueError(
            "is_causal only says that attn_mask is causal, and there is none: give it, for instance by "
            "torch.nn.Transformer.generate_square_subsequent_mask(length)."
        )


def _check_mask(name: str, mask: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} must be bool (True: not attended to) or floating (added), got {mask.dtype}.")
    if all(tuple(mask.shape) != shape for shape in shapes):
        raise ValueError(f"{name} must be of shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}.")


def attend(
    projected: tuple[Tensor, Tensor, Tensor],
    extra: tuple[Tensor | None, Tensor | None],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    num_heads: int,
    batch_first: bool,
    add_zero_attn: bool,
    dropout: float,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Let every query attend to the keys, head by head.

    Args:
        projected: query, key and value after their projections, ``(length, E)`` or with a batch axis.
        extra: one more key and value of every sample, each ``(1, 1, E)``, or None.
        key_padding_mask: as :func:`check_attention_inputs` has it.
        attn_mask: likewise.
        num_heads: number of heads.
        batch_first: whether the batch axis is the first.
        add_zero_attn: whether there is one more key and value of zeros.
        dropout: probability with which a weight is dropped, in [0, 1].
        need_weights: whether the weights are returned.
        average_attn_weights: whether they are averaged over the heads.
        is_causal: whether ``attn_mask`` is said to be causal, so that it need not be read.

    Returns:
        What is to be projected to the output, of the shape of the query, and the weights or None.
    """
    batched = projected[0].dim() == 3  # noqa: PLR2004 - with a batch axis
    query, key, value = (_split(one if batched else one.unsqueeze(0), num_heads) for one in projected)
    if batched and not batch_first:  # from (length, heads, samples, head_dim)
        query, key, value = (one.permute(2, 1, 0, 3) for one in (query, key, value))
    samples = query.shape[0]
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = None if hinted else _added(attn_mask, query)
    padding = _added(key_padding_mask, query)
    if mask is not None:
        each = mask.dim() == 3  # noqa: PLR2004 - one for each head
        mask = mask.reshape(samples, num_heads, *mask.shape[1:]) if each else mask
    if padding is not None:
        padding = padding.reshape(samples, 1, 1, padding.shape[-1])

    more_keys, more_values = (
        [] if one is None else [_split(one, num_heads).expand(samples, -1, -1, -1)] for one in extra
    )
    if more_keys or more_values:
        key, value = torch.cat([key, *more_keys], 2), torch.cat([value, *more_values], 2)
    if add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    added = len(more_keys) + int(add_zero_attn)
    mask, padding = (None if one is None else F.pad(one, (0, added)) for one in (mask, padding))
    given = [one for one in (mask, padding) if one is not None]
    mask = sum(given[1:], given[0]) if given else None

    weights = None
    if need_weights:
        scores = (query * math.sqrt(1 / query.shape[-1])) @ key.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        heads = weights @ value
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        heads = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=hinted)
    order = (0, 2, 1, 3) if batch_first or not batched else (2, 0, 1, 3)
    output = heads.permute(order).flatten(2)
    return output if batched else output.squeeze(0), weights


def _split(tensor: Tensor, num_heads: int) -> Tensor:
    """Bring ``(a, b, E)`` to ``(a, heads, b, head_dim)``."""
    *axes, features = tensor.shape
    return tensor.reshape(*axes, num_heads, features // num_heads).transpose(1, 2)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Bring a mask to one that is added: minus infinity where it was True."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def unnested(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pad nested tensors, which ``nn.TransformerEncoder`` makes of padded ones; leave others as they are.

    Returns:
        Query, key and value, and the padding mask.

    Raises:
        ValueError: if some are nested, but it is not one tensor in all three places, or there is a mask.
    """
    if not (query.is_nested or key.is_nested or value.is_nested):
        return query, key, value, key_padding_mask
    same = query is key and key is value
    if not same or key_padding_mask is not None or attn_mask is not None or query.layout is not torch.strided:
        raise ValueError(
            "nested tensors are taken in self-attention alone (query, key and value the same tensor of strided layout) "
            "and without masks: pad them, and give a key_padding_mask."
        )
    padded = torch.nested.to_padded_tensor(query, 0.0)
    lengths = torch.tensor([len(one) for one in query.unbind()], device=padded.device)
    padding = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
    return padded, padded, padded, padding


def renested(output: Tensor, weights: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor | None]:
    """Nest what came out if ``query`` was nested: its output, and zeros for weights of queries that are not there."""
    if not query.is_nested:
        return output, weights
    lengths = [len(one) for one in query.unbind()]
    nested = torch.nested.as_nested_tensor([one[:length] for one, length in zip(output, lengths, strict=True)])
    if weights is not None:
        rows = torch.arange(weights.shape[-2], device=weights.device)
        there = rows < torch.tensor(lengths, device=weights.device).unsqueeze(1)
        weights = weights * there.reshape(len(lengths), *[1] * (weights.dim() - 3), -1, 1)
    return nested, weights
