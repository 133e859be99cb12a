"""What the low-rank layers share: children that hold factors, what their product stands for, the way in and out."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ._checks import is_quantised, with_article
from ._execution import active, derived_of, use_
from ._given_factors import checked_copies
from ._leading import truncated_factors
from ._linalg import balanced, clamped, without_autocast, working_copy
from ._pivoted_modules import Ordered
from ._pivoting import pivoted_rows, with_identity
from ._quantised import dequantised
from ._whitening import first_factor, second_factor

if TYPE_CHECKING:
    from ._matricise import Form, Matricisation
    from ._spectrum import Decomposition

_Layer = TypeVar("_Layer", bound="LowRankLayer")
_Module = TypeVar("_Module", bound=nn.Module)


class LowRankLayer(nn.Module):
    """What all low-rank layers share: children with the factors, and the weight that their product stands for.

    Attributes:
        factor_children: the children whose weights are the factors, from the output to the input.
        transposed: whether the weight of the dense layer has its inputs first, ``(in, out / groups, …)``. All weights
            that a layer takes and gives are laid out as the dense layer's is; that of factors does not depend on it.
        rank: the rank, or a pair of them.
        form: how the factors are stored.
    """

    factor_children: ClassVar[tuple[str, ...]] = ("up", "down")
    transposed: ClassVar[bool] = False
    rank: Any
    form: Form

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer: the factors multiplied out, in their dtype. Read-only, never kept."""
        weight: Tensor = multiply_out(self).to(self._factor("up").dtype)
        return weight

    @weight.setter
    def weight(self, _: object) -> None:
        raise self._unsettable()

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which ``up`` owns; where there is one, ``merge``."""
        bias: nn.Parameter | None = self.bias_owner.bias  # type: ignore[assignment]
        return bias

    @property
    def execution(self) -> str:
        """How the layer is run in eval mode where no gradients are wanted: its ``form``, or what ``tune_`` has chosen.

        Factors that were changed since, and children with hooks, are run as they are stored in any case.
        """
        derived = derived_of(self)
        return self.form if derived is None or not derived.is_fresh() else derived.execution

    @property
    def bias_owner(self) -> nn.Module:
        """The child that holds the bias."""
        owner = self._modules.get("merge") or self._modules["up"]
        if owner is None:
            raise AttributeError("up")
        return owner

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """Return the factors of every group, whole in either form: ``(groups, …)``, in float32 or better."""

    @abstractmethod
    def product_of(self, factors: tuple[Tensor, ...]) -> Tensor:
        """Multiply factors out to a weight, laid out as that of the dense layer."""

    @abstractmethod
    def truncate_(self, weight: Tensor, spectrum: Decomposition | None = None) -> None:
        """Set the factors to the best, or nearly best, of a weight; ``spectrum`` is its decomposition, where known."""

    @abstractmethod
    def fit_(self, target: Tensor, inner: Tensor) -> None:
        """Set the factors to those that fit a weight in the sense of a moment.

        Args:
            target: ``(groups, out, n)`` in float64, as patches see it.
            inner: the moment of the patches, ``(groups, n, n)``.
        """

    @abstractmethod
    def orders(self) -> dict[str, Ordered]:
        """Return the children that know pivots, by name."""

    @staticmethod
    @abstractmethod
    def shape_of(layer: Any, /) -> tuple[int, ...]:
        """Return the shape that the weight of a dense layer has by its attributes, which a low-rank one has, too."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Merge the factors into the layer of torch that they stand for; this layer is not changed."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a weight; of a parameter torch says no more than that there is an attribute of this name."""
        if name == "weight":
            raise self._unsettable()
        super().register_parameter(name, param)

    def _unsettable(self) -> AttributeError:
        *others, last = (f"{child}.weight" for child in self.factor_children)
        return AttributeError(
            f"weight of {with_article(type(self).__name__)} cannot be set, as it is computed from the factors: "
            f"set_factors_ stores others, {', '.join(others)} and {last} are the parameters, and restore_dense_ makes "
            "an ordinary layer of it."
        )

    def _form_repr(self) -> str:
        form = "" if self.form == "factored" else f", form={self.form}"
        return form if self.execution == self.form else f"{form}, execution={self.execution}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - as torch has it
        derived = derived_of(self)
        fresh = derived is not None and derived.is_fresh()
        done = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if derived is None:
            return done
        if derived.suits is None:
            derived.module._apply(fn)  # type: ignore[no-untyped-call]
            derived.renew_(fresh=fresh)
        elif not derived.is_fresh():  # what is packed for one device and dtype is of no use in another
            use_(self, None)
        return done

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        derived = derived_of(self)
        if derived is not None and any(key.startswith(prefix) for key in state_dict):
            derived.outdate_()  # the children see that themselves, but a compiled graph does not ask them
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        use_(replica, None)  # what was derived lies on one device
        return replica

    def _factor(self, child: str) -> Tensor:
        weight: Tensor = getattr(self, child).weight
        return dequantised(weight)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks for this method, before it changes anything."""
        raise TypeError(
            f"torch.jit.script cannot compile a {type(self).__name__}: use torch.jit.trace, torch.export or "
            "torch.compile, or call torchsmooth.restore_dense_ first."
        )

    def _store_(self, child: str, values: Tensor) -> None:
        own = self._factor(child)
        own.copy_(clamped(values, own.dtype))


class TwoFactorLayer(LowRankLayer):
    """A layer in two: the matricisation of its weight is a product of two matrices."""

    down: nn.Module
    up: nn.Module
    merge: nn.Module
    split: nn.Module
    rank: int
    matricisation: Matricisation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """Apply ``down``, then ``up``; in the pivoted form, the pivots go past one of them.

        Args:
            input: of the shape and dtype that the dense layer takes.

        Returns:
            What the dense layer with the weight ``self.weight`` returns, to rounding.
        """
        output: Tensor
        derived = active(self, input)
        if derived is not None:
            output = derived(input)
        elif "merge" in self._modules:
            pivots = self.down(input)
            output = self.merge(pivots, self.up(pivots))
        elif "split" in self._modules:
            pivots, others = self.split(input)
            output = self.up(pivots + self.down(others))
        else:
            output = self.up(self.down(input))
        return output

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two matrices of every group whose product the layer stands for, whole in either form.

        Returns:
            ``(groups, rows, rank)`` and ``(groups, rank, columns)`` in float32 or better, differentiable. In the
            pivoted form one of them holds the rows or columns of the identity.

        Example:
            >>> import torch, torchsmooth
            >>> layer = torchsmooth.LowRankLinear.from_linear(torch.nn.Linear(20, 10), rank=4, form="pivoted")
            >>> up, down = layer.factors()
            >>> torch.allclose(up[0] @ down[0], layer.weight), up.shape, layer.up.weight.shape
            (True, torch.Size([1, 10, 4]), torch.Size([6, 4]))
        """
        up, down = self._factor("up"), self._factor("down")
        wide = torch.promote_types(up.dtype, torch.float32)
        up, down = self.matricisation.to_factors(up.to(wide), down.to(wide), self.form)
        if self.form == "factored":
            return up, down
        places, groups = self._ordered.order_places(), self.matricisation.groups
        if self.matricisation.pivots_columns:
            return up, with_identity(down.mT, places, groups, self.rank).mT
        return with_identity(up, places, groups, self.rank), down

    @torch.no_grad()
    def set_factors_(self, up: Tensor, down: Tensor) -> None:
        """Store a product in the layer's own form: computed in float64, cast once, into the parameters that are there.

        Args:
            up: ``(groups, rows, rank)``, any floating dtype, finite.
            down: ``(groups, rank, columns)``, any floating dtype, finite.

        Raises:
            TypeError: if one is not a tensor of a floating dtype.
            ValueError: if a shape is not that, a value NaN or infinite, or a factor no plain parameter any more.

        Example:
            >>> import torch, torchsmooth
            >>> layer = torchsmooth.LowRankLinear(20, 10, rank=1, form="pivoted")
            >>> layer.set_factors_(torch.ones(1, 10, 1), torch.ones(1, 1, 20))
            >>> torch.equal(layer.weight, torch.ones(10, 20))
            True
        """
        check_writable(self, "filled")
        layout = self.matricisation
        shapes = {"up": (layout.groups, layout.rows, self.rank), "down": (layout.groups, self.rank, layout.columns)}
        up, down = checked_copies({"up": up, "down": down}, shapes)
        if self.form == "factored":
            up, down = balanced(up, down)
        else:
            columns = layout.pivots_columns
            pivots, others, free, kept = pivoted_rows(down.mT, up.mT) if columns else pivoted_rows(up, down)
            up, down = (kept.mT, free.mT) if columns else (free, kept)
            self._ordered.set_pivots_(pivots, others)
        for child, values in zip(("up", "down"), layout.to_layer_weights(up, down, self.form), strict=True):
            self._store_(child, values)

    def product_of(self, factors: tuple[Tensor, ...]) -> Tensor:
        """Multiply factors out to a weight."""
        up, down = factors
        return self.matricisation.to_weight(up @ down)

    def truncate_(self, weight: Tensor, spectrum: Decomposition | None = None) -> None:
        """Set the factors to the truncated SVD of a weight."""
        matrices = self.matricisation.to_matrices(weight)
        known = truncated_factors if spectrum is None else spectrum.factors
        self.set_factors_(*known(matrices, self.rank))

    def fit_(self, target: Tensor, inner: Tensor) -> None:
        """Set the factors to those that fit a weight in the sense of a moment."""
        down = first_factor(target, inner, self.matricisation, self.rank)
        self.set_factors_(second_factor(target, inner, down, self.matricisation)[0], down)

    def orders(self) -> dict[str, Ordered]:
        """Return the child that knows the pivots, by name."""
        return {} if self.form == "factored" else {self.matricisation.order_child: self._ordered}

    @property
    def _ordered(self) -> Ordered:
        ordered: Ordered = getattr(self, self.matricisation.order_child)
        return ordered


def multiply_out(layer: LowRankLayer) -> Tensor:
    """Return the weight that a low-rank layer stands for, in float32 or better."""
    with without_autocast(layer._factor("up").device):
        return layer.product_of(layer.factors())


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """Tell whether a weight is laid out channels_last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    # A weight with a 1×1 kernel or one input channel is both: the ordinary strides are the safe reading.
    if last is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def inherit(layer: _Layer, dense: nn.Module, weight: nn.Parameter) -> _Layer:
    """Take over mode, ``requires_grad`` and a copy of the bias from the dense layer."""
    layer.train(dense.training)
    layer.to(memory_format=memory_format_of(weight))  # type: ignore[call-overload]
    for child in layer.factor_children:
        layer._factor(child).requires_grad_(weight.requires_grad)
    bias = dense._parameters.get("bias")
    if bias is not None:
        copied = bias.detach().clone().to(weight.device)
        layer.bias_owner.register_parameter("bias", nn.Parameter(copied, requires_grad=bias.requires_grad))
    return layer


def uninitialised(cls: type[_Module], *args: Any, **kwargs: Any) -> _Module:
    """Build a module without drawing random numbers for parameters that are replaced at once."""
    layer: _Module = skip_init(cls, *args, **kwargs)  # type: ignore[no-untyped-call]
    for child in layer.children():
        if isinstance(child, Ordered):  # unlike a factor that is still to come, an order must never be garbage
            child.reset_order_()
    return layer


def check_writable(layer: LowRankLayer, what: str) -> None:
    """Refuse a layer whose factors are no plain parameters in one place; ``what`` says what was to be done with it."""
    for child in (getattr(layer, name) for name in layer.factor_children):
        weight = child._parameters.get("weight")
        if not isinstance(weight, Tensor) or is_quantised(weight):
            now = "without a plain weight" if weight is None else f"with a weight of type {type(weight).__name__}"
            raise ValueError(
                f"a {type(layer).__name__} cannot be {what}: its factor is now a {type(child).__module__}."
                f"{type(child).__name__} {now} (quantised, pruned or parametrized after it was compressed). Do it "
                "before quantising; prune.remove or remove_parametrizations makes the others plain again."
            )
    devices = sorted({str(one.device) for one in layer.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"a {type(layer).__name__} cannot be {what}: its parameters are on {' and '.join(devices)}. Bring them "
            "together with .to(device)."
        )


def merged(layer: LowRankLayer, cls: type[_Module], *args: Any, **kwargs: Any) -> _Module:
    """Build the dense layer of type ``cls`` that a low-rank layer stands for."""
    check_writable(layer, "merged")
    own = layer._factor("up")
    if cls is not nn.Embedding:  # which never has one
        kwargs["bias"] = False
    dense: Any = uninitialised(cls, *args, **kwargs, device=own.device, dtype=own.dtype)
    bias = layer.bias
    with torch.no_grad():
        exact = tuple(working_copy(factor) for factor in layer.factors())
        weight = clamped(layer.product_of(exact), own.dtype).to(own)
        formats = {memory_format_of(layer._factor(child)) for child in layer.factor_children}
        last = formats - {torch.contiguous_format}
        weight = weight.contiguous(memory_format=last.pop() if last else torch.contiguous_format)
        dense.weight = nn.Parameter(weight, requires_grad=own.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    merged: _Module = dense.train(layer.training)
    return merged
