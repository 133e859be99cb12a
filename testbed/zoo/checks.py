"""What every architecture must show: compressed, it runs in both modes, is loaded again and is copied."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchsmooth import load_compressed_, svd_compress_

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from testbed.zoo.entry import Entry
    from torchsmooth import CompressionReport

CHECKS = ("parameters", "report", "eval", "round trip", "deepcopy", "train")


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        name: that of the entry.
        family: that of the entry.
        ratio: fraction of the parameters that was asked for.
        note: that of the entry.
        before: parameters before.
        after: parameters after.
        low_rank: layers that became low-rank.
        dense: layers that stayed dense, by the reason.
        problems: what went wrong, by the check; a check that was passed holds an empty text.
    """

    name: str
    family: str
    ratio: float
    note: str
    before: int = 0
    after: int = 0
    low_rank: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check was made and found nothing."""
        return self.problems.keys() == set(CHECKS) and not any(self.problems.values())


def examine(entry: Entry) -> Outcome:
    """Build an architecture, compress it without data, and check all that it must show.

    Args:
        entry: what to build and feed.

    Returns:
        The outcome; an error of a check is noted in it, not raised. What cannot be built or fed dense is raised.
    """
    outcome = Outcome(entry.name, entry.family, entry.ratio, entry.note)
    model = entry.build().eval()
    outcome.before = _count(model)
    expected = _layers_of_torch(model)
    with torch.no_grad():
        shapes = [_shape(one, entry) for one in entry.run(model)]
    try:
        report = svd_compress_(model, entry.ratio, progress=False)
    except Exception as error:  # noqa: BLE001 - whatever it is belongs into the table
        outcome.problems["parameters"] = _told(error)
        return outcome
    outcome.after, outcome.low_rank = _count(model), len(report.compressed)
    for layer in report.layers:
        if layer.reason:
            outcome.dense[layer.reason] = outcome.dense.get(layer.reason, 0) + 1
    checks: dict[str, Callable[[], str]] = {
        "parameters": lambda: _parameters(outcome, report),
        "report": lambda: _report(expected, report),
        "eval": lambda: _eval(entry, model, shapes),
        "round trip": lambda: _round_trip(entry, model),
        "deepcopy": lambda: _same(entry, model, copy.deepcopy(model)),
        "train": lambda: _train(entry, model),
    }
    for name, check in checks.items():
        try:
            outcome.problems[name] = check()
        except Exception as error:  # noqa: BLE001, PERF203 - the same
            outcome.problems[name] = _told(error)
    return outcome


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _layers_of_torch(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, _ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
    return {name for name, one in model.named_modules() if isinstance(one, kinds)}


def _shape(tensor: Tensor, entry: Entry) -> tuple[int, ...]:
    return tuple(tensor.shape[1:] if entry.counts_vary else tensor.shape)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _parameters(outcome: Outcome, report: CompressionReport) -> str:
    """Count by ourselves what the report says: within the budget, and no further below than one triple costs."""
    allowed = (1 - outcome.ratio) * outcome.before
    if (report.parameters_before, report.parameters_after) != (outcome.before, outcome.after):
        return f"the report says {report.parameters_before:,} → {report.parameters_after:,}"
    if outcome.after > allowed:
        return f"{outcome.after:,} parameters are left, allowed were {allowed:,.0f}"
    for layer in report.compressed:
        # In either form one more singular triple costs no more than those that are there do on the average.
        if isinstance(layer.rank, int) and layer.rank + 1 < layer.full_rank:
            triple = layer.parameters_after / layer.rank
            if triple <= allowed - outcome.after and layer.parameters_after + triple < layer.parameters_before:
                return f"{allowed - outcome.after:,.0f} parameters are left over, enough for a triple of {layer.name}"
    return ""


def _report(expected: set[str], report: CompressionReport) -> str:
    listed = {layer.name for layer in report.layers}
    # What lies inside a layer that is replaced as a whole, or is parametrized, goes by the name of that.
    missing = sorted(one for one in expected if not any(one == name or one.startswith(f"{name}.") for name in listed))
    silent = [layer.name for layer in report.layers if not layer.scheme and not layer.reason]
    if missing or silent:
        return f"not listed: {missing}; dense without a reason: {silent}"
    return ""


def _eval(entry: Entry, model: nn.Module, shapes: list[tuple[int, ...]]) -> str:
    outputs = _outputs(entry, model)
    found = [_shape(one, entry) for one in outputs]
    if found != shapes:
        return f"outputs of shapes {found}, dense they are {shapes}"
    return _why_not_finite(outputs)


def _why_not_finite(outputs: list[Tensor]) -> str:
    if not outputs:
        return "no outputs"
    bad = sum(not bool(one.isfinite().all()) for one in outputs)
    return f"{bad} of {len(outputs)} outputs are not finite" if bad else ""


def _round_trip(entry: Entry, model: nn.Module) -> str:
    """Save, read with ``weights_only``, and load into a model that was built with other weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    del file
    again = load_compressed_(entry.build(seed=1).eval(), state)
    return _same(entry, model, again)


def _same(entry: Entry, model: nn.Module, other: nn.Module) -> str:
    """Compare all outputs and all of the state bit for bit."""
    one, two = model.state_dict(), other.state_dict()
    if list(one) != list(two):
        return f"other keys: {sorted(one.keys() ^ two.keys())[:3]}"
    different = [
        name
        for name, value in one.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, two[name].to(value.device))
    ]
    if different:
        return f"{len(different)} tensors differ, the first is {different[0]}"
    before, after = _outputs(entry, model), _outputs(entry, other)
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        return "the outputs differ"
    return ""


@torch.no_grad()
def _outputs(entry: Entry, model: nn.Module) -> list[Tensor]:
    return entry.run(model.eval())


def _train(entry: Entry, model: nn.Module) -> str:
    """Run once in train mode, and ask for the gradients of all factors whose layers ran."""
    ran: set[nn.Module] = set()
    low_rank = [module for module in model.modules() if hasattr(module, "factor_children")]
    handles = [one.register_forward_hook(lambda module, *_: ran.add(module)) for one in low_rank]
    outputs = entry.run(model.train())
    for handle in handles:
        handle.remove()
    problem = _why_not_finite(outputs)
    if problem:
        return problem
    torch.stack([one.double().mean() for one in outputs if one.requires_grad]).sum().backward()
    model.eval()
    factors = [parameter for one in ran for parameter in one.parameters() if parameter.requires_grad]
    if not factors:
        return "no low-rank layer ran that could be trained"
    lacking = sum(one.grad is None or not bool(one.grad.isfinite().all()) for one in factors)
    return f"{lacking} of {len(factors)} factors have no finite gradient" if lacking else ""
