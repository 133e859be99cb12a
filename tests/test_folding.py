"""fold_batchnorm_: a network without its norms computes what it did with them, or keeps those it has to keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from testbed.torchvision_import import import_torchvision
from tests.networks import same, small_resnet, snapshot
from tests.strategies import convolutions, fill_, low_rank, randn, seeds, small_convolutions
from torchsmooth import fold_batchnorm_, svd_compress_
from torchsmooth._derive import derive
from torchsmooth._execution import derived_of, use_
from torchsmooth._layers import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def filled_norm(channels, axes, seed, **options):
    """A norm with statistics far from those of a new one; a scale may be negative, or zero."""
    norm = fill_(_NORMS[axes](channels, dtype=torch.float64, **options), seed)
    norm.running_mean.copy_(randn(channels, seed=seed + 1))
    norm.running_var.copy_(randn(channels, seed=seed + 2).square() * 4)
    if norm.affine:
        norm.weight.data[0] = 0.0
    return norm


def normed(values, norm):
    """What a norm does, in float64, spelled out."""
    shape = (-1, *[1] * (values.dim() - 2))
    mean, variance = norm.running_mean.reshape(shape), norm.running_var.reshape(shape)
    scaled = (values - mean) / (variance + norm.eps).sqrt()
    return scaled * norm.weight.reshape(shape) + norm.bias.reshape(shape) if norm.affine else scaled


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def close(one, other, tolerance=1e-9):
    return bool(((one - other).abs() <= tolerance * (1 + other.abs().max())).all())


def check_folds(layer, inputs, seed, **options):
    out_channels = run(layer, inputs).shape[1]
    norm = filled_norm(out_channels, inputs.dim() - 2, seed, **options)
    expected = normed(run(layer, inputs), norm)
    model = nn.Sequential(layer, norm).eval()
    before = snapshot(layer)
    report = torchsmooth.fold_batchnorm_(model)
    assert (report.folded, report.left) == ({"1": "0"}, {})
    assert type(model[1]) is nn.Identity
    assert type(model[0]) is type(layer)
    assert close(run(model, inputs), expected)
    assert same(snapshot(layer), before)  # the layer itself, which someone else may hold


@given(convolutions(), seeds, st.booleans())
@settings(max_examples=25)
def test_a_dense_convolution_takes_over_its_norm(case, seed, affine):
    dense, inputs = case
    check_folds(dense, inputs, seed, affine=affine)


@given(convolutions(), seeds, st.data())
@settings(max_examples=40)
def test_a_low_rank_convolution_does_in_every_scheme_and_form(case, seed, data):
    dense, inputs = case
    check_folds(low_rank(dense, data), inputs, seed)


@pytest.mark.parametrize("axes", [1, 3])
@given(data=st.data(), seed=seeds)
@settings(max_examples=10)
def test_other_convolutions_do_too(axes, data, seed):
    dense, inputs = data.draw(small_convolutions(axes, transposed=False))
    layer = KINDS[type(dense)].like(dense, 1, "channel", "factored")
    layer.truncate_(dense.weight)
    check_folds(dense, inputs, seed)
    check_folds(layer.eval(), inputs, seed)


def test_a_compressed_resnet_has_no_norm_left_and_can_be_tuned():
    model = small_resnet().double()
    for number, norm in enumerate(one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.copy_(randn(norm.num_features, seed=number))
    torchsmooth.svd_compress_(model, 0.5, progress=False)
    images = randn(2, 3, 32, 32, seed=1)
    torchsmooth.tune_(model, images, progress=False)
    expected = run(model, images)
    report = torchsmooth.fold_batchnorm_(model)
    assert len(report.folded) == 20
    assert report.left == {}
    assert report.folded["layers.2.short.1"] == "layers.2.short.0"
    assert not any(isinstance(one, nn.BatchNorm2d) for one in model.modules())
    assert close(run(model, images), expected, 1e-7)
    torchsmooth.tune_(model, images, progress=False)
    assert close(run(model, images), expected, 1e-7)
    model.load_state_dict(copy.deepcopy(model).state_dict())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_compute_the_same(name):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).double().eval()
    for number, norm in enumerate(one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.copy_(randn(norm.num_features, seed=number) / 10)
        norm.running_var.copy_(1 + randn(norm.num_features, seed=number).square())
    images = randn(1, 3, 64, 64, seed=1)
    expected = run(model, images)
    report = torchsmooth.fold_batchnorm_(model)
    assert len(report.folded) > 15
    assert close(run(model, images), expected)
    assert bool(report.left) == (name == "densenet121")  # most of its norms come before the convolution


class Branches(nn.Module):
    """A norm for each reason not to fold it."""

    def __init__(self):
        super().__init__()
        for name in ("alone", "seen", "twice", "reused", "linear_like"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        for name in ("alone_norm", "seen_norm", "first", "second", "reused_norm", "late", "idle", "pooled"):
            setattr(self, name, nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.alone_norm(self.alone(x))
        y = self.seen(x)
        x = self.seen_norm(y) + y
        x = self.second(self.twice(self.first(self.twice(x))))
        x = self.reused_norm(self.reused(self.reused_norm(x)))
        x = self.late(F.relu(x))
        return self.pooled(self.linear_like(x).relu())


def test_a_norm_that_others_depend_on_stays_and_the_report_says_why():
    model = fill_(Branches(), 0).double().eval()
    for number, norm in enumerate(one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.copy_(randn(4, seed=number))
    images = randn(2, 4, 5, 5, seed=1)
    expected = run(model, images)
    report = torchsmooth.fold_batchnorm_(model)
    assert report.folded == {"alone_norm": "alone"}
    assert report.left == {
        "seen_norm": "the output of 'seen' goes to others as well",
        "first": "'twice', which feeds it, is called more than once",
        "second": "'twice', which feeds it, is called more than once",
        "reused_norm": "it is called more than once",
        "late": "its input does not come from a layer",
        "pooled": "its input does not come from a layer",
        "idle": "it is never called",
    }
    assert close(run(model, images), expected)
    assert "alone_norm   alone" in str(report)
    assert "left: it is never called" in str(report)


def pair(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **options)).eval()


def test_layers_with_something_of_their_own_stay():
    hooked, pruned, parametrised = pair(), pair(), pair()
    hooked[1].register_forward_hook(lambda *_: None)
    nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(parametrised[0])
    tied, broken, linear = pair(), pair(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    other = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(4)).eval()
    tied.append(nn.Conv2d(4, 4, 1))
    tied[2].weight = tied[0].weight
    broken[1].running_mean[0] = torch.inf
    for model, reason in (
        (hooked, "'0' or the norm has hooks"),
        (pruned, "'0' or the norm has hooks"),
        (parametrised, "'0', which feeds it, is no plain convolution, but a ParametrizedConv2d"),
        (tied, "'0' or the norm is in the model more than once, or shares its weight"),
        (broken, "a value is NaN or infinite"),
        (other, "it has 4 features, and '0', which feeds it, 6 channels"),
        (linear, "'0', which feeds it, is no plain convolution, but a Linear"),
    ):
        before = snapshot(model)
        assert torchsmooth.fold_batchnorm_(model).left == {"1": reason}
        assert same(snapshot(model), before)


class Reads(nn.Module):
    """Uses a weight beside the layer that it belongs to, and one of a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other, self.last = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x):
        return self.last(self.other(self.norm(self.conv(x)))) * self.conv.weight.sum() + self.last.weight.sum()


def test_values_that_are_read_elsewhere_stay():
    model = fill_(Reads(), 0).eval()
    report = torchsmooth.fold_batchnorm_(model)
    assert report.folded == {}
    assert set(report.left.values()) == {"a value of it, or of the layer that feeds it, is used elsewhere"}
    assert report.left.keys() == {"norm", "last"}


class Scaled(nn.Module):
    """Has a value of its own, and a norm that no layer feeds."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x * self.scale)


def test_a_value_of_the_model_itself_is_not_taken_for_one_of_a_layer():
    report = torchsmooth.fold_batchnorm_(Scaled().eval())
    assert report.left == {"norm": "its input does not come from a layer"}


class Turns(nn.Module):
    """Does what a symbolic trace cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_pairs_are_folded_without_a_trace():
    model = fill_(Turns(), 0).eval()
    model.norm.running_mean.fill_(0.5)
    images = randn(1, 4, 3, 3, seed=0).abs().float()
    expected = run(model, images)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^Turns cannot be traced .* \(TraceError: .*\)\. Name each .*'conv1', 'bn1'"):
        torchsmooth.fold_batchnorm_(model)
    assert same(snapshot(model), before)
    report = torchsmooth.fold_batchnorm_(model, pairs=[("conv", "norm")])
    assert report.folded == {"norm": "conv"}
    assert close(run(model, images), expected, 1e-5)


def test_bad_arguments_are_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    before = snapshot(model)
    fold = torchsmooth.fold_batchnorm_
    for pairs, kind, message in (
        ("ab", TypeError, r"^pairs must be an iterable of pairs of names, .* got str 'ab'"),
        (3, TypeError, r"^pairs must be an iterable of pairs"),
        (["ab"], TypeError, r"^pairs must hold pairs of names, .* got str 'ab'"),
        ([("0",)], TypeError, r"^pairs must hold pairs of names"),
        ([("0", "9")], ValueError, r"^pairs names '9', and this Sequential has no such module"),
        ([("0", "2")], ValueError, r"^pairs names '2' as the norm of '0', and it is a ReLU, no BatchNorm"),
        ([("0", "1"), ("0", "3")], ValueError, r"^pairs names '3' or '0' more than once"),
        ([("0", "1"), ("2", "3")], ValueError, r"^'3' cannot be folded into '2': '2', which feeds it, is no plain"),
    ):
        with pytest.raises(kind, match=message):
            fold(model, pairs=pairs)
        assert same(snapshot(model), dict(before))
    with pytest.raises(ValueError, match=r"^BatchNorm layers '1', '3' are in training mode, .* call model.eval\(\)"):
        fold(model.train())
    with pytest.raises(ValueError, match=r"^this ReLU has no BatchNorm layer with running statistics to fold"):
        fold(nn.ReLU().eval())
    with pytest.raises(TypeError, match=r"^model must be"):
        fold("model")


class InAList(nn.Module):
    """Runs what it keeps in a plain list, which is not told when a child is replaced."""

    def __init__(self, attribute="conv"):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.stages = [getattr(self, attribute)]

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("attribute", ["conv", "norm"])
def test_what_a_plain_attribute_holds_stays(attribute):
    model = fill_(InAList(attribute), 0).eval()
    before = snapshot(model)
    report = torchsmooth.fold_batchnorm_(model)
    assert report.folded == {}
    assert "plain attribute stages" in report.left["norm"]
    with pytest.raises(ValueError, match="plain attribute stages"):
        torchsmooth.fold_batchnorm_(model, pairs=[("conv", "norm")])
    assert same(snapshot(model), before)


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_frozen_network_stays_frozen(low_rank):
    model = fill_(nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)), 0).eval()
    if low_rank:
        svd_compress_(model, 0.5)
    fold_batchnorm_(model.requires_grad_(False))
    assert isinstance(model[1], nn.Identity)
    assert not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_out_of_range_becomes_the_largest_of_the_dtype(sign):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model.half()
    with torch.no_grad():
        model[1].running_var.fill_(0).add_(1e-4)
        model[1].running_mean.fill_(-6e4 * sign)
    fold_batchnorm_(model)
    assert model[0].bias.tolist() == [sign * torch.finfo(torch.float16).max] * 4


def test_weights_out_of_range_become_the_largest_of_the_dtype():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False)).half().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e4, -1e4], [1.0, -1.0]]).reshape(2, 2, 1, 1))
        model[1].running_var.fill_(1e-4)
    fold_batchnorm_(model)
    most = torch.finfo(torch.float16).max
    assert model[0].weight[0].flatten().tolist() == [most, -most]
    assert bool(model[0].weight.isfinite().all())


def test_what_was_derived_before_folding_is_given_up():

    model = fill_(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), 0).eval()
    svd_compress_(model, 0.5)
    use_(model[0], derive(model[0], "dense", torch.zeros(1, 16, 5, 5)))
    fold_batchnorm_(model)
    assert derived_of(model[0]) is None
