"""Nuclear norms as differentiable functions of the matrices of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._linalg import LinAlgError, without_autocast
from ._matricise import channel_view, matricise
from ._polar import PolarMethod, nuclear_norms_and_polars, resolve
from ._weight import Weight, check_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Matrices of one shape are stacked up to so many entries: 16 MiB in single precision, twice that in double precision,
# in which they are decomposed. It is small matrices that gain by it.
_STACKED_ENTRIES = 2**22


class Matrices(NamedTuple):
    """A weight as a batch of matrices, and the way back.

    Attributes:
        batch: ``(groups, m, n)`` in single precision or better.
        weight: the weight.
        scheme: which matricisation.
        method: how its polar factor is computed, not ``"auto"``.
    """

    batch: Tensor
    weight: Weight
    scheme: str
    method: PolarMethod

    @classmethod
    def of(cls, weight: Weight, scheme: str, method: PolarMethod) -> Matrices:
        """Check a weight and reshape it."""
        tensor, groups, transposed = weight
        widened = check_weight(tensor, groups)
        method = resolve(method, tensor.dtype, tensor.device)
        return cls(to_matrices(widened, scheme, groups, transposed=transposed), weight, scheme, method)

    def back(self, batch: Tensor) -> Tensor:
        """Reshape matrices like these to the shape of the weight."""
        tensor, groups, transposed = self.weight
        return to_weight(batch, tensor.shape, self.scheme, groups, transposed=transposed)


def alike(many: Sequence[Matrices]) -> Iterator[list[int]]:
    """Say which of some batches of matrices can be stacked: those of one shape, dtype, device and method."""
    waiting: dict[object, list[int]] = {}
    for index, one in enumerate(many):
        key = (one.batch.shape[1:], one.batch.dtype, one.batch.device, one.method)
        together = waiting.setdefault(key, [])
        if together and sum(many[other].batch.numel() for other in together) + one.batch.numel() > _STACKED_ENTRIES:
            yield together
            together = waiting[key] = []
        together.append(index)
    yield from waiting.values()


def stacked(many: Sequence[Matrices]) -> Tensor:
    """Stack batches of matrices of one shape."""
    return many[0].batch if len(many) == 1 else torch.cat([one.batch for one in many])


def to_matrices(weight: Tensor, scheme: str, groups: int, *, transposed: bool) -> Tensor:
    """Return the matricisation of each group: ``(groups, m, n)``."""
    view = channel_view(weight, groups, transposed=transposed)
    layout = matricise((view.shape[0] * view.shape[1], *view.shape[2:]), scheme, groups)
    return layout.to_matrices(view)


def to_weight(matrices: Tensor, shape: Sequence[int], scheme: str, groups: int, *, transposed: bool) -> Tensor:
    """Undo :func:`to_matrices` for a weight of ``shape``."""
    first, second, *kernel = shape
    rows, columns = (groups * second, first // groups) if transposed else (first, second)
    weight = matricise((rows, columns, *kernel), scheme, groups).to_weight(matrices)
    # Seen as transposed, the inputs of each group come second.
    return channel_view(weight, groups, transposed=transposed).reshape(shape) if transposed else weight


def check_present(matrices: Tensor) -> None:
    """Refuse matrices without values."""
    if matrices.is_meta and not torch.compiler.is_compiling():
        raise ValueError(
            "the nuclear norm needs a weight with values, but this one is on the meta device: load the weights first "
            "(for instance model.to_empty(device=...), then load_state_dict)."
        )


def checked_norms_and_polars(matrices: Tensor, method: PolarMethod) -> tuple[Tensor, Tensor]:
    """Do as :func:`nuclear_norms_and_polars`, and say what NaN means.

    A compiled graph cannot branch on values, and looking at them would make a GPU wait; there NaN gives NaN.
    """
    blind = torch.compiler.is_compiling() or matrices.device.type != "cpu"
    try:
        if blind or bool(torch.isfinite(matrices).all()):  # LAPACK does not notice every NaN
            return nuclear_norms_and_polars(matrices, method)
        cause = None
    except LinAlgError as error:
        cause = error
    raise ValueError(
        "the nuclear norm needs a weight of finite values, but this one holds NaN or infinite entries or could not "
        "be decomposed: a learning rate that is too high is the usual cause."
    ) from cause


def nuclear_norms(matrices: Tensor, method: PolarMethod) -> Tensor:
    """The nuclear norm of each matrix of a batch ``(batch, m, n)``, differentiable once."""
    if matrices.numel() == 0:
        return matrices.sum((-2, -1))
    check_present(matrices)
    # The matrix products inside must keep their precision under autocast.
    with without_autocast(matrices.device):
        values: Tensor = _NuclearNorms.apply(matrices, method)[0]  # type: ignore[no-untyped-call]
    return values


def nuclear_ratios(matrices: Tensor, method: PolarMethod) -> Tensor:
    """The nuclear norm of each matrix over its Frobenius norm; zero where the matrix is."""
    if matrices.numel() == 0:
        return matrices.sum((-2, -1))
    # The ratio does not see the scale, but the squares of very large or small entries would leave the range.
    largest = matrices.detach().abs().amax((-2, -1), keepdim=True)
    matrices = matrices / torch.where(largest > 0, largest, torch.ones_like(largest))
    size = torch.linalg.matrix_norm(matrices)
    return nuclear_norms(matrices, method) / torch.where(size > 0, size, torch.ones_like(size))


class _NuclearNorms(torch.autograd.Function):
    """The values and their gradient, both from one decomposition in the forward pass."""

    @staticmethod
    def forward(matrices: Tensor, method: PolarMethod) -> tuple[Tensor, Tensor]:
        return checked_norms_and_polars(matrices, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PolarMethod], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, None]:
        matrices, polars = ctx.saved_tensors
        polars = _Once.apply(polars, matrices)  # type: ignore[no-untyped-call]
        return grad_values[:, None, None] * polars, None


class _Once(torch.autograd.Function):
    """The polar factor, as a function of the matrix that refuses to be differentiated: not to would give a zero."""

    @staticmethod
    def forward(polar: Tensor, matrices: Tensor) -> Tensor:  # noqa: ARG004
        return polar.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # noqa: ARG004
        raise RuntimeError(
            "the second derivative of the nuclear norm was asked for (create_graph, or a gradient of a gradient), and "
            "there is none: take the penalty out of the loss that is differentiated twice."
        )
