"""Penalties without a graph: their gradient is added right before the optimizer steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ._accumulate import Gradients
from ._checks import check_count, check_function, check_module, check_real, describe, quoted
from ._registered import Registered, key_of, naming, registered_in, together, unwrapped, uses_in
from ._sharded import sharded_for
from ._stepping import closure_among, stepping, steps_under_way
from .adaptive import Adaptation, AdaptivePenalty
from .penalties import added

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from torch.optim import Optimizer

    from .penalties import Penalty

__all__ = ["PenaltyHandle", "attach_"]

_HANDLES = "_torchsmooth_handles"


def attach_(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    every: int = 1,
    schedule: Callable[[int], float] | None = None,
) -> PenaltyHandle:
    """Let an optimizer add the gradient of a model's penalties right before each of its steps.

    The same as adding ``penalty_loss(model)`` to the loss, to rounding, with no graph: gradients come in closed form.
    It counts once a step under gradient accumulation, sees gradients that a ``GradScaler`` has unscaled, and works with
    closures (whose loss it completes). Gradients are clipped before it, where clipping is part of the training loop.
    Parameters that the optimizer maximises (``maximize=True``) get it with the other sign: weights become smooth there,
    too. Call it once; leave ``penalty_loss`` out of the loss.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or one that passes the steps on to its attribute ``optimizer``, as
            accelerate's does. Only tensors among its parameters, or computed from them (as
            parametrized ones are), get a gradient.
        model: the model with registered penalties; wrapped (DataParallel, DistributedDataParallel, torch.compile) or
            not. Penalties that are registered or removed later count from the next step on.
        every: evaluate the penalties at each ``every``-th step only, with so many times the strength; at least 1.
        schedule: a factor on all strengths, finite and ≥ 0, as a function of the step, counted from zero, such as a
            :class:`torchsmooth.StrengthSchedule`; None is always one.

    Returns:
        A handle, which need not be kept: ``remove()`` undoes the call, ``state_dict()`` belongs in the training
        checkpoint. Copied or unpickled optimizers have no hooks: attach those again.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if nothing is registered, no registered tensor is among the optimizer's parameters, the model, a
            part of it or a tensor that is tied to one of it is attached to this optimizer already, or ``every`` is out
            of range. While training: if a penalty cannot be evaluated (the layer is named), or the schedule gives no
            factor. The step is not taken then, but some gradients may have been added.

    Example:
        >>> import torch, torchsmooth
        >>> model = torchsmooth.smooth_(torch.nn.Linear(8, 8), torchsmooth.NuclearNorm(1e-2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = torchsmooth.attach_(optimizer, model)
        >>> model(torch.randn(4, 8)).square().mean().backward()  # no penalty in the loss
        >>> optimizer.step()
        >>> handle.remove()

    Source: a penalty as a step of its own beside the loss: Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", 2019; but here the gradient goes through the optimizer, as that of a loss does.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {describe(optimizer)}.")
    optimizer = stepping(optimizer)
    check_module(model)
    every = check_count(every, "every", None, "optimizer steps from one evaluation to the next")
    if schedule is not None:
        check_function(schedule, "schedule", "the step", 1)
    attached: dict[int, PenaltyHandle] = optimizer.__dict__.get(_HANDLES, {})
    for other in attached.values():
        _check_apart(model, other.model, type(optimizer).__name__)
    handle = PenaltyHandle(optimizer, model, every, schedule)
    optimizer.__dict__[_HANDLES] = attached | {id(handle): handle}
    return handle


def _check_apart(model: nn.Module, other: nn.Module, optimizer: str) -> None:
    """Refuse a model of which something is attached already, as part of another."""
    uses, others = list(uses_in(model)), list(uses_in(other))
    if {use.module for use, _ in uses} & {use.module for use, _ in others}:
        raise ValueError(
            f"this {type(model).__name__}, or a part of it, is attached to this {optimizer} already, and its penalties "
            "would count twice: call remove() on the handle of the first call."
        )
    # What is computed belongs to the module that computes it.
    known = {(id(use.parameter()), key_of(penalty)): use for use, penalty in others if use.parameter() is not None}
    for use, penalty in uses:
        tied = known.get((id(use.parameter()), key_of(penalty)))
        if tied is not None:
            raise ValueError(
                f"tensor {use.name!r} of this {type(model).__name__} is tied to {tied.name!r} of the "
                f"{type(other).__name__} that is attached to this {optimizer} already, and {type(penalty).__name__} on "
                "it would count twice: take it off one of the two by remove_penalties(layer), or call remove() on the "
                "handle of the first call and attach one model that holds both."
            )


def _listed(penalties: Collection[str]) -> str:
    return f"the adaptive penalties {'; '.join(sorted(penalties))}" if penalties else "no adaptive penalties"


class PenaltyHandle:
    """What :func:`attach_` returns: a way to undo it, and the state of what adapts.

    Attributes:
        model: the model whose penalties are added.
        every: steps from one evaluation to the next.
        schedule: the factor on all strengths, as a function of the step, or None.
        step: optimizer steps taken since the call, or in the checkpoint that was loaded and since. One that a
            ``GradScaler`` skips does not count, except of a fused optimizer, which skips by itself; nor does one that
            ends in an error.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, every: int, schedule: Callable[[int], float] | None
    ) -> None:
        self.model, self.every, self.schedule = model, every, schedule
        self.step = 0
        self._depth = 0
        # The names of tensors, under which a checkpoint keeps what adapts, do not depend on the wrapper.
        self._optimizer, self._inner = optimizer, unwrapped(model)
        self._adaptations: dict[object, tuple[AdaptivePenalty, Adaptation]] = {}
        uses = [use for use, _ in uses_in(self._inner)]
        if not uses:
            raise ValueError(
                f"no penalty is registered in this {type(model).__name__}: call smooth_(model, penalty) or "
                "register_penalty(module, tensor_name, penalty) first."
            )
        if not self._stepped(one for use in uses for one in use.sources()):
            raise ValueError(
                f"none of the tensors with penalties in this {type(model).__name__} is among the parameters of this "
                f"{type(optimizer).__name__} (the first is {uses[0].name!r}): make the optimizer from the parameters "
                "of the same model, after everything that replaces them (such as fully_shard or svd_compress_)."
            )
        self._uses = len(uses)
        # Those that another optimizer trains, or none: they are no news later.
        self._left = set(self._not_stepped())
        self._begin(self._registered())
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Undo :func:`attach_`. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizer.__dict__.get(_HANDLES, {}).pop(id(self), None)

    def adaptation(self, penalty: AdaptivePenalty) -> Adaptation:
        """Return the moving part of an adaptive penalty, such as the plan of a ``RankTail``.

        Args:
            penalty: one equal to that which is registered.

        Raises:
            ValueError: if none is.
        """
        key = key_of(penalty)
        if key not in self._adaptations:
            self._renew()
        if key not in self._adaptations:
            known = _listed(self._by_name())
            raise ValueError(f"{penalty} is not among the adaptive penalties of this handle: it has {known}.")
        return self._adaptations[key][1]

    def _by_name(self) -> dict[str, Adaptation]:
        """Return what adapts as a checkpoint knows it."""
        return {repr(penalty): one for penalty, one in self._adaptations.values()}

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the state of adaptive penalties, for the training checkpoint."""
        self._renew()
        return {
            "step": self.step,
            "adaptive": {name: one.state_dict() for name, one in self._by_name().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state: of a handle for the same model with the same penalties.

        Raises:
            ValueError: if it is something else.
        """
        self._renew()
        mine = self._by_name()
        given: object = state
        parts = given if isinstance(given, Mapping) else {}
        step, adaptive = parts.get("step"), parts.get("adaptive")
        if type(step) is not int or step < 0 or not isinstance(adaptive, Mapping) or adaptive.keys() != mine.keys():
            got = f"that of one with {_listed(adaptive)}" if isinstance(adaptive, Mapping) else describe(state)
            got += (
                f" of {quoted([str(key) for key in parts]) or 'nothing'}" if parts and "adaptive" not in parts else ""
            )
            raise ValueError(
                f"the state does not belong to this handle: expected what state_dict() of a handle with "
                f"{_listed(mine)} returns, got {got}."
            )
        loaded: list[tuple[Adaptation, Any]] = []
        try:
            for key, one in mine.items():
                before = one.state_dict()
                one.load_state_dict(adaptive[key])
                loaded.append((one, before))
        except BaseException as error:
            for one, before in loaded:
                one.load_state_dict(before)
            if isinstance(error, KeyError):
                raise ValueError(f"the state does not belong to this handle: that of {key} lacks {error}.") from error
            raise
        self.step = step

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: the copy would hold an optimizer without its hooks, and do nothing."""
        raise TypeError(
            "a PenaltyHandle cannot be copied or pickled, as copies of an optimizer have no hooks: call "
            "attach_(optimizer, model) for the copies, and load_state_dict(handle.state_dict()) on its handle."
        )

    def __repr__(self) -> str:
        extra = "" if self.schedule is None else f", schedule={self.schedule}"
        return f"PenaltyHandle({type(self._optimizer).__name__}, every={self.every}{extra}, step={self.step})"

    def _stepped(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return those of some tensors that the optimizer steps."""
        stepped = {id(one) for group in self._optimizer.param_groups for one in group["params"]}
        sharded = sharded_for(self._inner)
        return [one for one in tensors if id(sharded.get(id(one), one)) in stepped]

    def _not_stepped(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the model that the optimizer does not step, by name."""
        parameters = dict(self._inner.named_parameters())
        stepped = {id(one) for one in self._stepped(parameters.values())}
        return {name: one for name, one in parameters.items() if id(one) not in stepped}

    def _registered(self) -> list[Penalty]:
        """Return the penalties in the model by now, each once for every tensor that it is on."""
        return [penalty for _, penalty in uses_in(self._inner)]

    def _warn_of_replaced_layers(self, uses: int) -> None:
        """Warn where penalties have gone with their layers, and the optimizer has not got what took their place."""
        before, self._uses = self._uses, uses
        if self._uses >= before:
            return
        new = [name for name, one in self._not_stepped().items() if one.requires_grad and name not in self._left]
        if new:
            optimizer = type(self._optimizer).__name__
            warnings.warn(
                f"{len(new)} trainable parameters of this {type(self._inner).__name__} are not in this {optimizer} "
                f"(the first is {new[0]!r}), and will not be trained by it. If svd_compress_ has replaced their "
                "layers: make a new optimizer, and call smooth_ and attach_ again for penalties on the new layers.",
                UserWarning,
                stacklevel=4,  # who calls optimizer.step, which torch wraps
            )

    def _before_step(
        self,
        _: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the gradients; or, where the optimizer computes them itself by a closure, see that they are added."""
        # Torch calls the hooks again where the step of a class calls that of the class it was derived from. After a
        # step that has failed nothing is counted down.
        if self._depth and steps_under_way(self._optimizer) < self._depth + 1:
            self._depth = 0
        self._depth += 1
        if self._depth > 1:
            return None
        factor = self._factor()
        found = closure_among(self._optimizer, args, kwargs)
        if factor != 0.0:
            registered = self._registered()
            self._warn_of_replaced_layers(len(registered))
            self._begin(registered)
            for begun in self._adaptations.values():
                begun[1].advance(self.step)
            if found is None:
                self._add_gradients(factor, with_value=False)
        if factor == 0.0 or found is None:
            return None
        place, closure = found

        def completed() -> Any:
            with torch.enable_grad():
                loss = closure()
            value = self._add_gradients(factor, with_value=loss is not None)
            return loss if value is None else loss + (value.to(loss.device) if isinstance(loss, Tensor) else value)

        if isinstance(place, int):
            return (*args[:place], completed, *args[place + 1 :]), kwargs
        return args, kwargs | {place: completed}

    def _after_step(self, *_: object) -> None:
        # Of steps within each other the outermost ends last; one that began before the handle is none of its.
        if self._depth == 1:
            self.step += 1
        self._depth = max(0, self._depth - 1)

    def _factor(self) -> float:
        if self.step % self.every:
            return 0.0
        if self.schedule is None:
            return float(self.every)
        name = f"schedule({self.step})"
        factor = check_real(self.schedule(self.step), name)
        if factor < 0.0:
            raise ValueError(f"{name} must be ≥ 0, got {factor}: a negative factor would reward rough weights.")
        return self.every * factor

    def _add_gradients(self, factor: float, *, with_value: bool) -> Tensor | None:
        """Add the gradients of all penalties; return the sum of their values, if wanted."""
        with torch.enable_grad():  # parametrized tensors are computed here
            registered = registered_in(self._inner)
        gradients = Gradients(self._optimizer, factor)
        values: list[Tensor] = []
        with torch.no_grad():
            for many in together(one for one in registered if gradients.wanted(one)):
                for one, value, gradient, strength in self._terms(many, with_value=with_value):
                    gradients.add(one, gradient, strength)
                    if value is not None:
                        values.append(gradients.sign * factor * strength * value)
                    del gradient  # or it would be held while the next weight is gathered
        gradients.finish()
        return added(values) if values else None

    def _terms(
        self, many: list[Registered], *, with_value: bool
    ) -> Iterator[tuple[Registered, Tensor | None, Tensor, float]]:
        """Value, if wanted, gradient and strength of one penalty, for each of some tensors."""
        penalty = many[0].penalty
        _, adaptation = self._adaptations.get(key_of(penalty), (None, None))
        if adaptation is None and not with_value:
            with naming(many):
                for index, gradient in penalty.gradients([one.weight() for one in many]):
                    yield many[index], None, gradient, penalty.strength
            return
        for one in many:
            with naming([one]):
                tensor, groups, transposed = weight = one.weight()
                if adaptation is None:
                    value, gradient = penalty.value_and_gradient(tensor, groups=groups, transposed=transposed)
                else:
                    value, gradient = adaptation.term(one.name, weight)
            yield one, value, gradient, penalty.strength if adaptation is None else 1.0

    def _renew(self) -> None:
        """Begin what was registered since the last step; a handle that was removed keeps what it had."""
        if self._hooks:
            self._begin(self._registered())

    def _begin(self, registered: Iterable[Penalty]) -> None:
        """Start what adapts and is registered by now, and drop what is no longer."""
        adaptive = {key_of(one): one for one in registered if one.strength > 0.0 and isinstance(one, AdaptivePenalty)}
        if len({repr(one) for one in adaptive.values()}) < len(adaptive):
            raise ValueError(
                f"different adaptive penalties have the same repr, by which checkpoints know them, among "
                f"{_listed([repr(one) for one in adaptive.values()])}: derive them as frozen dataclasses, with what "
                "they differ by as fields."
            )
        before = self._adaptations
        self._adaptations = {
            key: before[key] if key in before else (one, self._started(one)) for key, one in adaptive.items()
        }

    def _started(self, penalty: AdaptivePenalty) -> Adaptation:
        adaptation = penalty.begin(self._inner)
        adaptation.every = self.every
        return adaptation
