"""LowRankEmbedding: a table of vectors that is a product of two, kept as a smaller table and a linear layer.

The child ``down`` is a plain ``nn.Embedding`` of ``rank`` numbers for each row, ``up`` a plain ``nn.Linear`` that makes
vectors of them. In the pivoted form ``down`` keeps ``rank`` of the columns of the table themselves, ``up`` makes the
others from them, and ``merge`` puts them in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import check_count, check_values, describe
from ._lowrank_layer import TwoFactorLayer, inherit, merged, uninitialised
from ._matricise import matricise
from ._pivoted_modules import ChannelMerge
from ._source_layer import check_rank, check_source

if TYPE_CHECKING:
    from ._matricise import Form
    from ._spectrum import Decomposition

__all__ = ["LowRankEmbedding"]


class LowRankEmbedding(TwoFactorLayer):
    r"""A table of vectors of rank r: ``up(down(i))``, :math:`W = W_{down} W_{up}^T`.

    In the pivoted form ``down`` looks r of the entries of each vector up, ``up`` makes the others from them, and
    ``merge`` puts them in order.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of each vector.
        rank: 1 … min(num_embeddings, embedding_dim), in the pivoted form one less.
        padding_idx: the row that is not trained, counted from the end if negative; None for none. The table's row is a
            product, so it stays as it is only where it is zero, as it is when the layer is made.
        scale_grad_by_freq: whether gradients of ``down`` are divided by how often each row occurs in the batch.
        sparse: whether the gradient of ``down`` is a sparse tensor; that of ``up`` never is.
        device: device of the parameters.
        dtype: floating dtype of the parameters.
        form: ``"factored"``, of rank · (num_embeddings + embedding_dim) parameters, or ``"pivoted"``, of rank² fewer.

    Shape:
        Input ``(*)`` integers, output ``(*, embedding_dim)``; ``down.weight`` ``(num_embeddings, rank)``, ``up.weight``
        ``(embedding_dim, rank)``. In the pivoted form, ``up.weight`` ``(embedding_dim - rank, rank)`` and the int32
        buffer ``merge.order`` ``(embedding_dim,)``.

    Raises:
        TypeError: if the rank or ``padding_idx`` is not an integer.
        ValueError: if one of them is out of range.

    Example:
        >>> import torch, torchsmooth
        >>> layer = torchsmooth.LowRankEmbedding.from_embedding(torch.nn.Embedding(100, 16), rank=4)
        >>> layer(torch.tensor([[3, 7, 7]])).shape, layer.weight.shape
        (torch.Size([1, 3, 16]), torch.Size([100, 16]))

    Source: Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", 2020, trains
    such a product; the truncation: Eckart and Young, 1936; pivoted: Zhao et al., "Pivoting Factorization", 2025.
    """

    transposed: ClassVar[bool] = True
    down: nn.Embedding
    up: nn.Linear

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        form: Form = "factored",
    ) -> None:
        super().__init__()
        check_count(num_embeddings, "num_embeddings", None, "rows of the table")
        check_count(embedding_dim, "embedding_dim", None, "the size of each vector")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.matricisation = matricise((num_embeddings, embedding_dim), "channel", transposed=True)
        self.rank = rank = check_rank(rank, self.matricisation, form, "the full rank")
        self.form = form
        self.padding_idx = _checked_row(padding_idx, num_embeddings)
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Embedding(
            num_embeddings, rank, self.padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse, **options
        )
        others = embedding_dim - (rank if form == "pivoted" else 0)
        self.up = nn.Linear(rank, others, bias=False, **options)
        if form == "pivoted":
            self.merge = ChannelMerge(1, rank, embedding_dim, dim=-1, bias=False, **options)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Look rows of ``down`` up, and make vectors of them.

        Args:
            input: indices of any shape, int64 or int32, from 0 to ``num_embeddings - 1``.

        Returns:
            The shape of ``input`` and an axis of ``embedding_dim`` more, in the dtype of the factors.
        """
        pivots: Tensor = self.down(input)
        vectors: Tensor = self.up(pivots).to(pivots.dtype)  # under autocast an embedding keeps its own
        if "merge" in self._modules:
            vectors = self.merge(pivots, vectors)
        return vectors

    @torch.no_grad()
    def truncate_(self, weight: Tensor, spectrum: Decomposition | None = None) -> None:
        """Set the factors to the truncated SVD of a table; a padding row that is zero stays exactly so."""
        super().truncate_(weight, spectrum)
        if self.padding_idx is not None and not bool(weight[self.padding_idx].any()):
            self.down.weight[self.padding_idx] = 0

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, rank: int, form: Form = "factored") -> LowRankEmbedding:
        """Factor a table by truncated SVD; the embedding itself is not changed.

        Args:
            embedding: weight ``(num_embeddings, embedding_dim)`` in float64, float32, bfloat16 or float16.
            rank: 1 … min(num_embeddings, embedding_dim), at which the table is reproduced to rounding; less than that
                in the pivoted form.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer on the same device, with the same dtype, mode, ``requires_grad`` and padding row.

        Raises:
            TypeError: if it is not an Embedding, or of another dtype.
            ValueError: if the rank is out of range, the form unknown, ``max_norm`` set, or the weight not a plain,
                finite parameter.
        """
        layer = cls.like(embedding, rank, form)
        check_values(embedding.weight, embedding)
        layer.truncate_(embedding.weight)
        return layer

    @classmethod
    def like(cls, embedding: nn.Embedding, rank: int, form: Form = "factored") -> LowRankEmbedding:
        """Make a layer to take the place of ``embedding``, with factors that are still to be filled in.

        Args:
            embedding: the layer to replace.
            rank: 1 … min(num_embeddings, embedding_dim), in the pivoted form one less.
            form: ``"factored"`` or ``"pivoted"``.

        Returns:
            A layer with uninitialised factors; device, dtype, mode, ``requires_grad`` and padding row as in
            ``embedding``.

        Raises:
            TypeError: if it is not an Embedding, or of another dtype.
            ValueError: if the rank is out of range, the form unknown, or ``max_norm`` set.
        """
        weight = check_source(embedding, nn.Embedding, cls.shape_of)
        layer = uninitialised(
            cls, embedding.num_embeddings, embedding.embedding_dim, rank, embedding.padding_idx,
            scale_grad_by_freq=embedding.scale_grad_by_freq, sparse=embedding.sparse,
            device=weight.device, dtype=weight.dtype, form=form,
        )  # fmt: skip
        return inherit(layer, embedding, weight)

    @staticmethod
    def shape_of(embedding: nn.Embedding) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes.

        Args:
            embedding: the dense layer.

        Returns:
            ``(num_embeddings, embedding_dim)``.
        """
        return embedding.num_embeddings, embedding.embedding_dim

    def to_embedding(self) -> nn.Embedding:
        """Merge the factors into an ``nn.Embedding``; this layer is not changed.

        Returns:
            A layer that computes the same to rounding, with mode, dtype, device, ``requires_grad`` and padding row
            kept.
        """
        return merged(
            self, nn.Embedding, self.num_embeddings, self.embedding_dim, self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse,
        )  # fmt: skip

    def to_dense(self) -> nn.Embedding:
        """Do what :meth:`to_embedding` does, under the name that all low-rank layers share."""
        return self.to_embedding()

    def extra_repr(self) -> str:
        """Show the sizes, as ``nn.Embedding`` does."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        text += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        text += ", scale_grad_by_freq=True" if self.scale_grad_by_freq else ""
        text += ", sparse=True" if self.sparse else ""
        return text + self._form_repr()


def _checked_row(row: object, rows: int) -> int | None:
    """Return the place of a row, counted from the start; torch checks it by an assertion."""
    if row is None:
        return None
    if isinstance(row, bool) or not isinstance(row, int):
        raise TypeError(f"padding_idx must be an integer or None, got {describe(row)}.")
    if not -rows <= row < rows:
        raise ValueError(f"padding_idx must lie between {-rows} and {rows - 1} (the rows of the table), got {row}.")
    return row % rows
