"""What a docstring of a public name has to say.

Of every public name: a summary in one sentence, and a doctest (which pytest runs). Of a function: each argument, what
comes back, what is raised. Of a class that users make: each argument of the constructor, and what is raised. Of a class
that is a result: each field. A tensor has its shape, a number its range. A published method has its source; what has
none is listed here, with the reason. Methods of public classes document their arguments and what comes back, unless
they override one that does.
"""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

import torchsmooth
from torchsmooth import functional, fused
from torchsmooth.attach import PenaltyHandle
from torchsmooth.layer_plan import LayerPlan
from torchsmooth.penalties import Penalty
from torchsmooth.report import LayerReport
from torchsmooth.spectra import LayerSpectrum

NAMES = {name: getattr(torchsmooth, name) for name in torchsmooth.__all__ if name != "functional"}
NAMES |= {f"functional.{name}": getattr(functional, name) for name in functional.__all__}
NAMES |= {f"fused.{name}": getattr(fused, name) for name in fused.__all__}
FUNCTIONS = {name: one for name, one in NAMES.items() if inspect.isfunction(one)}
RESULTS = {"CompressionPlan", "CompressionReport", "FoldingReport", "Spectrum", "TuningReport"}
MADE = {name: one for name, one in NAMES.items() if inspect.isclass(one) and name not in RESULTS}
# Not public names of their own, but what users get from those, or derive from.
OTHERS = {one.__name__: one for one in (PenaltyHandle, LayerPlan, Penalty, LayerReport, LayerSpectrum)}

WITHOUT_SOURCE = {
    "CompressionPlan": "a container",
    "CompressionReport": "a container",
    "Spectrum": "a container; its measures name theirs in `spectrum`",
    "StrengthSchedule": "a ramp",
    "plot_spectra": "a picture",
    "plot_weights": "a picture",
    "register_layer": "a table of types",
    "restore_dense_": "a product of two matrices",
    **dict.fromkeys((f"fused.{name}" for name in fused.__all__), "two products, and what may follow them"),
    "FoldingReport": "a container",
    "TuningReport": "a container",
    "tune_": "measured times",
    "sweep": "plans of `plan_compression`, which names its own",
}
# How a range is said.
RANGE = re.compile(
    r"≥|≤|>|<|between|at least|at most|positive|finite|from 0|0 …|1 …|below|divisor|number of|size of|fraction|ratio"
)
# Arguments that are those of torch's layer of the same name, and have their ranges there.
LAYER = re.compile(r"LowRank|Tucker")


def text_of(thing):
    return inspect.getdoc(thing) or ""


def section(text, title):
    """Return the entries of a section of a docstring: what is said of each name."""
    lines, entries, name = text.splitlines(), {}, None
    if f"{title}:" not in lines:
        return entries
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}\*{0,2}(\w+): (.*)", line):
            name = entry[1]
            entries[name] = entry[2]
        elif name:
            entries[name] += f" {line.strip()}"
    return entries


def parameters_of(thing):
    return [name for name in inspect.signature(thing).parameters if name not in {"self", "cls"}]


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_summary_in_one_sentence(name):
    summary = text_of((NAMES | OTHERS)[name]).split("\n\n")[0]
    assert summary.endswith(".")
    assert "\n" not in summary


@pytest.mark.parametrize("name", NAMES)
def test_an_example(name):
    text = text_of(NAMES[name])
    example = re.search(r"^Example:\n(?:(?: {4}.*)?\n)*? {4}>>> ", text, re.MULTILINE)
    assert example, f"{name} has no `Example:` with a doctest"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_what_comes_back_and_what_is_raised(name):
    text = text_of(FUNCTIONS[name])
    assert list(section(text, "Args")) == parameters_of(FUNCTIONS[name])
    assert "\nReturns:\n" in text
    assert section(text, "Raises")


@pytest.mark.parametrize("name", MADE)
def test_arguments_of_constructors_and_what_they_raise(name):
    text = text_of(MADE[name])
    assert list(section(text, "Args")) == parameters_of(MADE[name])
    assert section(text, "Raises")


@pytest.mark.parametrize("name", sorted(RESULTS | {"LayerReport"}))
def test_fields_of_results(name):
    result = (NAMES | OTHERS)[name]
    assert list(section(text_of(result), "Attributes")) == [field.name for field in dataclasses.fields(result)]


def kinds(annotation):
    """Return the types that an annotation is made of, as words."""
    return set(re.findall(r"\w+", str(annotation)))


@pytest.mark.parametrize("name", FUNCTIONS | MADE)
def test_tensors_have_shapes_and_numbers_have_ranges(name):
    thing = NAMES[name]
    said = section(text_of(thing), "Args")
    for parameter in inspect.signature(thing).parameters.values():
        words, entry = kinds(parameter.annotation), said[parameter.name]
        if words == {"Tensor"}:
            assert re.search(r"``\(", entry), f"{name}: the shape of {parameter.name} is not said: {entry}"
        if words and words <= {"int", "float", "None"} and not LAYER.match(name):
            assert RANGE.search(entry), f"{name}: the range of {parameter.name} is not said: {entry}"


def test_published_methods_have_sources():
    without = {name for name, one in NAMES.items() if not re.search(r"^Source: \S", text_of(one), re.MULTILINE)}
    assert without == set(WITHOUT_SOURCE)


def methods():
    """Yield the methods of public classes that are not told of by a class further up; `forward` wherever it is ours."""
    for name, kind in (NAMES | OTHERS).items():
        if not inspect.isclass(kind):
            continue
        for method in dir(kind):
            owner = next(one for one in kind.__mro__ if method in vars(one))
            above = any(method in vars(one) for one in owner.__mro__[1:])
            new = owner is kind and not above and not method.startswith("_") and callable(getattr(kind, method))
            if owner.__module__.startswith("torchsmooth") and (new or method == "forward"):
                yield pytest.param(getattr(kind, method), id=f"{name}.{method}")


@pytest.mark.parametrize("method", list(methods()))
def test_methods_document_their_arguments(method):
    text = text_of(method)
    assert list(section(text, "Args")) == parameters_of(method)
    returns = inspect.signature(method).return_annotation
    if returns not in {None, "None", inspect.Signature.empty}:
        assert re.search(r"^(Returns:|Yields:|Return )", text, re.MULTILINE)


def test_the_reader_of_docstrings_sees_what_is_there():
    text = "Do it.\n\nArgs:\n    one: a thing,\n        of two lines.\n    *two: more.\n\nReturns:\n    Something.\n"
    assert section(text, "Args") == {"one": "a thing, of two lines.", "two": "more. "}
    assert section(text, "Raises") == {}
