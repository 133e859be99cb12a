"""Random module trees through every operation: nothing but our errors, after which all is as before.

What comes out is counted, compared with what was asked for, saved, loaded and restored.
"""

from __future__ import annotations

import copy
import math
import pickle
import traceback
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from tests.snapshots import Snapshot, same_state
from tests.strategies_models import Recipe, recipes
from tests.twists import TWISTS
from torchsmooth import CompressionPlan, load_compressed_, plan_compression, restore_dense_, svd_compress_, sweep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchsmooth import CompressionReport

_HOME = str(Path(torchsmooth.__file__).parent)

# What a state dict cannot bring into a model that is built again: other structures, and values that are nowhere.
_UNLOADABLE = ("on_the_meta_device", "lazy", "low_rank", "expanded", "tie_by_a_view")

_options = st.fixed_dictionaries(
    {},
    optional={
        "scheme": st.sampled_from(["auto", "channel", "input", "spatial", "tucker", ("channel", "tucker")]),
        "form": st.sampled_from(["auto", "factored", "pivoted"]),
        "allocation": st.sampled_from(["budget", "uniform"]),
        "rank_multiple": st.sampled_from([1, 2, 3]),
        "parametrized": st.sampled_from(["keep", "merge"]),
    },
)
_ratios = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.9])


@dataclass(frozen=True)
class Filter:
    """Leaves out what has an odd number of letters and parity in its name, or none."""

    parity: int

    def __call__(self, module: nn.Module, name: str) -> bool:
        return self.parity > 1 or len(name) % 2 == self.parity


@dataclass(frozen=True)
class Request:
    """Options of one compression."""

    goal: dict[str, float]
    options: dict[str, Any]
    filter_fn: Filter = field(default_factory=lambda: Filter(2))

    def keywords(self) -> dict[str, Any]:
        return {**self.goal, **self.options, "filter_fn": self.filter_fn}

    def allowed(self, parameters: int) -> int:
        """Return the budget, by a definition of its own."""
        return parameters - math.ceil(Fraction(str(self.goal.get("ratio", 0))) * parameters)


_requests = st.builds(
    Request,
    st.one_of(
        st.fixed_dictionaries({"ratio": _ratios}), st.fixed_dictionaries({"max_error": st.sampled_from([0.3, 0.8])})
    ),
    _options,
    st.builds(Filter, st.integers(0, 5)),
)


def attempt(model: nn.Module, action: Callable[[], Any]) -> Any:
    """Do something with a model; on one of our errors, check that it is as before, and return the error."""
    before, random = Snapshot(model), torch.get_rng_state()
    try:
        result = action()
    except (ValueError, TypeError) as error:
        result = error
    assert torch.equal(torch.get_rng_state(), random)
    if isinstance(result, Exception):
        last = traceback.extract_tb(result.__traceback__)[-1]
        assert last.filename.startswith(_HOME), f"not one of our errors: {last}"
        assert len(str(result)) > 20
        difference = before.difference()
        assert not difference, f"changed by an error: {difference}"
    return result


def parameters(model: nn.Module) -> int:
    return sum(one.numel() for one in set(model.parameters()) if not nn.parameter.is_lazy(one))


def holders(model: nn.Module) -> Counter[int]:
    """Count the places in which each parameter is."""
    places = {(module, name): one for module in model.modules() for name, one in module._parameters.items()}
    return Counter(id(one) for one in places.values() if one is not None)


def places(model: nn.Module) -> dict[tuple[int, str], nn.Module]:
    return {(id(parent), name): child for parent in model.modules() for name, child in parent._modules.items()}


class Before:
    """What is kept of a dense model, to judge what comes out by."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.count = parameters(model)
        self.modules = dict(model.named_modules())
        self.kept = list(model.parameters())  # alive, for their identities
        self.tied = {key for key, number in holders(model).items() if number > 1}
        self.flags = {name: (one.training, one._forward_hooks) for name, one in self.modules.items()}
        self.weights = {
            name: (one._parameters["weight"].detach().clone(), one._parameters["weight"].requires_grad)
            for name, one in self.modules.items()
            if one._parameters.get("weight") is not None and not nn.parameter.is_lazy(one._parameters["weight"])
        }
        shared = Counter(id(child) for child in places(model).values() if child is not None)
        self.shared = [
            [place for place, child in places(model).items() if id(child) == one]
            for one, number in shared.items()
            if number > 1
        ]

    def check(self, report: CompressionReport, request: Request) -> None:
        """Check all that must hold of the compressed model."""
        model, compressed = self.model, {one.name for one in report.compressed}
        assert compressed
        assert report.parameters_before == self.count
        assert report.parameters_after == parameters(model) <= request.allowed(self.count)
        assert report.parameters_after < self.count
        self._check_layers(report, compressed)
        now = holders(model)
        assert all(now[one] > 1 for one in self.tied if now[one]), "tied parameters have come apart"
        new = places(model)
        for group in self.shared:
            assert len({id(new[place]) for place in group if place in new}) <= 1, "a shared module has come apart"
        assert str(report)

    def _check_layers(self, report: CompressionReport, compressed: set[str]) -> None:
        modules = dict(self.model.named_modules())
        listed = [one.name for one in report.layers]
        assert len(listed) == len(set(listed))
        for name in set(listed) & self.modules.keys():
            own = self.modules[name]
            assert own._parameters or {"parametrizations", "down"} & own._modules.keys(), f"{name} is no layer"
        for name, module in self.modules.items():
            inside = any(f"{one}.".startswith(f"{name}.") for one in compressed) if name else True
            if module._parameters.get("weight") is not None and module._parameters["weight"].dim() > 1:
                over = [one for one in listed if name == one or name.startswith(f"{one}.") or one == ""]
                assert over or any(one.startswith(f"{name}.") for one in listed), f"{name} is not in the report"
            if name not in modules or any(name.startswith(f"{one}.") for one in compressed):
                continue
            if not inside:
                assert modules[name] is module or _within_expanded(name, compressed), f"{name} was replaced"
            if name in self.flags:
                training, hooks = self.flags[name]
                assert modules[name].training == training or _within_expanded(name, compressed)
                assert modules[name]._forward_hooks is hooks or _within_expanded(name, compressed)
        for one in report.compressed:
            layer = modules[one.name]
            assert layer.form == one.form
            assert layer.rank == one.rank
            assert one.parameters_after < one.parameters_before
            for own_name, own in layer.named_parameters():
                assert own.is_contiguous() or own.is_contiguous(memory_format=torch.channels_last) or own.dim() == 5
                size = own.untyped_storage().nbytes()
                assert "bias" in own_name or size == own.numel() * own.element_size()
            if one.name in self.weights:
                self._check_weight(layer, one)

    def _check_weight(self, layer: Any, one: Any) -> None:
        weight, trained = self.weights[one.name]
        assert all(getattr(layer, child).weight.requires_grad == trained for child in layer.factor_children)
        assert all(getattr(layer, child).weight.dtype == weight.dtype for child in layer.factor_children)
        if weight.shape != layer.weight.shape:  # it is a registered layer's
            return
        exact, there = weight.double(), layer.weight.detach().double()
        largest = float(exact.abs().max())
        if largest > 0:
            error = float((exact / largest - there / largest).norm() / (exact / largest).norm())
            eps = torch.finfo(weight.dtype).eps
            assert abs(error - one.relative_error) <= 20 * eps + 1e-6, (error, one)


def _within_expanded(name: str, compressed: set[str]) -> bool:
    """Tell whether a name is beside, or inside of, a projection of attention or the like that was compressed."""
    return any(name.startswith(f"{one.rpartition('.')[0]}.") for one in compressed)


def check_loading(recipe: Recipe, model: nn.Module) -> None:
    """Check that the state dict of a compressed model fits one that is built again."""
    state = model.state_dict()
    again = recipe.build()
    loaded = attempt(again, lambda: load_compressed_(again, state))
    if not recipe.has(*_UNLOADABLE):
        assert loaded is again, loaded
        assert same_state(again.state_dict(), state)


def check_restoring(recipe: Recipe, model: nn.Module, *, merged: bool) -> None:
    """Check that the dense model has the structure of the original."""
    restored = attempt(model, lambda: restore_dense_(model))
    if recipe.has("low_rank") or merged:
        return
    original = recipe.build()
    if isinstance(restored, Exception):
        assert recipe.has("hold_in_a_plain_attribute", "parametrize_by_what_fails"), restored
        return
    assert list(restored.state_dict()) == list(original.state_dict())
    kinds, others = (
        [(name, type(one).__name__) for name, one in each.named_modules(remove_duplicate=False)]
        for each in (restored, original)
    )
    assert kinds == others


def check_copies(model: nn.Module) -> None:
    """Check that copies are the same, as far as torch itself can copy the model."""
    state = model.state_dict()
    try:
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
    except (RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:  # hooks, parametrizations
        package = str(Path(torchsmooth.__file__).parent)  # a folder above the tests may have the same name
        assert not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(package)  # noqa: PT017
        return
    assert same_state(copied.state_dict(), state)
    assert same_state(pickled.state_dict(), state)


def run(recipe: Recipe, first: Request, second: Request, edits: list[tuple[int, int]]) -> str:
    """Do everything with a recipe, and return what came of the first compression."""
    model = recipe.build()
    before = Before(model)
    report = attempt(model, lambda: svd_compress_(model, **first.keywords()))
    planned(recipe, first, edits, report)
    if isinstance(report, Exception):
        return "error"
    before.check(report, first)
    check_copies(model)
    check_loading(recipe, model)
    middle = Before(model)
    again = attempt(model, lambda: svd_compress_(model, **second.keywords()))
    if not isinstance(again, Exception):
        middle.check(again, second)
    merged = [one for one, done in ((first, report), (second, again)) if not isinstance(done, Exception)]
    check_restoring(recipe, model, merged=any(one.options.get("parametrized") == "merge" for one in merged))
    return "compressed"


def planned(recipe: Recipe, request: Request, edits: list[tuple[int, int]], report: Any) -> None:
    """Plan, edit, write and read, sweep, and apply; the same plan gives the same model."""
    model = recipe.build()
    whole = Snapshot(model)
    keywords = request.keywords()
    plan = attempt(model, lambda: plan_compression(model, **keywords))
    assert isinstance(plan, Exception) == isinstance(report, Exception)
    assert not whole.difference()
    if "ratio" in keywords:
        ratios = [keywords.pop("ratio"), 0.05]
        plans = attempt(model, lambda: sweep(model, ratios, **keywords))
        assert not whole.difference()
        assert isinstance(plans, Exception) or plans[0] == plan
    if isinstance(plan, Exception):
        assert str(plan) == str(report)
        return
    check_count(report, plan.parameters_after, recipe)
    for place, rank in edits:
        layer = plan.layers[place % len(plan.layers)]
        attempt(model, lambda layer=layer, rank=rank: layer.keep_dense() if rank == 9 else setattr(layer, "rank", rank))
    assert not whole.difference()
    plan = CompressionPlan.from_json(plan.to_json())
    before = Before(model)
    expected = plan.parameters_after
    applied = attempt(model, lambda: plan.apply_(model))
    if not isinstance(applied, Exception):
        before.check(applied, Request({}, {}))
        check_count(applied, expected, recipe)


def check_count(report: CompressionReport, expected: int, recipe: Recipe) -> None:
    """Check that a plan knew what comes out; what is merged of attention and the like may have been a few more."""
    merged = any(one.type == "Linear" for one in report.compressed) and recipe.has(
        *(one for one in TWISTS if one.startswith(("parametrize", "hook_by")))
    )
    assert report.parameters_after == expected or (merged and report.parameters_after < expected)


_edits = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2)


@settings(max_examples=60)
@given(recipes(), _requests, _requests, _edits)
def test_any_model_is_compressed_or_left_as_it_was(recipe, first, second, edits):
    assert run(recipe, first, second, edits) in ("compressed", "error")


@pytest.mark.slow
@settings(max_examples=2000)
@given(recipes(7), _requests, _requests, _edits)
def test_any_model_is_compressed_or_left_as_it_was_many_times(recipe, first, second, edits):
    assert run(recipe, first, second, edits) in ("compressed", "error")
