"""BatchNorm statistics estimated anew: the right averages, and everything else as before."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import recalibrate_batchnorm_, svd_compress_

IMAGES = randn(24, 3, 16, 16, seed=11, dtype=torch.float32)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@given(seeds, st.lists(st.integers(2, 6), min_size=1, max_size=4), st.sampled_from([0.1, 0.9, None]))
def test_statistics_become_the_averages_over_the_batches(seed, sizes, momentum):
    model = fill_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum)), seed)
    batches = [randn(size, 3, 5, 5, seed=seed + number, dtype=torch.float32) for number, size in enumerate(sizes)]
    recalibrate_batchnorm_(model, iter(batches))
    with torch.no_grad():
        outputs = [model[0](batch).double() for batch in batches]
    mean = sum(one.mean((0, 2, 3)) for one in outputs) / len(outputs)
    variance = sum(one.var((0, 2, 3)) for one in outputs) / len(outputs)
    assert torch.allclose(model[1].running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(model[1].running_var.double(), variance, rtol=1e-4)
    assert model[1].momentum == momentum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seeds, st.lists(st.tuples(st.floats(-8, 16), st.integers(1, 300)), min_size=1, max_size=3))
@settings(max_examples=8)
def test_late_batches_count_as_much_as_early_ones_in_every_dtype(dtype, seed, stretches):
    norm = nn.BatchNorm1d(3, dtype=dtype)
    means = torch.cat([torch.full((count,), mean, dtype=torch.float64) for mean, count in stretches])
    batches = (randn(len(means), 8, 3, seed=seed) + means[:, None, None]).to(dtype)
    recalibrate_batchnorm_(norm, batches.unbind())
    for buffer, averages in (
        (norm.running_mean, batches.double().mean(1)),
        (norm.running_var, batches.double().var(1)),
    ):
        # Once for each batch, and once for the average.
        rounding = torch.finfo(dtype).eps * (averages.abs().mean(0) + averages.mean(0).abs() + 1e-3)
        assert bool(((buffer.double() - averages.mean(0)).abs() <= rounding).all())


class Again(nn.Module):
    """Calls its norm several times, each time on something else."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return [self.norm(x * scale) for scale in (1, 2, 6)]


def test_a_norm_that_is_called_several_times_gets_the_average_over_its_calls():
    batches = [randn(8, 3, seed=seed, dtype=torch.float32) for seed in range(2)]
    model = recalibrate_batchnorm_(Again(), batches)
    assert torch.allclose(model.norm.running_mean, 3 * torch.stack(batches).mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("refused", [False, True])
def test_a_norm_that_counts_no_batches_is_estimated_too(refused):
    norm, expected = fill_(nn.BatchNorm2d(3), 0), fill_(nn.BatchNorm2d(3), 0)
    norm.num_batches_tracked = None
    if refused:
        with pytest.raises(ValueError, match="NaN"):
            recalibrate_batchnorm_(norm, [IMAGES, IMAGES / 0])
    else:
        recalibrate_batchnorm_(norm, [IMAGES])
        recalibrate_batchnorm_(expected, [IMAGES])
    assert norm.num_batches_tracked is None
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)


def test_one_batch_gives_eval_mode_the_outputs_of_training_mode():
    model = small_resnet(1)
    svd_compress_(model, 0.6)
    recalibrate_batchnorm_(model, [IMAGES])
    with torch.no_grad():
        evaluated = model(IMAGES)
        trained = copy.deepcopy(model).train()(IMAGES)
    # But for the running variance being the unbiased one.
    assert torch.allclose(evaluated, trained, rtol=0.1, atol=0.1 * float(trained.abs().max()))


def test_nothing_but_the_statistics_changes():
    model = small_resnet(1)
    model.layers[2].train()
    model.fc.weight.requires_grad_(False)
    dropout = nn.Dropout(0.5)
    model = nn.Sequential(model, dropout)
    model.train()
    torch.manual_seed(3)
    before, state = snapshot(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, torch.zeros(24)), 8, shuffle=True)
    assert recalibrate_batchnorm_(model, loader) is model
    after = snapshot(model)
    for key in list(after["values"]):
        if key.endswith(("running_mean", "running_var")):
            del before["values"][key], after["values"][key]
    assert same(before, after)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(one.running_mean.requires_grad for one in norms_of(model))


def test_tensors_tuples_lists_and_dictionaries_are_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_resnet(1)

        def forward(self, images):
            return self.body(images)

    results = []
    for batch in (IMAGES, (IMAGES, torch.zeros(24)), [IMAGES], {"images": IMAGES}):
        model = recalibrate_batchnorm_(Named(), [batch])
        results.append(model.body.bn1.running_mean)
    assert all(torch.equal(one, results[0]) for one in results)


def batches_with(last):
    yield IMAGES
    yield last


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (list, ValueError, "batches is empty"),
        (lambda: iter(()), ValueError, r"an iterator can be used up only once"),
        (lambda: IMAGES, TypeError, r"batches must be an iterable of inputs, such as \[inputs\] or a DataLoader"),
        (lambda: {"images": IMAGES}, TypeError, "batches must be an iterable of inputs"),
        (lambda: 3, TypeError, "batches must be an iterable of inputs, .* got int 3"),
        (lambda: batches_with("image"), TypeError, "a batch must be a tensor, a tuple or list that begins with"),
        (lambda: batches_with(()), TypeError, r"or a dict; got tuple \(\)"),
        (lambda: batches_with(IMAGES[:, :2]), RuntimeError, "channels"),
        (lambda: batches_with(IMAGES / 0), ValueError, "statistics of BatchNorm layer 'bn1' came out NaN or infinite"),
    ],
)
def test_bad_batches_are_named_and_change_nothing(batches, error, message):
    model = small_resnet(1)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate_batchnorm_(model, batches())
    assert same(before, snapshot(model))
    assert all(one.momentum == 0.1 for one in norms_of(model))


@pytest.mark.parametrize("made_there", [True, False])
def test_in_inference_mode_it_does_the_same(made_there):
    expected = recalibrate_batchnorm_(small_resnet(1), [IMAGES])
    with torch.inference_mode(made_there):
        model = small_resnet(1)
    with torch.inference_mode():
        recalibrate_batchnorm_(model, [IMAGES])
    state = expected.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_that_begins_in_place_does_not_use_the_batches_up():
    class Shifted(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(1))

    images = IMAGES.clone()
    recalibrate_batchnorm_(fill_(Shifted(nn.BatchNorm2d(3)), 0), [images])
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))])
def test_a_model_without_statistics_is_refused(make):
    with pytest.raises(ValueError, match="this Sequential has no BatchNorm layer with running statistics"):
        recalibrate_batchnorm_(make(), [IMAGES])


class Branch(nn.Module):
    """Has a branch that runs in training alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.aside = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.body(x)
        return (x, self.aside(x)) if self.training else x


def test_norms_that_no_batch_reaches_keep_their_statistics():
    model = fill_(Branch(), 0)
    images = randn(16, 3, 8, 8, seed=1, dtype=torch.float32)
    for _ in range(5):
        model(images)
    model.eval()
    aside, reached = (
        {name: one.clone() for name, one in norm.named_buffers()} for norm in (model.aside[1], model.body[1])
    )
    recalibrate_batchnorm_(model, [images * 3 + 1])
    assert all(torch.equal(one, aside[name]) for name, one in model.aside[1].named_buffers())
    assert not torch.equal(model.body[1].running_mean, reached["running_mean"])


def test_batches_that_reach_no_norm_are_refused():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.BatchNorm1d(4)})
    model.forward = model["used"].forward
    before = snapshot(model)
    with pytest.raises(ValueError, match="no batch reaches a BatchNorm layer of this ModuleDict, such as 'unused'"):
        recalibrate_batchnorm_(model, [torch.ones(2, 4)])
    assert same(snapshot(model), before)
