"""Models that keep something from one call to the next, or draw random numbers: looked at, they are as before."""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections import deque
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import same, snapshot
from tests.strategies import fill_, randn
from torchsmooth import plan_compression, svd_compress_, tune_
from torchsmooth._kept_state import KeptState


def rows(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float32)


class Cache:
    """An object of the user's own."""

    def __init__(self):
        self.count, self.rows, self.last = 0, [], torch.zeros(12)


class Deep(nn.Module):
    """Keeps a state in tensors, containers in containers, and objects."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.hidden = torch.zeros(12)
        self.listed, self.table = [torch.zeros(12)], {"k": [], "v": ([], torch.zeros(12))}
        self.cache, self.space = Cache(), SimpleNamespace(count=0, rows=[])
        self.drawn = torch.Generator().manual_seed(0)

    def forward(self, x):
        y = torch.tanh(self.one(x) * torch.rand(12, generator=self.drawn))
        y = y + random.random() + np.random.random()  # noqa: S311, NPY002 - the global states are what this is about
        mean = y.mean(0).detach()
        self.table["k"].append(mean)
        z = self.two(y + self.hidden + self.listed[0] + self.cache.last + sum(self.table["v"][0], torch.zeros(12)))
        self.table["v"][0].append(mean)
        self.table["v"][1].add_(mean)
        self.hidden.add_(mean)
        self.listed[0].add_(mean)
        self.cache.count += 1
        self.space.count += 1
        self.space.rows.append(mean)
        self.cache.rows.append(mean)
        self.cache.last.mul_(0.5).add_(mean)
        return z

    def state(self):
        cache = self.cache
        tensors = [self.hidden, self.listed[0], self.table["v"][1], cache.last, self.drawn.get_state()]
        return (
            [one.tolist() for one in tensors],
            len(self.table["k"]),
            len(self.table["v"][0]),
            (cache.count, cache.rows, vars(self.space).copy()),
        )


def numpy_state():
    return str(np.random.get_state(legacy=False))  # noqa: NPY002 - the global state is what this is about


DEEP_LOOKS = {
    "calibration": lambda model: svd_compress_(model, 0.3, calibration=[rows(20, 12, seed=one) for one in range(3)]),
    "macs": lambda model: plan_compression(model, 0.3, target="macs", example_inputs=rows(4, 12)),
    "latency": lambda model: plan_compression(model, 0.01, target="latency", example_inputs=rows(4, 12)),
    "tune_": lambda model: (svd_compress_(model, 0.3), tune_(model, rows(4, 12), progress=False)),
}


@pytest.mark.parametrize("name", DEEP_LOOKS)
def test_state_in_tensors_containers_and_objects_is_as_before(name):
    model = fill_(Deep(), 0).eval()
    before, python, numpy = model.state(), random.getstate(), numpy_state()
    with contextlib.suppress(ValueError):  # a plan for latency may not be had: what was looked at is as before
        DEEP_LOOKS[name](model)
    assert model.state() == before
    assert random.getstate() == python
    assert numpy_state() == numpy


def test_both_networks_draw_the_same_numbers_from_whatever_they_draw():
    report = svd_compress_(
        fill_(Deep(), 0).eval(), 0.03, calibration=[rows(200, 12, seed=seed) for seed in range(3)], form="pivoted"
    )
    assert all(layer.output_error is None or layer.output_error < 0.2 for layer in report.layers)


class Foreign(nn.Module):
    """Holds an object of another package, with everything that hangs from it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.foreign = Fraction(1, 3)
        self.many = [0] * 20_000

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_objects_of_other_packages_and_tables_are_not_entered():
    model = Foreign()
    state = KeptState(model)
    model.many.append(1)
    assert not state.put_back_()
    assert model.many[-1] == 1


def test_it_is_said_whether_anything_was_put_back():
    model = fill_(Deep(), 0).eval()
    state = KeptState(model)
    assert not state.put_back_()
    changes = {
        "a tensor": lambda: model.hidden.add_(1),
        "in a list": lambda: model.listed[0].add_(1),
        "a list in a dictionary": lambda: model.table["k"].append(1),
        "in a tuple": lambda: model.table["v"][0].append(1),
        "an object": lambda: setattr(model.cache, "count", 5),
        "a namespace": lambda: model.space.rows.append(1),
        "a generator": lambda: torch.rand(1, generator=model.drawn),
        "an attribute": lambda: setattr(model, "hidden", None),
        "a new attribute": lambda: setattr(model, "new", 1),
    }
    before = model.state()
    for name, change in changes.items():
        change()
        assert state.put_back_(), name
        assert not state.put_back_(), name
        assert model.state() == before, name


class Memory(nn.Module):
    """Keeps a state in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.register_buffer("hidden", torch.zeros(12))
        self.register_buffer("replaced", torch.zeros(12))
        self.steps, self.last = 0, None
        self.seen, self.queue, self.names, self.table = [], deque(), set(), {}

    def forward(self, x):
        y = torch.tanh(self.one(x) + self.hidden)
        self.hidden.mul_(0.5).add_(y.mean(0).detach())
        self.replaced = self.replaced + 1
        self.steps += 1
        self.last = y
        self.late = y
        self.seen.append(y)
        self.queue.append(y)
        self.names.add(self.steps)
        self.table[self.steps] = y
        return self.two(y)


def state_of(model):
    kinds = (list, deque, set, dict)
    plain = {
        name: copy.copy(value) if isinstance(value, kinds) else value
        for name, value in vars(model).items()
        if not name.startswith("_")
    }
    return plain, {name: (one, one.clone()) for name, one in model._buffers.items()}


def is_as(model, before):
    plain, buffers = before
    now = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert now == plain
    assert list(model._buffers) == list(buffers)
    return all(model._buffers[name] is one and torch.equal(one, values) for name, (one, values) in buffers.items())


IMAGES = rows(30, 12)


def run_and_put_back(model):
    kept = KeptState(model)
    model(IMAGES)
    kept.put_back_()


LOOKS = {
    "alone": run_and_put_back,
    "macs": lambda model: plan_compression(model, 0.1, target="macs", example_inputs=IMAGES),
    "calibration": lambda model: plan_compression(model, 0.1, calibration=[IMAGES, IMAGES]),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_a_model_keeps_is_put_back(look):
    model = fill_(Memory(), 0)
    model(rows(5, 12, seed=1))
    before = state_of(model)
    look(model)
    assert is_as(model, before)


class Nested(nn.Module):
    """Keeps what it saw in containers inside of containers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.table = {"seen": [([],), {0: {1}}], "more": (deque(), {})}

    def forward(self, x):
        (first,), by_number = self.table["seen"]
        first.append(x)
        by_number[0].add(x)
        by_number[1] = x
        self.table["more"][0].append(x)
        self.table["more"][1]["late"] = [x]
        return self.layer(x)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_so_is_what_containers_inside_of_containers_hold(look):
    model = fill_(Nested(), 0)
    table = copy.deepcopy(model.table)
    inside = model.table["seen"][1][0]
    look(model)
    assert model.table == table
    assert model.table["seen"][1][0] is inside


def test_a_refused_call_leaves_what_a_model_keeps():
    model = fill_(Memory(), 0)
    before, weights = state_of(model), snapshot(model)
    with pytest.raises(ValueError, match="NaN"):
        svd_compress_(model, 0.1, calibration=[torch.full((30, 12), torch.nan)])
    assert is_as(model, before)
    assert same(snapshot(model), weights)


def test_a_compressed_and_tuned_model_keeps_what_it_kept():
    model = fill_(Memory(), 0).eval()
    before = state_of(model)
    svd_compress_(model, 0.1, calibration=[rows(30, 12)])
    tune_(model, rows(30, 12), memory_format="keep")
    assert is_as(model, before)


class OnLayers(nn.Module):
    """Keeps something on layers of torch's, which what runs next takes from there."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(12, 12) for _ in range(3))
        self.relu, self.part = nn.ReLU(), nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.relu.kept = "before"

    def forward(self, x):
        y = self.relu(self.one(x))
        self.relu.seen = y
        self.relu.kept = "after"
        self.part[1].seen = self.part(y)
        return self.three(torch.tanh(self.two(self.relu.seen + self.part[1].seen)))


def test_what_a_model_puts_on_layers_of_torch_is_taken_off_again():
    model = fill_(OnLayers(), 0).eval()
    batches = [rows(40, 12), rows(30, 12, seed=1)]
    plan_compression(model, 0.3, calibration=batches)
    svd_compress_(model, 0.3, calibration=batches)
    assert model.relu.kept == "before"
    assert "seen" not in vars(model.relu)
    assert "seen" not in vars(model.part[1])


class Queue(nn.Module):
    """Connections that skip layers go through a queue, which a run that ends early leaves half full."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.skips = []

    def forward(self, x):
        for layer in self.down:
            x = torch.tanh(layer(x))
            self.skips.append(x)
        for layer in self.up:
            x = torch.tanh(layer(x) + self.skips.pop(0))
        return x


def test_a_run_that_ends_early_leaves_nothing_behind():
    model = fill_(Queue(), 0).eval()
    svd_compress_(model, 0.05, calibration=[rows(256, 32, seed=seed) for seed in range(3)])
    assert model.skips == []
    assert model(rows(100, 32)).shape == (100, 32)


class Noisy(nn.Module):
    """Draws numbers in eval mode, too, as dropout does that was written as a function."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        for layer in (self.a, self.b):
            x = F.dropout(F.relu(layer(x)), 0.5)
        return self.c(x)


def error_of(model, dense):
    x = rows(512, 32, seed=9)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        found = model(x)
        torch.manual_seed(3)
        wanted = dense(x)
    return float((found - wanted).norm() / wanted.norm())


def test_both_networks_draw_the_same_numbers():
    dense = fill_(Noisy(), 0).eval()
    batches = [rows(256, 32, seed=seed) for seed in range(8)]
    calibrated, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    state = torch.get_rng_state()
    svd_compress_(calibrated, 0.1, calibration=batches)
    assert torch.equal(torch.get_rng_state(), state)
    svd_compress_(plain, 0.1)
    assert error_of(calibrated, dense) < error_of(plain, dense)


class BestRows(nn.Module):
    """Chooses rows by their score: the compressed network chooses others."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.score = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 1)
        self.head, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

    def features(self, x):
        return F.relu(self.g(F.relu(self.f(x))))

    def top(self, features):
        return self.out(F.relu(self.head(features)))

    def forward(self, x):
        features = self.features(x)
        index = self.score(features).squeeze(-1).topk(16, dim=1).indices
        return self.top(features.gather(1, index[..., None].expand(-1, -1, 32)))


def test_layers_that_get_other_rows_are_fitted_to_their_own_outputs():
    dense = fill_(BestRows(), 0).eval()
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    report = svd_compress_(model, 0.3, calibration=[rows(64, 64, 32, seed=seed) for seed in range(4)])
    svd_compress_(plain, 0.3)
    with torch.no_grad():
        features = dense.features(rows(500, 32, seed=9))
        wanted = dense.top(features)
        errors = [float((one.top(features) - wanted).norm()) for one in (model, plain)]
    assert errors[0] < errors[1]
    notes = {one.name: one.note for one in report.layers if one.rank is not None}
    assert "fitted to its own outputs" in notes["head"]
    assert "fitted to its own outputs" in notes["out"]
    assert not notes.get("g")


class Experts(nn.Module):
    """The data says which layer takes which row, and so how many each of them gets."""

    def __init__(self):
        super().__init__()
        self.inside, self.gate = nn.Linear(32, 32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.inside(x))
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows_of_it = chosen == index
            y[rows_of_it] = expert(x[rows_of_it])
        return y


def test_layers_that_get_another_number_of_rows_are_fitted_all_the_same():
    dense = fill_(Experts(), 0).eval()
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    report = svd_compress_(model, 0.3, calibration=[rows(400, 32, seed=seed) for seed in range(3)])
    svd_compress_(plain, 0.3)
    notes = {one.name: one.note for one in report.layers}
    assert not any("never called" in note for note in notes.values())
    assert not notes["experts.0"]
    assert notes["experts.2"] == "not calibrated: no data reaches it in the compressed network"
    with torch.no_grad():
        x = torch.tanh(dense.inside(rows(500, 32, seed=9)))
        for index, expert in enumerate(dense.experts[:2]):
            wanted = expert(x)
            errors = [float((one.experts[index](x) - wanted).norm()) for one in (model, plain)]
            assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("alive", [False, True])
def test_a_weak_proxy_among_the_attributes_is_no_hindrance(alive):
    model = fill_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), 0)
    cache = Cache()
    model.cache, model.kind = weakref.proxy(cache), weakref.proxy(Cache)
    if not alive:
        del cache
    report = svd_compress_(model, 0.5, calibration=[rows(64, 32)])
    assert report["0"].rank
