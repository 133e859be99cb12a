"""Parts of a network that will not change any more are left out of runs, and what is found is the same to the bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testbed.vision_transformer import VisionTransformer
from tests.networks import Shared, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import _finished, _refit, _two_networks, plan_compression
from torchsmooth._finished import FinishedParts


def batches_for(model, seed=0, count=3):
    shape = {"Conv2d": (4, 3, 16, 16)}.get(type(next(iter(model.children()))).__name__)
    return [randn(*(shape or (12, 16)), seed=seed + one, dtype=torch.float32) for one in range(count)]


def refitted(model, batches, *, reuse=True):
    """Compress a copy with data, and return what it holds and what was reported."""
    model = copy.deepcopy(model)
    plan = plan_compression(model, ratio=0.3)
    keep = FinishedParts._keep if reuse else lambda *_: None
    with patch.object(FinishedParts, "_keep", keep):
        report = plan.apply_(model, calibration=batches)
    return model.state_dict(), [layer.output_error for layer in report.layers]


def alike(one, other):
    """Compare what two refits found, bit for bit."""
    (values, errors), (others, other_errors) = one, other
    return (
        errors == other_errors
        and values.keys() == others.keys()
        and all(torch.equal(values[key], others[key]) for key in values)
    )


def runs_of(module, run):
    """How often something runs a module in earnest."""
    count = 0
    compute = type(module).forward

    def forward(self, *args, **kwargs):
        nonlocal count
        count += self is module
        return compute(self, *args, **kwargs)

    with patch.object(type(module), "forward", forward):
        run()
    return count


class Block(nn.Module):
    """Two layers and a way around them, with what a test wants to happen in between."""

    def __init__(self, between=None):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between

    def forward(self, x):
        h = torch.tanh(self.one(x))
        if self.between is not None:
            h = self.between(self, h)
        return x + self.two(h)


def deep(*between, seed=0):
    return fill_(nn.Sequential(*(Block(one) for one in between)), seed).eval()


class Residual(nn.Module):
    """Blocks that write into what they are given, as ReLUs that act in place do, and return views of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        x = self.same(self.first(x))
        y = self.relu(x)
        y += self.second(y)
        return self.third(y[:, :8].repeat(1, 2))


class Taking(nn.Module):
    """Blocks that take and return what is no tensor."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x, found, *, scale=1.0):
            y = torch.tanh(self.layer(x)) * scale
            found.append(y)
            return {"y": y, "mean": y.mean()}

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(4))

    def forward(self, x):
        found = []
        for part in self.parts:
            x = part(x, found, scale=2.0)["y"]
        return sum(found)


class Forces(nn.Module):
    """Takes the gradient of an energy within, and hands it to a branch that does not come last."""

    def __init__(self, way="backwards"):
        super().__init__()
        self.part, self.energy = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 16)
        self.head, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.way = way

    def total(self, x):
        return 5 * self.energy(self.part(x)).square().sum() + x.square().sum()

    def gradient(self, x):
        if self.way == "func":
            return torch.func.grad(self.total)(x)
        if self.way == "forwards":
            return self.total(x) + torch.func.jvp(lambda one: self.energy(self.part(one)), (x,), (x.cos(),))[1]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.total(x), x)[0]

    def forward(self, x):
        return self.head(self.gradient(x)), self.last(x)


class Graph(nn.Module):
    """A part that returns what is differentiated outside of it."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        @torch.enable_grad()
        def forward(self, x):
            x = x.detach().requires_grad_()
            return x, self.layer(x).cos().sum()

    def __init__(self):
        super().__init__()
        self.part, self.head, self.last = self.Part(), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        start, energy = self.part(x)
        return self.head(torch.autograd.grad(energy, start)[0]), self.last(x)


class Borrowed(nn.Module):
    """A part that works with the weight of a layer behind it, which it is handed or knows of."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x, weight):
            return torch.tanh(self.layer(nn.functional.linear(x, weight() if callable(weight) else weight)))

    def __init__(self, way):
        super().__init__()
        self.part, self.head, self.mid, self.last = self.Part(), *(nn.Linear(16, 16) for _ in range(3))
        self.way = way

    def forward(self, x):
        weight = {
            "as it is": lambda: self.head.weight,
            "a view": lambda: self.head.weight.T,
            "computed": lambda: self.head.weight * 2,
            "by a function": lambda: lambda: self.head.weight,
            "a bias": self.head.bias.diag,
        }[self.way]()
        return self.mid(torch.tanh(self.head(self.part(x, weight)))), self.last(x)


class Puts(nn.Module):
    """A part that puts something on a layer of torch's, from where the model takes it."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tanh = nn.Linear(16, 16), nn.Tanh()

        def forward(self, x):
            y = self.tanh(self.layer(x))
            self.tanh.put = y.mean(0) + getattr(self.tanh, "put", 0.0)
            return y

    def __init__(self):
        super().__init__()
        self.part, self.head, self.last = self.Part(), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.part(x) + self.part.tanh.put), self.last(x)


NETWORKS = {
    "residual": small_resnet,
    "plain": lambda seed: mlp(seed, (16, 24, 24, 12, 8)),
    "in place": lambda seed: fill_(Residual(), seed),
    "attention": lambda seed: fill_(
        nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))), seed
    ).eval(),
    "lists and dicts": lambda seed: fill_(Taking(), seed),
    "draws": lambda seed: deep(None, lambda self, h: h * torch.empty_like(h).bernoulli_(0.7), None, None, seed=seed),
    "shared": lambda seed: fill_(Shared(), seed),
    "weights of its own": lambda seed: deep(None, lambda self, h: h + self.one.weight.sum(), None, None, seed=seed),
    "puts on layers": lambda seed: fill_(Puts(), seed),
    "gradients": lambda seed: fill_(Forces(), seed),
    "gradients by torch.func": lambda seed: fill_(Forces("func"), seed),
    "derivatives along a direction": lambda seed: fill_(Forces("forwards"), seed),
    "graphs out of parts": lambda seed: fill_(Graph(), seed),
    "a borrowed weight": lambda seed: fill_(Borrowed("as it is"), seed),
    "a borrowed view": lambda seed: fill_(Borrowed("a view"), seed),
    "what is made of a borrowed weight": lambda seed: fill_(Borrowed("computed"), seed),
    "a function that borrows": lambda seed: fill_(Borrowed("by a function"), seed),
    "a borrowed bias": lambda seed: fill_(Borrowed("a bias"), seed),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is deprecated")  # which torch.func.jvp imports
@settings(max_examples=4)
@given(seeds, st.data())
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_found_is_what_is_found_when_everything_runs(name, seed, data):
    model = NETWORKS[name](seed)
    given_batches = batches_for(model, seed)
    room, ahead = data.draw(st.sampled_from([1 << 30, 4000, 0])), data.draw(st.sampled_from([1 << 30, 5000, 0]))
    with patch.object(_finished, "_AT_MOST", room), patch.object(_two_networks, "_AHEAD", ahead):
        found = refitted(model, given_batches)
    assert alike(found, refitted(model, given_batches, reuse=False))


def test_a_batch_goes_through_a_part_a_few_times_however_many_layers_come_after():
    runs = {}
    for depth in (4, 12):
        model = deep(*[None] * depth)
        plan = plan_compression(model, ratio=0.3)
        batches = batches_for(model, count=2)
        runs[depth] = runs_of(model[0], lambda plan=plan, model=model, b=batches: plan.apply_(model, calibration=b))
    assert runs[4] == runs[12] <= 2 * 6
    with patch.object(FinishedParts, "_keep", lambda *_: None):
        model = deep(*[None] * 12)
        plan = plan_compression(model, ratio=0.3)
        assert runs_of(model[0], lambda: plan.apply_(model, calibration=batches_for(model, count=2))) > 2 * 20


def test_the_transformer_of_the_benchmarks_is_left_out_of_runs_as_well():
    model = fill_(VisionTransformer(24), 0).eval()
    images = [randn(2, 3, 32, 32, seed=seed, dtype=torch.float32) for seed in range(2)]
    plan = plan_compression(model, ratio=0.3)
    first = next(one for one in model.modules() if type(one).__name__ == "TransformerBlock")
    assert runs_of(first, lambda: plan.apply_(model, calibration=images)) <= 2 * 10


# What more than computes


def counted(model, index, batches):
    """How often the block that is not pure ran, beside one that is."""
    plan = plan_compression(model, ratio=0.3)
    counts = []
    for block in (model[index], model[0]):
        copied = copy.deepcopy(model)
        own = copied[index] if block is model[index] else copied[0]
        counts.append(runs_of(own, lambda own=copied: plan.apply_(own, calibration=batches)))
    return counts


@pytest.mark.parametrize("kind", ["draws", "hook", "hook before"])
def test_a_part_that_does_more_than_compute_is_run_each_time(kind):
    draw = lambda self, h: h * torch.empty_like(h).bernoulli_(0.7)  # noqa: E731
    model = deep(None, draw if kind == "draws" else None, None, None, None, None)
    if kind == "hook":
        model[1].one.register_forward_hook(lambda *_: None)
    if kind == "hook before":
        model[1].two.register_forward_pre_hook(lambda *_: None)
    impure, pure = counted(model, 1, batches_for(model))
    assert impure > 2 * pure


def test_nothing_is_left_out_of_a_model_that_keeps_something():
    def count(self, h):
        self.steps = getattr(self, "steps", 0) + 1
        return h

    model = deep(count, None, None, None, None)
    batches = batches_for(model)
    found = counted(model, 1, batches)
    with patch.object(FinishedParts, "_keep", lambda *_: None):
        assert found == counted(model, 1, batches)
    assert alike(refitted(model, batches), refitted(model, batches, reuse=False))


def test_a_part_that_hands_something_on_in_secret_is_found_out_in_the_end():
    kept = SimpleNamespace(value=0.0)

    def hand_on(_, h):
        kept.value = h.mean(0)
        return h

    def receive(_, h):
        return h + kept.value

    model = deep(None, hand_on, None, receive, None)
    batches = batches_for(model)
    with patch.object(_refit, "_refit", wraps=_refit._refit) as refits:
        found = refitted(model, batches)
    assert [call.kwargs["reuse"] for call in refits.call_args_list] == [True, False]
    assert alike(found, refitted(model, batches, reuse=False))


LEFT = [torch.zeros(16)]


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(16, 16)

    def forward(self, x):
        y = self.inside(x)
        LEFT[0] = 3 * y.mean(0)
        return y


class HandsOn(nn.Module):
    """The first layer leaves something for the second one where nobody sees it."""

    def __init__(self, norms):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norms = nn.Sequential(*(nn.BatchNorm1d(16) for _ in range(norms)))
        self.part = Leaves()

    def forward(self, x):
        return self.second(self.norms(self.first(self.part(x))) + LEFT[0])


@pytest.mark.parametrize("norms", [0, 1, 2])
def test_what_is_handed_on_in_secret_is_found_out_however_few_layers_there_are(norms):
    model = fill_(HandsOn(norms), 0).eval()
    assert alike(refitted(model, batches_for(model)), refitted(model, batches_for(model), reuse=False))


def test_parts_that_are_mapped_over_are_run_each_time():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.body = Block(), nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.body(torch.func.vmap(self.part)(x))

    model = fill_(Mapped(), 0)
    plan = plan_compression(model, ratio=0.3, filter_fn=lambda _, name: not name.startswith("part"))
    assert plan.apply_(model, calibration=batches_for(model)).ratio > 0.25


# The model


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_happens_the_model_is_as_before(error):
    calls = 0

    def fail(_, h):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise error
        return h

    model = deep(None, None, fail, None)
    plan = plan_compression(model, ratio=0.3)
    before = snapshot(model)
    with pytest.raises(error):
        plan.apply_(model, calibration=batches_for(model))
    assert same(before, snapshot(model))
    assert not any("forward" in vars(one) for one in model.modules())


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_with_hooks_on_all_modules_everything_runs(register):
    model = deep(*[None] * 6)
    plan = plan_compression(model, ratio=0.3)
    runs = {}
    for hooked in (False, True):
        own = copy.deepcopy(model)
        handle = register(lambda *_: None) if hooked else None
        runs[hooked] = runs_of(own[0], lambda own=own: plan.apply_(own, calibration=batches_for(own)))
        if handle:
            handle.remove()
    assert runs[True] > 2 * runs[False]


def test_a_forward_of_the_instance_is_left_alone():
    model = deep(*[None] * 4)
    plain = type(model[1]).forward
    own = lambda x: plain(model[1], x) * 0.5  # noqa: E731
    model[1].forward = own
    plan = plan_compression(model, ratio=0.3)
    plan.apply_(model, calibration=batches_for(model))
    assert vars(model[1])["forward"] is own
