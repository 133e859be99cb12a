"""Plans as JSON: read with every field checked."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch

from ._budget import Frontier
from ._checks import check_no_folder, checked_path, describe
from ._matricise import FORMS, distinct_schemes, matricise
from ._prices import MacPrices, ParameterPrices, Positions, TimePrices, Work
from ._targets import TARGETS
from ._tucker import monotone
from ._tucker_layout import TuckerLayout, no_more
from .layer_plan import LayerPlan, Option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ._matricise import Form, LayerScheme
    from ._prices import Prices
    from ._tucker_layout import Layout, Rank

_FORMAT, _VERSION = "torchsmooth plan", 1
_LARGEST = 2**63 - 1
_MOST_PAIRS = 2**28


def to_text(layers: Sequence[LayerPlan], others: Mapping[str, Any]) -> str:
    """Write the layers of a plan, and its other fields."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        **others,
        "layers": [_layer_content(layer) for layer in layers],
    }
    return json.dumps(content, allow_nan=False)


def _layer_content(layer: LayerPlan) -> dict[str, Any]:
    options = list(layer.options.values())
    return {
        "name": layer.name,
        "type": layer.type,
        "shape": list(layer.shape),
        "parameters_before": math.prod(layer.shape) if options else layer.parameters_before,
        # Of a low-rank layer, or of one whose weight is computed, another number is stored.
        **(
            {"stored": layer.parameters_before} if options and layer.parameters_before != math.prod(layer.shape) else {}
        ),
        "scheme": layer.scheme,
        "form": layer.form,
        "rank": layer.rank,
        "reason": layer.reason,
        "forms": list(layer.forms),
        "groups": options[0].matricisation.groups if options else 1,
        **({"transposed": True} if options and getattr(options[0].matricisation, "transposed", False) else {}),
        "roundoff": options[0].roundoff if options else 0.0,
        **({"spacing": options[0].spacing} if options and options[0].spacing else {}),
        "errors": {scheme: _errors_content(layer, scheme, one) for scheme, one in layer.options.items()},
        "prices": _prices_content(layer.prices),
    }


def _errors_content(layer: LayerPlan, scheme: LayerScheme, option: Option) -> list[Any]:
    """List the error of each rank; of pairs of ranks, only of those that no cheaper pair beats, and of the chosen."""
    if not isinstance(option.matricisation, TuckerLayout):
        return [_short(error) for error in option.errors.tolist()]
    pairs = {layer.rank} if layer.scheme == scheme else set()
    for form in FORMS:
        for prices in (ParameterPrices(layer.parameters_before), layer.prices):
            ranks, costs = prices.table(scheme, option.matricisation, form)
            # Rounded as they are written, so that a plan that was read is written alike.
            errors = [_short(error) for error in option.errors[ranks.unbind(1)].tolist()]
            useful = Frontier.of(costs, torch.tensor(errors, dtype=torch.float64, device="cpu")).labels
            pairs.update((r_in, r_out) for r_in, r_out in ranks[useful].tolist())
    # The first says whether there is anything to lose: of a zero weight all errors are zero.
    return [[*pair, _short(float(option.errors[pair]))] for pair in [(0, 0), *sorted(pairs)]]


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _prices_content(prices: Prices) -> dict[str, Any] | None:
    if isinstance(prices, MacPrices):
        work = {} if prices.work == "outputs" else {"work": prices.work}
        return {"positions": list(prices.positions), **work}
    if isinstance(prices, TimePrices):
        times = [
            [*key, list(rank) if isinstance(rank, tuple) else rank, time]
            for key, each in prices.times.items()
            for rank, time in each.items()
        ]
        return {"dense": prices.dense, "times": times}
    return None


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the fields of a plan from a file."""
    file = checked_path(path, "path")
    check_no_folder(path)
    try:
        return from_text(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def from_text(text: str) -> dict[str, Any]:
    """Read the fields of a plan."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string that to_json wrote, got {describe(text)}.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        way = "" if "{" in text else " (CompressionPlan.load reads a file)"
        raise ValueError(f"not JSON ({error}): expected what CompressionPlan.save or to_json wrote{way}.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"not a plan: expected an object with the field 'format' of {_FORMAT!r}, as CompressionPlan.save writes it."
        )
    if content.get("version") != _VERSION or isinstance(content["version"], bool):
        raise ValueError(
            f"field 'version' must be {_VERSION}, got {content.get('version')!r}: the plan was written by another "
            "version of torchsmooth; read it there, or plan again."
        )
    fields = _Fields(content, "")
    target = fields.choice("target", TARGETS)
    layers = [_layer(_Fields(one, f"layers[{index}]."), target) for index, one in enumerate(fields.items("layers"))]
    names = [layer.name for layer in layers]
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(f"layers[{index}].name", "a name that no other layer has", name)
    macs, latency = target == "macs", target == "latency"
    fields.nothing(*["macs_before"] * (not macs), *["latency_before"] * (not latency))
    return {
        "layers": tuple(layers),
        "parameters_before": fields.count("parameters_before", least=1),
        "asked": fields.text("asked"),
        "target": target,
        "macs_before": fields.count("macs_before") if macs else None,
        "latency_before": fields.number("latency_before") if latency else None,
    }


def _layer(fields: _Fields, target: str) -> LayerPlan:
    shape = tuple(fields.counts("shape", least=0))
    forms: list[Form] = fields.choices("forms", FORMS)
    groups = fields.count("groups", least=1)
    rounding = fields.number("roundoff"), fields.number("spacing") if "spacing" in fields.content else 0.0
    options: dict[LayerScheme, Option] = {}
    errors = fields.fields("errors")
    known = _layouts(shape, groups, transposed=fields.flag("transposed"))
    for name in errors.content:
        if name not in known:
            _refuse(f"{errors.where}{name}", f"a scheme of a weight of shape {shape} with groups={groups}", name)
        scheme: LayerScheme = next(one for one in known if one == name)
        layout = known[scheme]
        values = _pair_errors(errors, layout) if isinstance(layout, TuckerLayout) else _errors(errors, scheme, layout)
        options[scheme] = Option(layout, values, values, *rounding)  # losses decide about plans, and this one is made
    layer = LayerPlan(fields.text("name"), fields.text("type"), shape, options, fields.text("reason"), forms=forms)
    layer.parameters_before = fields.count("parameters_before")
    if options:
        if layer.parameters_before != math.prod(shape):
            _refuse(
                f"{fields.where}parameters_before", f"{math.prod(shape)}, as the shape has", layer.parameters_before
            )
        if "stored" in fields.content:
            layer.parameters_before = fields.count("stored", least=1)
        entries = layer.parameters_before if target == "params" else math.prod(shape)
        layer.prices = _prices(fields, target, entries, options)
    _choose(layer, fields)
    return layer


def _layouts(shape: tuple[int, ...], groups: int, *, transposed: bool) -> dict[LayerScheme, Layout]:
    if len(shape) < 2 or 0 in shape or shape[0] % groups:  # noqa: PLR2004 - outputs and inputs
        return {}
    layouts: dict[LayerScheme, Layout] = {
        scheme: matricise(shape, scheme, groups, transposed=transposed)
        for scheme in set(distinct_schemes(shape[2:], transposed=transposed).values())
    }
    tucker = None if transposed else TuckerLayout.of(shape, groups)
    return layouts if tucker is None else layouts | {"tucker": tucker}


def _choose(layer: LayerPlan, fields: _Fields) -> None:
    if fields.get("form") == "dense":
        fields.nothing("scheme", "rank")
        return
    form: Form = fields.choice("form", ("dense", *FORMS))
    scheme: LayerScheme = fields.choice("scheme", tuple(layer.options))
    layout = layer.options[scheme].matricisation
    most = layout.largest_rank(form)
    if isinstance(layout, TuckerLayout):
        pair = _pair(fields.get("rank"), f"{fields.where}rank")
        if not no_more(pair, most):
            _refuse(f"{fields.where}rank", f"a pair of at most {list(most)} in form {form!r}", list(pair))
        layer.choose(scheme, pair, form)
        return
    rank = fields.count("rank", least=1)
    if rank > most:
        _refuse(f"{fields.where}rank", f"1 … {most} in form {form!r}", rank)
    layer.choose(scheme, rank, form)


def _pair_errors(errors: _Fields, layout: TuckerLayout) -> Tensor:
    """Read errors of pairs of ranks; of pairs that are not listed, that of the best listed one that is no larger."""
    full_in, full_out = layout.full_rank
    if (full_in + 1) * (full_out + 1) > _MOST_PAIRS:
        _refuse(f"{errors.where}tucker", f"left out of a layer of more than {_MOST_PAIRS:,} pairs of ranks", "one")
    table = torch.ones(full_in + 1, full_out + 1, dtype=torch.float64, device="cpu")
    empty = False
    for index, row in enumerate(errors.items("tucker")):
        where = f"{errors.where}tucker[{index}]"
        if not isinstance(row, list) or len(row) != 3:  # noqa: PLR2004
            _refuse(where, "a pair of ranks and a squared relative error", row)
        r_in, r_out = _pair(row[:2], where, least=0)
        error = _number(row[2], where)
        empty |= r_in == r_out == error == 0
        if r_in > full_in or r_out > full_out or error > 1:
            _refuse(where, f"ranks of at most {full_in} and {full_out}, and a squared relative error of at most 1", row)
        table[r_in, r_out] = error
    return torch.zeros_like(table) if empty else monotone(table)


def _rank(value: object, where: str, scheme: str) -> Rank:
    return _pair(value, where) if scheme == "tucker" else _count(value, where, 1)


def _pair(value: object, where: str, least: int = 1) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:  # noqa: PLR2004
        _refuse(where, "a pair of ranks", value)
    return _count(value[0], where, least), _count(value[1], where, least)


def _errors(errors: _Fields, scheme: str, layout: Layout) -> Tensor:
    values = errors.numbers(scheme)
    where = f"{errors.where}{scheme}"
    if len(values) != layout.full_rank + 1:
        _refuse(where, f"{layout.full_rank + 1} numbers, one for each rank from 0 on", f"{len(values)} numbers")
    if max(values) > 1:
        _refuse(where, "squared relative errors of at most 1", max(values))
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _prices(fields: _Fields, target: str, entries: int, options: Mapping[LayerScheme, Option]) -> Prices:
    if target == "params":
        fields.nothing("prices")
        return ParameterPrices(entries)
    prices = fields.fields("prices")
    if target == "macs":
        positions = prices.counts("positions", least=0)
        if len(positions) != len(Positions._fields):
            _refuse(f"{prices.where}positions", f"{len(Positions._fields)} whole numbers", positions)
        work: Work = prices.choice("work", get_args(Work)) if "work" in prices.content else "outputs"
        return MacPrices(Positions(*positions), entries, work)
    times: dict[tuple[LayerScheme, Form], dict[Rank, int]] = {}
    for index, row in enumerate(prices.items("times")):
        where = f"{prices.where}times[{index}]"
        if not isinstance(row, list) or len(row) != 4 or row[0] not in tuple(options) or row[1] not in FORMS:  # noqa: PLR2004
            _refuse(where, "a scheme that has errors, a form, a rank and nanoseconds", row)
        scheme, form, given, time = row
        rank, most = _rank(given, where, scheme), options[scheme].matricisation.largest_rank(form)
        if not no_more(rank, most):
            _refuse(where, f"of a rank of at most {most} in form {form!r}", given)
        times.setdefault((scheme, form), {})[rank] = _count(time, where, 0)
    return TimePrices(prices.count("dense"), times)


def _refuse(where: str, expected: str, got: object) -> NoReturn:
    text = repr(got)
    shown = text if len(text) <= 60 else f"{type(got).__name__} of {len(text)} characters"  # noqa: PLR2004
    raise ValueError(f"field {where!r} must be {expected}, got {shown}.")


def _count(value: object, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        _refuse(where, f"a whole number of at least {least}", value)
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        _refuse(where, "a finite number of at least 0", value)
    try:
        return float(value)
    except OverflowError:
        _refuse(where, "a finite number of at least 0", value)


class _Fields:
    """An object of the file, whose fields are checked when they are read.

    Args:
        content: what JSON gave.
        where: the way to it, to name its fields in errors.
    """

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            _refuse(where.rstrip("."), "an object", content)
        self.content, self.where = content, where

    def get(self, name: str) -> Any:
        if name not in self.content:
            raise ValueError(f"field {self.where + name!r} is missing.")
        return self.content[name]

    def _checked(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.get(name)
        if not fits(value):
            _refuse(f"{self.where}{name}", expected, value)
        return value

    def nothing(self, *names: str) -> None:
        for name in names:
            self._checked(name, lambda value: value is None, "null here")

    def text(self, name: str) -> str:
        text: str = self._checked(name, lambda value: isinstance(value, str), "a text")
        return text

    def flag(self, name: str) -> bool:
        """Read what is only written where it is true."""
        return name in self.content and bool(
            self._checked(name, lambda value: isinstance(value, bool), "true or false")
        )

    def choice(self, name: str, choices: Sequence[Any]) -> Any:
        listed = " or ".join(repr(one) for one in choices) or "null: the layer has no scheme"
        return self._checked(name, lambda value: isinstance(value, str) and value in choices, listed)

    def choices(self, name: str, choices: Sequence[Any]) -> list[Any]:
        listed = f"a list of {' and '.join(repr(one) for one in choices)}"
        fits = lambda value: bool(value) and isinstance(value, list) and all(one in choices for one in value)  # noqa: E731
        return list(self._checked(name, fits, listed))

    def items(self, name: str) -> list[Any]:
        return list(self._checked(name, lambda value: isinstance(value, list), "a list"))

    def fields(self, name: str) -> _Fields:
        return _Fields(self.get(name), f"{self.where}{name}.")

    def count(self, name: str, least: int = 0) -> int:
        return _count(self.get(name), self.where + name, least)

    def counts(self, name: str, least: int) -> list[int]:
        return [_count(one, f"{self.where}{name}[{index}]", least) for index, one in enumerate(self.items(name))]

    def number(self, name: str) -> float:
        return _number(self.get(name), self.where + name)

    def numbers(self, name: str) -> list[float]:
        return [_number(one, f"{self.where}{name}[{index}]") for index, one in enumerate(self.items(name))]
