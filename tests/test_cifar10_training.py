"""How the CIFAR-10 benchmark trains: recipes, penalties by name, and going on after an interruption."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchsmooth
from testbed.cifar_networks import ARCHITECTURES
from testbed.vision_transformer import VisionTransformer
from tests.cifar10_benchmark import benchmark, random_splits, small_run
from tests.networks import small_resnet
from tests.strategies import fill_

candidates = benchmark("cifar10_candidates")
recipes = benchmark("cifar10_recipes")
training = benchmark("cifar10_training")

Candidate, Recipe = candidates.Candidate, recipes.Recipe
STEPS_PER_EPOCH = 2  # 20 images in batches of 8: four wait for the next epoch


class Recorder:
    """A watcher that keeps what it is told, and interrupts after a step or an epoch."""

    def __init__(self, step=None, epoch=None):
        self.steps, self.epochs = [], []
        self._step, self._epoch = step, epoch

    def step(self, done):
        self.steps.append(done)
        if done == self._step:
            raise KeyboardInterrupt

    def epoch(self, epoch):
        self.epochs.append(epoch)
        if epoch.number == self._epoch:
            raise KeyboardInterrupt


def tail(_):
    return torchsmooth.RankTail(0.7, 0.5, replan_every=2, refresh_every=1)


def states_equal(one, other):
    values = other.state_dict()
    return one.state_dict().keys() == values.keys() and all(
        torch.equal(value, values[name]) for name, value in one.state_dict().items()
    )


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "changes",
    [
        {"penalty": "nuclear", "strength": 0.1, "recipe": "adamw,batch_size=8", "dtype": "bfloat16"},
        {"penalty": "tail_70", "strength": 0.5},
    ],
    ids=lambda changes: changes["penalty"],
)
def test_an_interrupted_training_ends_where_one_without_a_break_does(changes, tmp_path, monkeypatch):
    if "tail" in changes["penalty"]:
        monkeypatch.setattr(Candidate, "make", tail)  # plans, and decomposes, between any two epochs
    run, splits, state = small_run(**changes), random_splits(), torch.get_rng_state()
    whole = Recorder()
    expected = training.train(run, splits, tmp_path / "whole", 0.7, whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.steps == [0, 1, 2, 3, 4, 5, 6]

    folder = tmp_path / "broken"
    told = [Recorder(step=1), Recorder(epoch=1), Recorder(step=5), Recorder()]
    for recorder in told[:-1]:
        torch.manual_seed(99)  # must not matter
        with pytest.raises(KeyboardInterrupt):
            training.train(run, splits, folder, 0.7, recorder)
    result = training.train(run, splits, folder, 0.7, told[-1])
    # Lost: the one step of the first epoch, nothing, and the one step of the third.
    assert [one.steps for one in told] == [[0, 1], [0, 1, 2], [2, 3, 4, 5], [4, 5, 6]]
    assert [epoch for one in told for epoch in one.epochs] == whole.epochs
    assert states_equal(result, expected)
    assert not result.training
    assert not torchsmooth.is_penalized(result)
    assert [path.name for path in folder.iterdir()] == [f"{run.name}.pt"]  # no checkpoint stays behind


def test_a_trained_network_is_loaded_and_not_trained_again(tmp_path):
    run, splits, recorder = small_run(epochs=1), random_splits(), Recorder()
    first = training.train(run, splits, tmp_path, 0.7, Recorder())
    second = training.train(run, splits, tmp_path, 0.7, recorder)
    assert (recorder.steps, recorder.epochs) == ([], [])
    assert states_equal(first, second)
    assert states_equal(first, training.load_trained(run, tmp_path))
    assert not second.training


def test_seed_and_penalty_and_dtype_make_another_network(tmp_path):
    changes = [{}, {"seed": 1}, {"penalty": "first", "strength": 1.0}, {"dtype": "bfloat16"}]
    runs = [small_run(epochs=1, **one) for one in changes]
    weights = [training.train(run, random_splits(), tmp_path, 0.7, Recorder()).conv1.weight for run in runs]
    assert len({run.name for run in runs}) == len(runs)
    for place, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:place])


def test_without_a_terminal_there_is_a_line_for_each_epoch(tmp_path, capsys):
    run = small_run(epochs=2, penalty="second", strength=0.5)
    training.train(run, random_splits(), tmp_path, 0.7)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{run.name}: epoch {number}/2: loss ") for number, line in enumerate(lines, 1)] == [
        True
    ] * 2
    assert all(word in lines[1] for word in ("held out", "penalty", "error at −70 %"))


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 128 images.*got 20"):
        training.train(small_run(recipe="sgd"), random_splits(), tmp_path, 0.7)


# ------------------------------------------------------------------------------------------------- what an epoch tells


@pytest.mark.parametrize(
    ("make", "ratio"), [(small_resnet, 0.5), (small_resnet, 0.9), (lambda: fill_(VisionTransformer(12), 0), 0.5)]
)
def test_the_expected_error_is_that_of_the_compressed_weights(make, ratio):
    model = make()
    small = copy.deepcopy(model)
    torchsmooth.svd_compress_(small, ratio, progress=False)
    torchsmooth.restore_dense_(small)
    pairs = [
        (layer.weight.detach().double(), other.weight.detach().double())
        for layer, other in zip(model.modules(), small.modules(), strict=True)
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    cut = sum(float((one - other).square().sum()) for one, other in pairs)
    whole = sum(float(one.square().sum()) for one, _ in pairs)
    # A pair of ranks of scheme "tucker" turns out a little better than it is planned.
    assert 0.9999 * math.sqrt(cut / whole) < training.expected_error(model, ratio) < 1.005 * math.sqrt(cut / whole)


def test_a_ratio_out_of_reach_has_no_expected_error():
    assert math.isnan(training.expected_error(small_resnet(width=4), 0.999))


@pytest.mark.parametrize(("penalty", "strength"), [("plain", 0.0), ("first", 0.3), ("tail_70", 0.3)])
def test_the_penalty_that_is_told_is_the_one_on_the_weights(penalty, strength, tmp_path):
    recorder = Recorder()
    run = small_run(epochs=1, penalty=penalty, strength=strength)
    model = training.train(run, random_splits(), tmp_path, 0.7, recorder)
    weights = [layer.weight.detach() for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    norm = sum(float(weight.square().sum()) for weight in weights)
    (epoch,) = recorder.epochs
    expected = {
        "plain": 0.0,
        "first": strength * sum(float(torchsmooth.functional.first_derivative(weight)) for weight in weights),
        "tail_70": strength / 2 * epoch.expected**2 * norm,
    }
    assert epoch.penalty == pytest.approx(expected[penalty], rel=1e-4)
    assert 0 < epoch.expected < 1
    assert epoch.held_out in [100 * right / 8 for right in range(9)]


# ------------------------------------------------------------------------------------------------ recipes and penalties


def test_a_recipe_can_be_changed_by_name():
    assert Recipe.of("sgd") == recipes.RECIPES["sgd"]
    changed = Recipe.of("sgd,batch_size=512,peak_rate=0.4,label_smoothing=0.1")
    assert (changed.batch_size, changed.peak_rate, changed.label_smoothing) == (512, 0.4, 0.1)
    assert changed.weight_decay == recipes.RECIPES["sgd"].weight_decay


NO_RECIPES = ["adam", "", "sgd,momentum=0.5", "sgd,optimizer=adamw", "sgd,peak_rate", "sgd,"]


@pytest.mark.parametrize("spec", [*NO_RECIPES, "sgd,batch_size=0", "adamw,batch_size=-1"])
def test_a_recipe_that_is_none_is_refused(spec):
    with pytest.raises(ValueError, match="recipe|could not convert"):
        Recipe.of(spec)


@pytest.mark.parametrize("recipe", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["resnet18", "vit_small"])
def test_only_the_weights_of_layers_decay(network, recipe):
    model = ARCHITECTURES[network].make(12)
    decay = {
        id(parameter): group["weight_decay"]
        for group in Recipe.of(recipe).make_optimizer(model).param_groups
        for parameter in group["params"]
    }
    weights = {id(layer.weight) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert decay.keys() == {id(parameter) for parameter in model.parameters()}
    assert {key for key, value in decay.items() if value > 0} == weights


def test_the_learning_rate_rises_to_its_peak_and_falls():
    recipe = Recipe.of("sgd,peak_rate=0.3,warm_up=0.25")
    optimizer = recipe.make_optimizer(nn.Linear(2, 2))
    schedule, rates = recipe.make_schedule(optimizer, 40), []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(rates) < 40 else None
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3)
    assert peak == 9  # the last of the first quarter
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


def test_penalties_go_by_their_names():
    made = {name: Candidate(name, 0.25).make() for name in candidates.PENALTIES}
    assert made == {
        "plain": None,
        "nuclear": torchsmooth.NuclearNorm(0.25),
        "first": torchsmooth.FirstDerivative(0.25),
        "second": torchsmooth.SecondDerivative(0.25),
        "tail_70": torchsmooth.RankTail(0.7, 0.25),
        "tail_90": torchsmooth.RankTail(0.9, 0.25),
    }
    assert candidates.expanded(["tail", "plain", "tail_70", "tail_85"]) == ["tail_70", "tail_90", "plain", "tail_85"]


@pytest.mark.parametrize("name", ["tail_00", "tail_7", "tail_100", "tails", "none", ""])
def test_an_unknown_penalty_is_refused(name):
    with pytest.raises(ValueError, match="a penalty is one of plain"):
        candidates.expanded([name])


def test_only_tails_are_ramped_up():
    schedules = {name: Candidate(name, 0.1).schedule(100) for name in candidates.PENALTIES}
    assert [name for name, one in schedules.items() if one is not None] == ["tail_70", "tail_90"]
    assert [schedules["tail_70"](step) for step in (0, 14, 45, 75, 99)] == [0.0, 0.0, pytest.approx(0.5), 1.0, 1.0]


@given(st.sampled_from([*candidates.PENALTIES, "tail_50", "tail_80", "tail_95"]))
def test_every_penalty_has_strengths_to_try(penalty):
    grid = list(candidates.strengths(penalty))
    assert grid == sorted(set(grid))
    assert candidates.usual_strength(penalty) in grid
    assert (grid == [0.0]) == (penalty == "plain")
