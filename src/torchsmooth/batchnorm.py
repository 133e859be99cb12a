"""BatchNorm statistics estimated anew: what a compressed network feeds its norms is no longer what they remember."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ._batches import check_batch, check_batches, run
from ._checks import check_initialised, check_module
from ._linalg import clamped, working_copy
from ._norms import norms_of
from ._running import observing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["recalibrate_batchnorm_"]


def recalibrate_batchnorm_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate the running means and variances of all BatchNorm layers anew, in place, without gradients.

    The model runs over the batches with its BatchNorm layers in training mode and everything else (dropout) in eval
    mode; each statistic becomes the average of its values over the batches, formed in float64. Weights, modes,
    gradients and the random state are as before afterwards; so are the statistics of layers that no batch reaches (such
    as those of a branch that runs in training alone), and all of them, if an error occurs on the way.

    Args:
        model: a model, for instance one that was just compressed.
        batches: unlabelled inputs on the device of the model, once over: tensors; tuples or lists, of which the first
            element is the input (so a DataLoader of images and labels will do); or dictionaries of keyword arguments.
            Each batch should be about as large as in training.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is not a module, ``batches`` cannot be iterated, or a batch is of another kind.
        ValueError: if the model has no BatchNorm layer with running statistics, there are no batches, none of them
            reaches such a layer, or a statistic comes out NaN or infinite.

    Example:
        >>> import torch, torchsmooth
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> inputs = torch.arange(32.0).reshape(8, 4)
        >>> model = torchsmooth.recalibrate_batchnorm_(model, [inputs])
        >>> bool(torch.allclose(model[1].running_mean, model[0](inputs).mean(0)))
        True

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", 2023 (arXiv
    2211.08403), where resetting these statistics mends merged networks; ``torch.optim.swa_utils.update_bn`` does it
    after averaging.
    """
    check_module(model)
    check_initialised(model)
    check_batches(batches, "batches")
    norms = norms_of(model)
    if not norms:
        raise ValueError(f"this {type(model).__name__} has no BatchNorm layer with running statistics to estimate.")
    # A model made in inference mode can be written to there alone.
    inference = torch.inference_mode() if torch.is_inference_mode_enabled() else nullcontext()
    with observing(model, norms.values()), inference, _estimating(list(norms.values())) as averages:
        count = 0
        for batch in batches:
            run(model, check_batch(batch))
            averages.take_()
            count += 1
        if not count:
            raise ValueError("batches is empty: pass at least one batch (an iterator can be used up only once).")
        if not averages.totals:
            raise ValueError(
                f"no batch reaches a BatchNorm layer of this {type(model).__name__}, such as {next(iter(norms))!r}: "
                "they are not called in eval mode, or for other inputs only."
            )
        for name, norm in norms.items():
            if not all(bool(torch.isfinite(one).all()) for one in averages.totals.get(norm, ())):
                raise ValueError(
                    f"the statistics of BatchNorm layer {name!r} came out NaN or infinite: look at the inputs, and at "
                    "the layers before it."
                )
    return model


class _Averages:
    """What norms find in each run, added up in float64: in a buffer of bfloat16 the later runs would be rounded away.

    Attributes:
        totals: the sums of the mean and of the variance over all calls, for norms that were called.
    """

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self._norms = norms
        self._calls = dict.fromkeys(norms, 0)
        self.totals: dict[_BatchNorm, list[Tensor]] = {}

    def take_(self) -> None:
        """Take over what the norms have found since the last time, and let them begin anew."""
        for norm in self._norms:
            calls = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
            if not calls:
                continue
            found = [working_copy(one) * calls for one in _statistics(norm)]
            earlier = self.totals.get(norm, [torch.zeros_like(one) for one in found])
            self.totals[norm] = [one + other for one, other in zip(earlier, found, strict=True)]
            self._calls[norm] += calls
            norm.reset_running_stats()

    def write_(self) -> None:
        """Store the averages."""
        for norm, totals in self.totals.items():
            for buffer, total in zip(_statistics(norm), totals, strict=True):
                buffer.copy_(clamped(total / self._calls[norm], buffer.dtype))


@contextmanager
def _estimating(norms: list[_BatchNorm]) -> Iterator[_Averages]:
    """Put norms in training mode, with fresh statistics; write the averages at the end, or, on an error, what was."""
    others = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def put_back() -> None:
        for buffer, before in buffers:
            buffer.copy_(before)

    averages = _Averages(norms)
    try:
        for norm in norms:
            # One of its own: these are not training steps.
            norm._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=_statistics(norm)[0].device)
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None  # None: the plain average over the calls of one run
        yield averages
        put_back()  # those of norms that no batch reaches
        averages.write_()
    except BaseException:
        put_back()
        raise
    finally:
        for norm, momentum, tracked in others:
            norm.momentum, norm._buffers["num_batches_tracked"] = momentum, tracked


def _statistics(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var
