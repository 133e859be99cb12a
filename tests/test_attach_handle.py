"""The handle of ``attach_``: undoing, checkpoints, copies, lifetimes, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations

from tests.networks import Tied, snapshot
from tests.training import assert_same_parameters, double_layers, sgd, smoothed, squares, trained
from torchsmooth import (
    Constrained,
    FirstDerivative,
    NuclearNorm,
    NuclearRatio,
    RankTail,
    StrengthSchedule,
    attach_,
    penalty_loss,
    remove_penalties,
    smooth_,
    svd_compress_,
)
from torchsmooth.penalties import Penalty

CONSTRAINT = Constrained(NuclearNorm(), bound=0.5, strength=0.1)


def take(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        squares(model, step).backward()
        optimizer.step()


def plain(steps=2):
    """The parameters after some steps without any penalty."""
    return trained(remove_penalties(double_layers()), attach=False, steps=steps)


def attached(*penalties, **options):
    model = double_layers(0, *penalties)
    optimizer = sgd(model.parameters())
    return model, optimizer, attach_(optimizer, model, **options)


def test_removed_handle_adds_nothing_and_can_be_removed_again():
    model, optimizer, handle = attached()
    attributes = set(vars(optimizer))
    handle.remove()
    handle.remove()
    take(model, optimizer, range(2))
    assert_same_parameters(model, plain(), rtol=0.0, atol=0.0)
    assert handle.step == 0
    assert set(vars(optimizer)) == attributes


def test_attached_again_after_removing_counts_once():
    model, optimizer, handle = attached()
    take(model, optimizer, range(2))
    handle.remove()
    again = attach_(optimizer, model)
    handle.remove()  # of the first, which is gone: the second stays
    take(model, optimizer, range(2, 4))
    assert again.step == 2
    assert_same_parameters(model, trained(double_layers(), attach=True))


@pytest.mark.parametrize(
    "again", [lambda model: model, lambda model: model[0], lambda model: torch.compile(model, backend="eager")]
)
def test_attaching_twice_is_refused(again):
    model, optimizer, _ = attached()
    with pytest.raises(ValueError, match=r"attached to this SGD already, .* would count twice: call remove\(\)"):
        attach_(optimizer, again(model))
    take(model, optimizer, range(2))
    assert_same_parameters(model, trained(double_layers(), attach=True, steps=2), rtol=0.0, atol=0.0)


def test_a_tied_weight_cannot_be_attached_in_two_parts():
    model = smooth_(Tied(), NuclearNorm(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model.embedding)
    attach_(optimizer, model.body)
    message = r"'weight' of this Linear is tied to 'weight' of the Embedding that is attached to this SGD already"
    with pytest.raises(ValueError, match=message):
        attach_(optimizer, model.head)
    smooth_(remove_penalties(model.head), FirstDerivative(0.1))  # another penalty on the weight is one more
    expected = torch.autograd.grad(penalty_loss(model), model.head.weight)
    attach_(optimizer, model.head)
    optimizer.step()
    torch.testing.assert_close((model.head.weight.grad,), expected)


def test_two_models_that_share_a_part_can_have_an_optimizer_each():
    backbone = double_layers()
    for head in (nn.Linear(4, 2), nn.Linear(4, 3)):
        attach_(sgd(backbone.parameters()), nn.Sequential(backbone, head))


@pytest.mark.parametrize("penalty", [NuclearNorm(0.1), CONSTRAINT])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_whose_closure_fails_leaves_no_trace(penalty, late):
    def fail(model):
        if not late:
            raise RuntimeError("boom")
        with torch.no_grad():  # found when the first layer has been evaluated
            model[2].weight[0, 0] = torch.nan

    found = []
    for failures in (0, 2):
        model, optimizer, handle = attached(penalty)
        take(model, optimizer, range(1))
        kept = copy.deepcopy(model.state_dict())
        for _ in range(failures):
            with pytest.raises((RuntimeError, ValueError), match="boom|NaN or infinite"):
                optimizer.step(lambda model=model: fail(model))
            model.load_state_dict(kept)
            optimizer.zero_grad()
        take(model, optimizer, range(1, 3))
        assert handle.step == 3
        found.append(model)
    assert_same_parameters(*found, rtol=0.0, atol=0.0)


def test_parts_of_a_model_can_be_attached_apart():
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model[0], schedule=lambda step: 1.0)
    attach_(optimizer, model[2])
    take(model, optimizer, range(4))
    assert_same_parameters(model, trained(double_layers(), attach=False))


def test_state_dicts_of_model_and_optimizer_keep_their_keys():
    model, optimizer, _ = attached(CONSTRAINT, FirstDerivative(0.1))
    bare = double_layers()
    other = sgd(bare.parameters())
    for one, its in ((model, optimizer), (bare, other)):
        take(one, its, range(2))
    assert list(model.state_dict()) == list(bare.state_dict())
    assert optimizer.state_dict().keys() == other.state_dict().keys()
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert [*map(list, optimizer.state_dict()["state"].values())] == [*map(list, other.state_dict()["state"].values())]
    assert repr(optimizer) == repr(other)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def in_parallel(model):
    return nn.parallel.DistributedDataParallel(model)


TAIL = RankTail(0.5, 0.05, replan_every=4, refresh_every=2)


@pytest.mark.parametrize("penalties", [(), (CONSTRAINT,), (CONSTRAINT, NuclearRatio(0.2)), (TAIL,)])
@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager"), in_parallel, nn.DataParallel]
)
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(penalties, wrap, one_process):
    options = {"every": 2, "schedule": StrengthSchedule(8)}
    through, optimizer, handle = attached(*penalties, **options)
    take(through, optimizer, range(8))
    assert handle.step == 8

    first, optimizer, handle = attached(*penalties, **options)
    take(first, optimizer, range(3))
    states = through_a_file([first.state_dict(), optimizer.state_dict(), handle.state_dict()])

    second = double_layers(1, *penalties)
    optimizer = sgd(second.parameters())
    # The names in the state are those of the model inside.
    handle = attach_(optimizer, wrap(second), **options)
    for one, state in zip((second, optimizer, handle), states, strict=True):
        one.load_state_dict(state)
    take(second, optimizer, range(3, 8))
    assert_same_parameters(second, through, rtol=0.0, atol=0.0)


def test_state_is_of_its_time():
    model, optimizer, handle = attached(CONSTRAINT)
    take(model, optimizer, range(2))
    state = handle.state_dict()
    kept = through_a_file(state)
    take(model, optimizer, range(2, 5))
    ours, theirs = (one["adaptive"][repr(CONSTRAINT)]["multipliers"] for one in (state, kept))
    assert (state["step"], kept["step"], handle.step) == (2, 2, 5)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    handle.load_state_dict(state)
    take(model, optimizer, range(1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"with the adaptive penalties Constrained.* returns, got dict {}"),
        (None, "got None"),
        ({"step": 3}, "got dict"),
        ({"step": 3, "adaptive": {}}, r"got that of one with no adaptive penalties"),
        ({"step": 3, "adaptive": {"RankTail": {}}}, r"got that of one with the adaptive penalties RankTail"),
        ({"step": "3", "adaptive": {repr(CONSTRAINT): {}}}, "got that of one with"),
        (
            {
                "step": 3,
                "adaptive": {repr(CONSTRAINT): {"multipliers": {"9.weight": 1.0}, "bounds": {"9.weight": 1.0}}},
            },
            "another model: '9.weight' carry no such penalty",
        ),
        ({"step": 3, "adaptive": {repr(CONSTRAINT): {}}}, "Constrained.* lacks 'multipliers'"),
    ],
)
def test_wrong_state_is_refused_and_changes_nothing(state, message):
    model, optimizer, handle = attached(CONSTRAINT)
    take(model, optimizer, range(2))
    before = pickle.dumps(handle.state_dict())
    with pytest.raises(ValueError, match=message):
        handle.load_state_dict(state)
    assert pickle.dumps(handle.state_dict()) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_are_unattached_as_they_have_no_hooks(duplicate):
    model, optimizer, handle = attached()
    twin, its_optimizer = duplicate((model, optimizer))
    take(twin, its_optimizer, range(2))
    assert handle.step == 0
    assert_same_parameters(twin, plain(), rtol=0.0, atol=0.0)

    twin, its_optimizer = duplicate((model, optimizer))
    attach_(its_optimizer, twin)  # no "already": the copy does not think that it is attached
    take(twin, its_optimizer, range(2))
    assert_same_parameters(twin, trained(double_layers(), attach=True, steps=2), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_handle_refuses_to_be_copied(duplicate):
    _, _, handle = attached()
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*attach_\(optimizer, model\) for the copies"):
        duplicate(handle)


def test_copy_of_a_model_leaves_the_original_attached():
    model, optimizer, _ = attached()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    take(model, optimizer, range(2))
    averaged.update_parameters(model)
    assert_same_parameters(model, trained(double_layers(), attach=True, steps=2), rtol=0.0, atol=0.0)


def test_handle_need_not_be_kept():
    model, optimizer, handle = attached()
    alive = weakref.ref(handle)
    del handle
    gc.collect()
    take(model, optimizer, range(2))
    assert_same_parameters(model, trained(double_layers(), attach=True, steps=2), rtol=0.0, atol=0.0)
    assert alive() is not None
    remains = [weakref.ref(model), weakref.ref(optimizer), alive]
    del model, optimizer
    gc.collect()
    assert [one() for one in remains] == [None] * 3


def test_removed_handle_lets_the_model_go():
    model, optimizer, handle = attached()
    handle.remove()
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None
    assert optimizer.param_groups


def test_repr_says_what_was_asked_for():
    schedule = StrengthSchedule(5)
    _, _, handle = attached(every=3, schedule=schedule)
    assert repr(handle) == f"PenaltyHandle(SGD, every=3, schedule={schedule}, step=0)"
    assert repr(attached()[2]) == "PenaltyHandle(SGD, every=1, step=0)"


def test_adaptation_is_found_by_an_equal_penalty():
    _, _, handle = attached(TAIL)
    assert handle.adaptation(copy.deepcopy(TAIL)).plan is not None
    with pytest.raises(ValueError, match=r"RankTail.*ratio=0.9.* is not among .* it has .*RankTail.*ratio=0.5"):
        handle.adaptation(RankTail(0.9))


def test_adaptive_penalties_may_come_and_go():
    model, optimizer, handle = attached(TAIL, FirstDerivative(0.1))
    take(model, optimizer, range(1))
    remove_penalties(model)
    take(model, optimizer, range(1, 9))  # a plan would be due
    assert handle.state_dict()["adaptive"] == {}
    smooth_(model, CONSTRAINT)
    take(model, optimizer, range(9, 10))
    assert list(handle.state_dict()["adaptive"]) == [repr(CONSTRAINT)]


def test_a_removed_handle_can_still_be_asked():
    model, optimizer, handle = attached(CONSTRAINT, TAIL)
    take(model, optimizer, range(3))
    plan = handle.adaptation(TAIL).plan
    handle.remove()
    before = pickle.dumps(handle.state_dict())
    smooth_(model, RankTail(0.4))
    assert handle.adaptation(TAIL).plan is plan
    smooth_(model, TAIL)
    assert pickle.dumps(handle.state_dict()) == before


MODEL = double_layers()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "optimizer must be a torch.optim.Optimizer, got str 'sgd'", ("sgd", MODEL), {}),
        (TypeError, "optimizer must be a torch.optim.Optimizer, got Sequential", (MODEL, None), {}),
        (TypeError, "model must be a torch.nn.Module, got None", (None,), {}),
        (TypeError, "every must be an integer, got float 2.0", (MODEL,), {"every": 2.0}),
        (TypeError, "every must be an integer, got bool True", (MODEL,), {"every": True}),
        (ValueError, "every must be at least 1 .* got 0", (MODEL,), {"every": 0}),
        (ValueError, "every must be at least 1 .* got -3", (MODEL,), {"every": -3}),
        (TypeError, "schedule must be a function of the step, got float 0.5", (MODEL,), {"schedule": 0.5}),
        (ValueError, "no penalty is registered in this Linear: call smooth_", (nn.Linear(3, 2),), {}),
        (ValueError, "none of the tensors .* Sequential .* of this SGD .*'0.weight'", (double_layers(),), {}),
        (
            ValueError,
            "none of the tensors .* parameters of this SGD",
            (smoothed(parametrizations.weight_norm(nn.Linear(3, 2))),),
            {},
        ),
        (ValueError, "nothing to compress", (smooth_(nn.Sequential(nn.Linear(9, 1)), RankTail(0.5)),), {}),
    ],
)
def test_wrong_argument_is_named_and_changes_nothing(error, message, arguments, options):
    optimizer = sgd(MODEL.parameters())
    if message == "nothing to compress":
        optimizer.add_param_group({"params": arguments[0].parameters()})
    before, model = set(vars(optimizer)), snapshot(MODEL)
    with pytest.raises(error, match=message):
        attach_(*(arguments if len(arguments) == 2 else (optimizer, *arguments)), **options)
    assert set(vars(optimizer)) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert snapshot(MODEL)["hooks"] == model["hooks"]


def test_every_and_schedule_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        attach_(sgd(MODEL.parameters()), MODEL, 2)


def test_strength_of_zero_is_a_penalty_that_adds_nothing():
    # A sweep over strengths may begin at zero.
    model, optimizer, _ = attached(NuclearNorm(0.0), Constrained(NuclearRatio(), strength=0.0))
    take(model, optimizer, range(2))
    assert_same_parameters(model, plain(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("error", "message", "value"),
    [
        (ValueError, r"schedule\(1\) must be ≥ 0, got -0.5: a negative factor", -0.5),
        (ValueError, r"schedule\(1\) must be finite, got nan", float("nan")),
        (TypeError, r"schedule\(1\) must be a real number, got None", None),
        (TypeError, r"schedule\(1\) must be a real number, got str '1.0'", "1.0"),
    ],
)
def test_wrong_value_of_a_schedule_is_named_before_anything_is_added(error, message, value):
    model, optimizer, handle = attached(schedule=lambda step: 1.0 if step != 1 else value)
    take(model, optimizer, range(1))
    optimizer.zero_grad()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert handle.step == 1


@pytest.mark.parametrize("penalty", [NuclearNorm(0.1), NuclearRatio(0.1), CONSTRAINT])
@pytest.mark.parametrize("closure", [False, True])
def test_weight_of_nan_is_named_at_the_step_and_nothing_moves(penalty, closure):
    model, optimizer, handle = attached(penalty)
    take(model, optimizer, range(1))
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before, state = copy.deepcopy(model.state_dict()), handle.state_dict()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"on tensor 'weight' of '2' \(Linear\): .* NaN or infinite"):
        optimizer.step((lambda: None) if closure else None)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0.0, atol=0.0)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert handle.step == 1
    # Back on good weights, training goes on.
    model.load_state_dict(good)
    handle.load_state_dict(state)
    take(model, optimizer, range(1, 3))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("penalty", [NuclearNorm(0.1), RankTail(0.5, 0.1)])
def test_an_optimizer_made_before_compressing_is_told_of(penalty):
    model, optimizer, _ = attached(penalty)
    take(model, optimizer, range(1))
    svd_compress_(model, 0.3)
    optimizer.zero_grad()
    with pytest.warns(
        UserWarning, match=r"parameters of this Sequential are not in this SGD \(the first is '[\w.]+'\)"
    ):
        optimizer.step()
    optimizer.step()  # once is enough


def test_penalties_that_were_taken_off_are_nothing_to_warn_of():
    model, optimizer, _ = attached()
    take(model, optimizer, range(1))
    remove_penalties(model)
    take(model, optimizer, range(1, 2))


@pytest.mark.parametrize("removed", [0, 2])
@pytest.mark.parametrize("thawed", [False, True])
def test_parameters_of_another_optimizer_are_nothing_to_warn_of(removed, thawed):
    model = double_layers()
    model[2].bias.requires_grad_(not thawed)
    optimizers = [sgd(model[0].parameters()), sgd([model[2].weight])]
    for optimizer in optimizers:
        attach_(optimizer, model)
    remove_penalties(model[removed])
    model.requires_grad_()
    squares(model, 0).backward()
    for optimizer in optimizers:
        optimizer.step()  # a warning is an error


def test_a_layer_replaced_under_its_name_is_told_of_by_the_optimizer_that_had_it():
    model = double_layers()
    first, second = (sgd(one.parameters()) for one in (model[0], model[2]))
    for optimizer in (first, second):
        attach_(optimizer, model)
    model[0] = nn.Linear(6, 5).double()
    second.step()
    with pytest.warns(
        UserWarning, match=r"2 trainable parameters .* not in this SGD \(the first is '0.weight'\)"
    ) as seen:
        first.step()
    assert seen[0].filename == __file__


@dataclass(frozen=True)
class Picky(Penalty):
    """A penalty of a user's own that does not take every weight."""

    strength: float = 0.1

    def __call__(self, weight, *, groups=1, transposed=False):
        if weight.shape[1] == 5:
            raise ValueError("five inputs are too many")
        return weight.square().sum()


def test_error_of_a_penalty_of_ones_own_names_the_tensor():
    _, optimizer, _ = attached(Picky())
    with pytest.raises(ValueError, match=r"Picky on tensor 'weight' of '2' \(Linear\): five inputs are too many"):
        optimizer.step()
