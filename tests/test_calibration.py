"""Where data goes in a model, and the moments of what arrives: gathered in passes that leave the model as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.networks import Shared, mlp, same, small_resnet, snapshot
from tests.reference import calibration as reference
from tests.strategies import fill_, randn
from torchsmooth import _calibration as room
from torchsmooth import svd_compress_
from torchsmooth._calibration import Calibration, grouped_weight, width_of
from torchsmooth._layers import KINDS
from torchsmooth._moments import Moments


def layers_of(model):
    return {name: module for name, module in model.named_modules() if type(module) in KINDS}


def look(model, batches, *, moments=True):
    found = Calibration(batches, show=False).look(model, layers_of(model), moments=moments)
    return {name: one for group in found for name, one in group.items()}


IMAGES = randn(5, 3, 8, 8, seed=0, dtype=torch.float32)


def test_moments_are_those_of_what_arrives():
    model = fill_(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)), 0).double()
    images = randn(7, 4, 5, 5, seed=0)
    found = look(model, images.split(3))
    patches = reference.patches(model[0], images).flatten(0, 1).transpose(0, 1)
    arriving = model[:3](images).detach().unsqueeze(0)
    for name, rows in (("0", patches), ("3", arriving)):
        moments = found[name][1]
        assert moments.count == rows.shape[1]
        for centred in (True, False):
            expected = torch.stack([reference.moments(one, one, centred=centred)[0] for one in rows])
            assert torch.allclose(moments.inner(centred=centred), expected, atol=1e-12)


def test_traffic_counts_calls_and_tells_the_order():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.last(self.first(x))
            return self.first(x) if len(x) == 3 else x

    found = look(Twice(), [torch.zeros(3, 4), torch.zeros(2, 4)], moments=False)
    assert list(found) == ["idle", "last", "first"]
    assert [found[name][0].calls for name in found] == [[0, 0], [1, 1], [2, 1]]
    assert [found[name][0].order for name in found] == [-1, 1, 0]
    assert [found[name][0].reached for name in found] == [False, True, True]
    assert all(moments.count == 0 for _, moments in found.values())


def normed(model, inputs):
    return {name: traffic.normed for name, (traffic, _) in look(model, [inputs], moments=False).items()}


def test_only_what_goes_straight_into_a_norm_is_normed():
    assert all(value == (name != "fc") for name, value in normed(small_resnet(), IMAGES).items())
    between = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    assert normed(between, torch.zeros(3, 4)) == {"0": False}
    batchwise = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert normed(batchwise, torch.zeros(3, 4)) == {"0": False}

    class Named(nn.Sequential):
        def forward(self, input):  # noqa: A002 - the name that torch's layers use
            return self[1](input=self[0](input=input))

    assert normed(Named(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.zeros(3, 4)) == {"0": True}


@pytest.mark.parametrize("other", ["returned", "added", "in place", "viewed"])
def test_what_goes_elsewhere_as_well_is_not_normed(other):
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            if other == "in place":
                return self.head(self.norm(y.relu_()))
            z = self.head(self.norm(y))
            return {"returned": lambda: {"y": [y], "z": z}, "added": lambda: y + z, "viewed": lambda: (z, y[:, :2])}[
                other
            ]()

    assert normed(Neck(), torch.ones(3, 4))["linear"] is False


def test_what_a_model_returns_may_be_of_any_kind():
    @dataclass(slots=True)
    class Returned:
        values: torch.Tensor
        kind: type

    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.linear(x)
            knot = [self.norm(y)]
            knot.append(knot)
            return knot, Returned(y, Returned)

    assert normed(Returning(), torch.ones(3, 4)) == {"linear": False}


def test_the_order_is_that_of_the_data_whichever_batch_comes_first():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            return self.third(self.second(x) if len(x) == 3 else x)

    batches = [torch.zeros(2, 4), torch.zeros(3, 4)]
    for given in (batches, batches[::-1]):
        found = look(Skips(), given, moments=False)
        assert sorted(found, key=lambda name: found[name][0].order) == ["first", "second", "third"]


def test_norms_before_a_layer_are_known():
    found = look(small_resnet(), [IMAGES], moments=False)
    norms = {name: traffic.norms for name, (traffic, _) in found.items()}
    assert norms["conv1"] == {}
    assert norms["layers.0.conv1"] == {"bn1": [1]}
    assert norms["layers.0.conv2"] == {"bn1": [1], "layers.0.bn1": [1]}


def test_a_tensor_that_is_filled_anew_for_each_batch_is_refused():
    def loader():
        batch = torch.empty(3, 4)
        for value in range(3):
            yield batch.fill_(value), "label"

    with pytest.raises(ValueError, match=r"calibration: batch 0 was written to after it was given.*batch\.clone\(\)"):
        Calibration(loader())
    with pytest.raises(ValueError, match="batch 0 was written to"):
        Calibration({"x": one} for one in map(torch.zeros(2).add_, (1, 2)))


@pytest.mark.parametrize(("taken", "expected"), [((True, True), True), ((True, False), False), ((False, False), False)])
def test_every_call_has_to_go_into_a_norm(taken, expected):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            for one in taken:
                y = self.linear(x)
                x = self.norm(y) + self.other(y) if one else y + x
            return x

    assert normed(Calls(), torch.zeros(3, 4)) == {"linear": expected}


@pytest.mark.parametrize(("name", "expected"), [("weight", True), ("bias", True), ("none", False)])
def test_it_is_seen_where_a_layer_is_read_that_does_not_run(name, expected):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            own = {"weight": self.one.weight, "bias": self.one.bias, "none": torch.ones(4)}[name]
            return self.two(self.one(x)) + own.mean()

    found = look(Reads(), [torch.zeros(3, 4)], moments=False)
    assert [found[one][0].read for one in ("one", "two")] == [expected, False]


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "expected"),
    [
        (nn.Linear(4, 4, bias=False), nn.BatchNorm1d(3), (2, 3, 4), False),
        (nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), (2, 3, 4), False),
        (nn.Linear(4, 4, bias=False), nn.BatchNorm2d(3), (2, 3, 4, 4), False),
        (nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm1d(4), (3, 4, 4), False),
        (nn.Conv1d(3, 5, 1, bias=False), nn.BatchNorm1d(5), (2, 3, 4), True),
        (nn.Conv3d(3, 5, 1, bias=False), nn.BatchNorm3d(5), (2, 3, 2, 2, 2), True),
        (nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), (2, 4), True),
    ],
)
def test_a_norm_takes_up_the_mean_of_features_only_where_they_are_its_channels(layer, norm, shape, expected):
    assert normed(nn.Sequential(layer, norm), torch.ones(shape)) == {"0": expected}


@pytest.mark.parametrize("other", ["a layer", "a layer that is not looked at", "the input", "itself"])
def test_a_norm_that_takes_anything_else_takes_up_another_mean(other):
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.plain, self.norm = nn.Bilinear(4, 4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = {
                "a layer": self.two,
                "a layer that is not looked at": lambda x: self.plain(x, x),
                "the input": lambda x: x,
                "itself": lambda x: self.one(2 * x),
            }[other](x)
            return self.norm(self.one(x)) + self.norm(y)

    found = normed(Neck(), torch.ones(3, 4))
    assert found["one"] is (other == "itself")
    assert other != "a layer" or found["two"] is False


def test_a_hook_that_changes_the_output_stands_between_a_layer_and_its_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda _module, _args, output: output.relu())
    assert normed(model, torch.zeros(3, 4)) == {"0": False}


def test_layers_that_do_not_fit_the_memory_together_take_turns(monkeypatch):
    model = mlp()
    inputs = randn(30, 24, seed=0, dtype=torch.float32)
    expected = look(model, [inputs])
    passes = []
    monkeypatch.setattr(room, "_AT_ONCE", 8 * 32**2)
    monkeypatch.setattr(room, "run", lambda one, batch: (passes.append(1), one(batch)))
    found = look(model, [inputs])
    assert len(passes) == 3
    for name, (traffic, moments) in found.items():
        assert traffic.calls == expected[name][0].calls
        assert torch.equal(moments.inner(centred=True), expected[name][1].inner(centred=True))


def test_inputs_that_are_too_wide_are_counted_but_not_gathered(monkeypatch):
    monkeypatch.setattr(room, "WIDEST", 24)
    found = look(mlp(), [torch.ones(3, 24)])
    assert {name: moments.count for name, (_, moments) in found.items()} == {"0": 3, "2": 0, "4": 3}
    assert all(traffic.reached for traffic, _ in found.values())


def test_the_model_is_as_before_at_every_yield(monkeypatch):
    monkeypatch.setattr(room, "_AT_ONCE", 1)
    model = small_resnet(1)
    model.layers[2].train()
    before = snapshot(model)
    state = torch.get_rng_state()
    for group in Calibration([IMAGES], show=False).look(model, layers_of(model), moments=True):
        assert [type(moments) for _, moments in group.values()] == [Moments]
        assert same(dict(before), snapshot(model))
        assert not any(module._forward_pre_hooks for module in model.modules())
    for _ in Calibration([IMAGES], show=False).look(model, layers_of(model), moments=True):
        break  # whoever has seen enough may go
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_the_model_as_before():
    model = small_resnet(1)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="channels"):
        look(model, [IMAGES, IMAGES[:, :2]])
    assert same(before, snapshot(model))
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_modules_are_one_layer():
    found = look(Shared(), [torch.zeros(3, 16)])
    assert {name: traffic.calls for name, (traffic, _) in found.items()} == {"first": [3], "body.1": [1]}
    assert found["first"][1].count == 9


def test_weights_are_seen_as_patches_see_them():
    conv = fill_(nn.Conv2d(4, 6, (2, 3), groups=2), 0)
    assert width_of(conv) == 12
    assert torch.equal(grouped_weight(conv), conv.weight.detach().reshape(2, 3, 12))
    linear = fill_(nn.Linear(4, 6), 0)
    assert width_of(linear) == 4
    assert torch.equal(grouped_weight(linear), linear.weight.detach().unsqueeze(0))


def test_batches_are_kept_once():
    calibration = Calibration([IMAGES])
    assert Calibration.of(calibration, None) is calibration
    assert Calibration.of(None, None) is None
    assert Calibration.of([IMAGES], False).batches[0] is IMAGES


class Branching(nn.Module):
    """Decides by an operator of higher order, as flex_attention is one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.first(x)
        return self.second(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="this torch refuses them under any mode"
)
def test_operators_of_higher_order_are_looked_through():
    model = fill_(Branching(), 0)
    report = svd_compress_(model, 0.4, calibration=[randn(64, 32, seed=seed, dtype=torch.float32) for seed in (0, 1)])
    assert report["first"].rank
    assert report["second"].rank
