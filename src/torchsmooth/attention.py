"""LowRankMultiheadAttention: multi-head attention whose four projections are modules, so that each can be low-rank.

``nn.MultiheadAttention`` keeps the weights of its projections as raw parameters and never calls its output projection.
Here they are children that are called, ``nn.Linear`` or whatever takes its place: a low-rank layer saves operations as
well as parameters, and hooks, FLOP counters and quantisers see what they know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from ._attend import attend, check_attention_inputs, renested, unnested
from ._checks import check_count, with_article
from ._linear_parts import (
    DENSE_LINEAR,
    check_exact_type,
    copy_of,
    dense_parts,
    linear_over,
    multiplied_out,
    rows_of,
    why_not_expandable,
)
from ._source_layer import why_not_plain
from ._together import run_together

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LowRankMultiheadAttention"]

# They decide by shapes, which a symbolic trace does not know.
for _name in ("attend", "check_attention_inputs", "renested", "unnested"):
    torch.fx.wrap(_name)

_IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class LowRankMultiheadAttention(nn.Module):
    r"""Multi-head attention that calls its projections: what ``nn.MultiheadAttention`` computes, of any linear layers.

    :math:`\mathrm{softmax}(Q_h K_h^T / \sqrt{d} + M)\, V_h` for every head h, put side by side and projected.

    Made new, its children are dense; :meth:`from_attention` takes those of a trained layer, and compression puts
    ``LowRankLinear`` layers in their places.

    Args:
        embed_dim: features of the queries and of the output; a multiple of ``num_heads``.
        num_heads: number of heads.
        dropout: probability in [0, 1] with which an attention weight is dropped in training.
        bias: whether the projections have a bias.
        add_bias_kv: whether one learned key and value are added to every sample.
        add_zero_attn: whether a key and value of zeros are added to every sample.
        kdim: features of the keys; ``embed_dim`` if None.
        vdim: features of the values; ``embed_dim`` if None.
        batch_first: whether batches are ``(N, L, E)``, not ``(L, N, E)``.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Shape:
        As of ``nn.MultiheadAttention``. The children: ``q_proj.weight`` and ``out_proj.weight`` stand for ``(embed_dim,
        embed_dim)``, ``k_proj.weight`` for ``(embed_dim, kdim)``, ``v_proj.weight`` for ``(embed_dim, vdim)``.
        Parameters ``bias_k`` and ``bias_v``: ``(1, 1, embed_dim)`` or None.

    Raises:
        TypeError: if ``embed_dim`` or ``num_heads`` is not an integer.
        ValueError: if one of them is not positive, or the first not a multiple of the second.

    Example:
        >>> import torch, torchsmooth
        >>> attention = torch.nn.MultiheadAttention(16, num_heads=4, batch_first=True)
        >>> layer = torchsmooth.LowRankMultiheadAttention.from_attention(attention)
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(layer(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
        >>> layer.q_proj = torchsmooth.LowRankLinear.from_linear(layer.q_proj, rank=4)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 5, 16])

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    # nn.TransformerEncoderLayer asks for it before it goes past the layer to its weights, for a kernel that wants them
    # packed.
    _qkv_same_embed_dim = False

    def __init__(  # noqa: PLR0917 - as in nn.MultiheadAttention
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,  # noqa: FBT001, FBT002
        add_bias_kv: bool = False,  # noqa: FBT001, FBT002
        add_zero_attn: bool = False,  # noqa: FBT001, FBT002
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,  # noqa: FBT001, FBT002
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(num_heads, "num_heads", None, "the number of heads")
        check_count(embed_dim, "embed_dim", None, "the features of the output")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}.")
        dense = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._take_(dense, [copy_of(one) for one in _in_weights(dense)], [copy_of(one) for one in _in_biases(dense)])

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> LowRankMultiheadAttention:
        """Take an attention layer apart; the new one shares its memory, and the layer itself is not changed.

        Args:
            attention: exactly an ``nn.MultiheadAttention``.

        Returns:
            A layer with dense children over the memory of the same weights, of the same mode and ``requires_grad``.
            ``out_proj``, ``bias_k`` and ``bias_v`` hold the very parameters.

        Raises:
            TypeError: if it is of another type, or a subclass.
            ValueError: if it holds more than its own plain weights (pruned, with other parameters, or patched).
        """
        check_exact_type(attention, nn.MultiheadAttention)
        reason = why_attention_stays(attention)
        if reason:
            raise ValueError(f"this MultiheadAttention cannot be taken apart: {reason}.")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_(attention, _in_weights(attention), _in_biases(attention))
        return layer.train(attention.training)

    def _take_(self, dense: nn.MultiheadAttention, weights: list[nn.Parameter], biases: list[nn.Parameter]) -> None:
        """Take over the settings of a layer, its output projection, and weights of the projections of the inputs."""
        self.embed_dim, self.kdim, self.vdim = dense.embed_dim, dense.kdim, dense.vdim
        self.num_heads, self.head_dim = dense.num_heads, dense.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = dense.dropout, dense.batch_first, dense.add_zero_attn
        for name, weight, bias in zip(_IN_PROJECTIONS, weights, [*biases, *[None] * (3 - len(biases))], strict=True):
            self.add_module(name, linear_over(weight, bias))
        self.out_proj = linear_over(dense.out_proj.weight, dense.out_proj.bias)  # type: ignore[arg-type]
        self.register_parameter("bias_k", dense.bias_k)  # type: ignore[arg-type]
        self.register_parameter("bias_v", dense.bias_v)  # type: ignore[arg-type]

    def to_attention(self) -> nn.MultiheadAttention:
        """Put the projections together to an ``nn.MultiheadAttention``; this layer is not changed.

        Returns:
            A layer of its own memory with the same values, settings, mode, dtype and device. Where only some of the
            projections of the inputs are trainable, all are.

        Raises:
            ValueError: naming the child that is not an ordinary linear layer (restore the dense layers first).
        """
        embed_dim = self.embed_dim
        inner = {"q_proj": embed_dim, "k_proj": self.kdim, "v_proj": self.vdim, "out_proj": embed_dim}
        parts = dense_parts(self, {name: (embed_dim, features) for name, features in inner.items()})
        biases = [parts[name][1] for name in _IN_PROJECTIONS]
        given = [one for one in biases if one is not None]
        if given and len(given) < len(biases):
            missing = _IN_PROJECTIONS[[one is None for one in biases].index(True)]
            raise ValueError(f"child {missing!r} has no bias, but others have: give it one of zeros.")
        weights = [parts[name][0] for name in _IN_PROJECTIONS]
        dense: Any = nn.MultiheadAttention(
            embed_dim, self.num_heads, self.dropout, bias=bool(given), add_zero_attn=self.add_zero_attn,
            kdim=self.kdim, vdim=self.vdim, batch_first=self.batch_first, device="meta",
        )  # fmt: skip
        if dense._qkv_same_embed_dim:
            dense.in_proj_weight = copy_of(*weights)
        else:
            for name, weight in zip(_IN_PROJECTIONS, weights, strict=True):
                setattr(dense, f"{name}_weight", copy_of(weight))
        dense.in_proj_bias = copy_of(*given) if given else None
        weight, bias = parts["out_proj"]
        dense.out_proj.weight = copy_of(weight)
        dense.out_proj.bias = None if bias is None else copy_of(bias)
        for name in ("bias_k", "bias_v"):
            own = self._parameters[name]
            if own is not None:
                delattr(dense, name)  # a plain None, which a parameter does not replace
                dense.register_parameter(name, copy_of(own))
        attention: nn.MultiheadAttention = dense.train(self.training)
        return attention

    def forward(  # noqa: PLR0917 - as in nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does: the arguments have the same meanings.

        Args:
            query: ``(L, embed_dim)``, ``(L, N, embed_dim)``, or ``(N, L, embed_dim)`` with ``batch_first``.
            key: likewise, of length S and ``kdim`` features.
            value: likewise, of length S and ``vdim`` features.
            key_padding_mask: ``(S,)`` or ``(N, S)``: True where a key is not attended to, or floating and added.
            need_weights: whether the weights are returned; without them the faster kernels can be taken.
            attn_mask: ``(L, S)`` or ``(N · num_heads, L, S)``, of the same two kinds.
            average_attn_weights: whether returned weights are averaged over the heads.
            is_causal: whether ``attn_mask``, which must be given, is causal, so that it need not be read.

        Returns:
            The output, of the shape of the query, and the weights: ``(N, L, S)``, ``(N, num_heads, L, S)``, both
            without N where there is no batch, or None.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        given = query
        query, key, value, key_padding_mask = unnested(query, key, value, key_padding_mask, attn_mask)
        check_attention_inputs(
            (query, key, value), key_padding_mask, attn_mask, (self.embed_dim, self.kdim, self.vdim),
            num_heads=self.num_heads, batch_first=self.batch_first, is_causal=is_causal,
        )  # fmt: skip
        alike = query is key and key is value
        projected: Any = run_together((self.q_proj, self.k_proj, self.v_proj), query) if alike else None
        heads, weights = attend(
            (self.q_proj(query), self.k_proj(key), self.v_proj(value)) if projected is None else projected,
            (self.bias_k, self.bias_v),
            key_padding_mask,
            attn_mask,
            num_heads=self.num_heads,
            batch_first=self.batch_first,
            add_zero_attn=self.add_zero_attn,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return renested(self.out_proj(heads), weights, given)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of the projections of the inputs, stacked; None where their sizes differ. Read-only, never kept.

        ``nn.TransformerEncoder`` looks at it to learn whether it is special, and then pads nothing away: for weights
        that are (quantised), and cannot be stacked, one of them is returned.
        """
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            return None
        for parameter in self.parameters():
            if torch.overrides.has_torch_function((parameter,)):
                return parameter
        children = ((name, getattr(self, name)) for name in _IN_PROJECTIONS)
        return torch.cat([multiplied_out(child, type(self).__name__, name) for name, child in children])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of the projections of the inputs, stacked; None if there is none. Read-only, never kept."""
        biases = [getattr(self, name).bias for name in _IN_PROJECTIONS]
        return None if any(one is None for one in biases) else torch.cat(biases)

    def extra_repr(self) -> str:
        """Show the settings that the children do not."""
        shown = [f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"]
        shown += [f"dropout={self.dropout}"] if self.dropout else []
        shown += [f"{name}=True" for name in ("batch_first", "add_zero_attn") if getattr(self, name)]
        return ", ".join(shown)


def why_attention_stays(attention: nn.MultiheadAttention) -> str:
    """Say why an ``nn.MultiheadAttention`` cannot be taken apart; empty if it can."""
    out_proj = attention._modules.get("out_proj")
    if type(out_proj) not in DENSE_LINEAR:
        return f"its out_proj is {with_article(type(out_proj).__name__)}"
    embed_dim = attention.embed_dim
    reason = why_not_plain(out_proj, (embed_dim, embed_dim))  # type: ignore[arg-type]
    if reason:
        return f"out_proj: {reason}"
    learned = (1, 1, embed_dim)
    shapes: Mapping[str, tuple[int, ...]] = {"in_proj_weight": (3 * embed_dim, embed_dim)}
    if not attention._qkv_same_embed_dim:
        sizes = (embed_dim, attention.kdim, attention.vdim)
        shapes = {f"{name}_weight": (embed_dim, size) for name, size in zip(_IN_PROJECTIONS, sizes, strict=True)}
    if attention._parameters.get("in_proj_bias", True) is not None:
        shapes = {**shapes, "in_proj_bias": (3 * embed_dim,)}
    if attention.bias_k is not None or attention.bias_v is not None:
        shapes = {**shapes, "bias_k": learned, "bias_v": learned}
    return why_not_expandable(attention, shapes, ("out_proj",))


def _in_weights(attention: nn.MultiheadAttention) -> list[nn.Parameter]:
    """Return parameters over the memory of the weights that project query, key and value."""
    if not attention._qkv_same_embed_dim:
        names = [f"{name}_weight" for name in _IN_PROJECTIONS]
        return [rows_of(one, 0, len(one)) for one in (attention._parameters[name] for name in names) if one is not None]
    return _thirds(attention._parameters["in_proj_weight"])


def _in_biases(attention: nn.MultiheadAttention) -> list[nn.Parameter]:
    return _thirds(attention._parameters["in_proj_bias"])


def _thirds(parameter: nn.Parameter | None) -> list[nn.Parameter]:
    if parameter is None:
        return []
    size = len(parameter) // 3
    return [rows_of(parameter, start, start + size) for start in range(0, 3 * size, size)]
