"""RankTail: its gradient is what the plan will cut, its plan that of svd_compress_, its state goes into checkpoints."""

from __future__ import annotations

import copy
import io
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import Tied, mlp, same, snapshot
from tests.reference import lowrank
from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    NuclearNorm,
    RankTail,
    StrengthSchedule,
    attach_,
    penalty_loss,
    plan_compression,
    rank_tail,
    remove_penalties,
    restore_dense_,
    smooth_,
    svd_compress_,
)

SCHEMES = ("channel", "input", "spatial", "tucker", "auto")
few = settings(max_examples=4)


def mixed(seed=0):
    """Convolutions, grouped and not, and linear layers."""
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, (3, 2), groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(12, 20),
        nn.Linear(20, 4),
    )
    return fill_(model, seed)


def attached(model, penalty, *, lr=1.0, **options):
    """An optimizer with the penalty, with gradients of zero: only the penalty moves anything."""
    smooth_(model, penalty)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    handle = attach_(optimizer, model, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer, handle


def weights_of(model):
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.dim() > 1}


@pytest.mark.parametrize("form", ["factored", "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
@few
@given(seed=seeds, ratio=st.sampled_from([0.3, 0.5, 0.7]))
def test_a_whole_step_leaves_exactly_what_compression_keeps(scheme, form, seed, ratio):
    model = mixed(seed).double()
    expected = copy.deepcopy(model)
    svd_compress_(expected, ratio, scheme=scheme, form=form)
    optimizer, _ = attached(model, RankTail(ratio, 1.0, scheme=scheme, form=form))
    optimizer.step()
    for name, weight in weights_of(restore_dense_(expected)).items():
        assert torch.allclose(model.get_parameter(name), weight, atol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES[:-2])
@few
@given(seed=seeds, strength=st.floats(0.1, 2))
def test_the_gradient_is_the_tail_of_the_planned_rank(scheme, seed, strength):
    model = mixed(seed).double()
    before = weights_of(model)
    penalty = RankTail(0.5, strength, scheme=scheme)
    optimizer, handle = attached(model, penalty)
    optimizer.step()
    compressed = 0
    for layer in handle.adaptation(penalty).plan:
        weight = before[f"{layer.name}.weight"]
        gradient = model.get_parameter(f"{layer.name}.weight").grad
        if layer.rank is None:
            assert not gradient.any()
            continue
        compressed += 1
        groups = getattr(model.get_submodule(layer.name), "groups", 1)
        kept = lowrank.truncated_weight(weight, layer.scheme, groups, layer.rank)
        assert torch.allclose(gradient, strength * (weight - kept), atol=1e-10)
    assert compressed


@few
@given(seeds)
def test_the_value_that_completes_a_closure_is_half_the_squared_tail(seed):
    model = mixed(seed).double()
    optimizer, handle = attached(model, RankTail(0.5, 0.3, scheme="channel"))
    plan = handle.adaptation(RankTail(0.5, 0.3, scheme="channel")).plan
    sizes = {name: float(weight.square().sum()) for name, weight in weights_of(model).items()}
    tails = [one.relative_error**2 * sizes[f"{one.name}.weight"] for one in plan]
    loss = optimizer.step(lambda: torch.zeros((), dtype=torch.float64))
    assert float(loss) == pytest.approx(0.15 * sum(tails), rel=1e-6)


def test_the_plan_is_that_of_compression():
    model = mixed()
    _, handle = attached(model, RankTail(0.6, scheme="channel", form="factored"))
    assert handle.adaptation(RankTail(0.6, scheme="channel", form="factored")).plan == plan_compression(
        model, 0.6, scheme="channel", form="factored"
    )


def test_only_layers_with_the_penalty_are_planned_and_pulled():
    model = mixed()
    penalty = RankTail(0.5, 1.0)
    smooth_(model, penalty, filter_fn=lambda _, name: name in ("0", "4"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_(optimizer, model)
    plan = handle.adaptation(penalty).plan
    assert [layer.name for layer in plan if layer.rank is not None] == ["0", "4"]
    before = weights_of(model)
    optimizer.step()
    assert {name for name, one in weights_of(model).items() if not torch.equal(one, before[name])} == {
        "0.weight",
        "4.weight",
    }


def test_what_cannot_be_compressed_is_left_alone():
    table = nn.Embedding(30, 24, max_norm=9.0)
    model = fill_(nn.Sequential(table, nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 1)), 0)
    before = weights_of(model)
    optimizer, _ = attached(model, RankTail(0.3, 1.0))
    optimizer.step()
    after = weights_of(model)
    assert [name for name in before if torch.equal(before[name], after[name])] == ["0.weight", "3.weight"]


def test_ranks_and_bases_are_renewed_when_due():
    model = mixed()
    plan, refresh = rank_tail.planned, rank_tail._Projection.refresh
    with (
        patch.object(rank_tail, "planned", side_effect=plan) as planned,
        patch.object(rank_tail._Projection, "refresh", autospec=True, side_effect=refresh) as refreshed,
    ):
        optimizer, _ = attached(model, RankTail(0.5, 0.1, replan_every=6, refresh_every=2))
        history = []
        for _ in range(13):
            optimizer.step()
            history.append((planned.call_count, refreshed.call_count))
    assert [one for one, _ in history] == [1] * 6 + [2] * 6 + [3]
    assert [bool(later[1] > earlier[1]) for earlier, later in pairwise(history)] == [
        step % 2 == 0 for step in range(1, 13)
    ]


def test_nothing_is_planned_anew_while_the_schedule_is_at_zero():
    model = mixed()
    with patch.object(rank_tail, "planned", side_effect=rank_tail.planned) as planned:
        optimizer, _ = attached(
            model, RankTail(0.5, replan_every=1), schedule=StrengthSchedule(10, begin=0.5, full=0.5)
        )
        before = weights_of(model)
        for _ in range(5):
            optimizer.step()
        assert planned.call_count == 1
        assert all(torch.equal(one, before[name]) for name, one in weights_of(model).items())
        optimizer.step()
        assert planned.call_count == 2
    assert any(not torch.equal(one, before[name]) for name, one in weights_of(model).items())


def test_plans_follow_the_weights():
    model = mlp(sizes=(24, 24, 24))
    with torch.no_grad():
        model[0].weight.mul_(100)
    optimizer, handle = attached(model, RankTail(0.5, 1e-6, replan_every=1))
    tail = handle.adaptation(RankTail(0.5, 1e-6, replan_every=1))
    first = tail.plan["2"].rank
    with torch.no_grad():
        model[0].weight.div_(100)
        model[2].weight.mul_(100)
    optimizer.step()
    optimizer.step()
    assert tail.plan["2"].rank is None or tail.plan["2"].rank > first
    assert tail.plan == plan_compression(model, 0.5)


def regression():
    """Inputs, and a smooth function of three combinations of them."""
    inputs = randn(96, 24, seed=0, dtype=torch.float32)
    return inputs, torch.tanh(inputs @ randn(24, 3, seed=1).float()) @ randn(3, 1, seed=2).float()


def trained(penalty, steps=400):
    model, (inputs, targets) = mlp(sizes=(24, 48, 48, 1)), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if penalty is not None:
        attach_(optimizer, smooth_(model, penalty), schedule=StrengthSchedule(steps, full=0.5))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return remove_penalties(model), loss.item()


def test_after_training_the_cut_costs_almost_nothing():
    inputs, targets = regression()
    losses = {}
    for name, penalty in {"plain": None, "tail": RankTail(0.7, 3.0, replan_every=50, refresh_every=10)}.items():
        model, dense = trained(penalty)
        svd_compress_(model, 0.7)
        losses[name] = dense, nn.functional.mse_loss(model(inputs), targets).item()
    dense, cut = losses["tail"]
    assert cut < 1.5 * dense
    assert losses["plain"][1] > 5 * cut
    assert dense < 0.1 * float(targets.var())


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        inputs = randn(8, 24, seed=step, dtype=torch.float32)
        model(inputs).square().mean().backward()
        optimizer.step()


def make():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = attach_(optimizer, smooth_(model, RankTail(0.5, 0.5, replan_every=7, refresh_every=3)))
    return model, optimizer, handle


@pytest.mark.parametrize("stop", [1, 4, 7, 8])
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(stop):
    model, optimizer, handle = make()
    train(model, optimizer, stop)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    train(model, optimizer, 12, first=stop)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again, other, other_handle = make()
    for one, state in zip((again, other, other_handle), states, strict=True):
        one.load_state_dict(state)
    train(again, other, 12, first=stop)
    assert all(torch.equal(one, again.get_parameter(name)) for name, one in model.named_parameters())
    assert "torchsmooth" not in " ".join(model.state_dict())


def test_the_state_of_another_model_is_refused():
    _, _, handle = make()
    other = nn.Sequential(nn.Linear(24, 24))
    _, other_handle = attached(other, RankTail(0.5, 0.5, replan_every=7, refresh_every=3))
    with pytest.raises(ValueError, match=r"'2\.weight'.* carry no such penalty"):
        other_handle.load_state_dict(handle.state_dict())
    _, different = attached(mlp(), RankTail(0.6))
    with pytest.raises(ValueError, match=r"does not belong to this handle.*ratio=0\.6"):
        different.load_state_dict(handle.state_dict())


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), lambda model: model])
def test_compiled_models_are_planned_inside(wrap):
    model = mlp()
    wrapped = wrap(model)
    penalty = RankTail(0.5, 1.0)
    optimizer, handle = attached(wrapped, penalty)
    assert handle.adaptation(penalty).plan == plan_compression(model, 0.5)
    optimizer.step()
    assert any(bool(parameter.grad.any()) for parameter in model.parameters())
    (state,) = handle.state_dict()["adaptive"].values()
    assert state["layers"].keys() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_layout(dtype):
    model = mixed().to(dtype, memory_format=torch.channels_last)
    optimizer, _ = attached(model, RankTail(0.5, 0.5))
    optimizer.step()
    assert all(one.dtype == one.grad.dtype == dtype for one in model.parameters())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0,), {}, ValueError, "ratio must lie strictly between 0 and 1"),
        ((1.0,), {}, ValueError, "ratio must lie strictly between 0 and 1"),
        ((True,), {}, TypeError, "ratio must be"),
        ((0.5, -1.0), {}, ValueError, "strength of RankTail must be ≥ 0"),
        ((0.5, "0.1"), {}, TypeError, "strength of RankTail"),
        ((0.5,), {"scheme": "chanel"}, ValueError, "scheme must be one of"),
        ((0.5,), {"form": "dense"}, ValueError, "form must be one of"),
        ((0.5,), {"replan_every": 0}, ValueError, r"replan_every must be at least 1 \(optimizer steps\), got 0"),
        ((0.5,), {"refresh_every": 1.5}, TypeError, "refresh_every must be"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        RankTail(*arguments, **options)


def test_what_cannot_be_planned_is_said_when_it_is_attached():
    for model, ratio, message in (
        (mlp(), 0.999, "cannot be reached"),
        (Tied(), 0.9, "cannot be reached"),
        (fill_(nn.Sequential(nn.Embedding(8, 8, max_norm=9.0)), 0), 0.5, "nothing to compress"),
    ):
        smooth_(model, RankTail(ratio))
        before, optimizer = snapshot(model), torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=message):
            attach_(optimizer, model)
        assert same(before, snapshot(model))
        assert not optimizer._optimizer_step_pre_hooks
    with torch.no_grad():
        model = smooth_(mlp(), RankTail(0.5))
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '0'"):
        attach_(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_it_needs_a_handle():
    with pytest.raises(ValueError, match="attach_"):
        penalty_loss(smooth_(mlp(), RankTail(0.5)))


def test_it_goes_together_with_other_penalties():
    model = mlp().double()
    smooth_(model, RankTail(0.5, 1.0))
    smooth_(model, NuclearNorm(1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_(optimizer, model)
    expected = copy.deepcopy(model)
    remove_penalties(expected)
    other = torch.optim.SGD(smooth_(expected, NuclearNorm(1e-3)).parameters(), lr=1.0)
    attach_(other, expected)
    third = copy.deepcopy(expected)
    remove_penalties(third)
    fourth = torch.optim.SGD(smooth_(third, RankTail(0.5, 1.0)).parameters(), lr=1.0)
    attach_(fourth, third)
    before = weights_of(model)
    for one in (optimizer, other, fourth):
        one.step()
    for name, weight in before.items():
        moves = [weights_of(one)[name] - weight for one in (model, expected, third)]
        assert torch.allclose(moves[0], moves[1] + moves[2], atol=1e-12)


def test_descriptions_are_values():
    assert RankTail(0.8) == RankTail(0.8, 0.01)
    assert hash(RankTail(0.8)) == hash(RankTail(0.8))
    assert RankTail(0.8) != RankTail(0.9)
    assert repr(RankTail(0.8)).startswith("RankTail(strength=0.01, ratio=0.8")


def steps(optimizer, count):
    for _ in range(count):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()


def test_a_penalty_that_is_removed_from_a_layer_leaves_the_others_going():
    model = fill_(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), 0)
    optimizer, handle = attached(model, RankTail(0.3, refresh_every=3, replan_every=7), lr=0.1)
    steps(optimizer, 2)
    remove_penalties(model[0])
    first, second = model[0].weight.clone(), model[2].weight.clone()
    steps(optimizer, 20)
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, second)
    assert handle.step == 22


def test_a_layer_that_takes_the_place_of_another_is_not_projected_as_that_was():
    model = fill_(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), 0)
    penalty = RankTail(0.3, refresh_every=5)
    optimizer, _ = attached(model, penalty, lr=0.1)
    model[2] = fill_(nn.Linear(24, 10), 1)
    smooth_(model[2], penalty)
    optimizer.add_param_group({"params": model[2].parameters()})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps(optimizer, 8)
    assert all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("scheme", ["channel", "tucker"])
def test_autocast_around_the_step_does_not_round_the_tail(scheme):
    found = []
    for enabled in (False, True):
        model = mixed()
        optimizer, _ = attached(model, RankTail(0.4, 0.1, scheme=scheme, refresh_every=1, replan_every=2))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps(optimizer, 3)
        found.append([one.detach() for one in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_state_of_other_sizes_is_refused_by_name():
    small, large = (fill_(nn.Sequential(nn.Linear(size, size)), 0) for size in (16, 32))
    state = attached(small, RankTail(0.3))[1].state_dict()
    _, handle = attached(large, RankTail(0.3))
    before = handle.state_dict()
    with pytest.raises(ValueError, match=r"'0.weight' does not fit a weight of shape \(32, 32\)"):
        handle.load_state_dict(state)
    assert repr(handle.state_dict()) == repr(before)


@pytest.mark.parametrize("scheme", ["channel", "tucker", "auto"])
def test_values_that_are_no_numbers_are_refused_by_name(scheme):
    model = mixed()
    optimizer, _ = attached(model, RankTail(0.4, scheme=scheme, refresh_every=1))
    steps(optimizer, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"\d.weight' holds \d+ NaN"):
        steps(optimizer, 1)


def refusal(model, penalty):
    """What is said where a penalty cannot be attached."""
    before = snapshot(model)
    smooth_(model, penalty)
    with pytest.raises(ValueError, match=r"^RankTail\(") as caught:
        attach_(torch.optim.SGD(model.parameters(), 0.1), model)
    assert same(before, snapshot(model))
    return str(caught.value)


@pytest.mark.parametrize("head", [24, 1])  # the one of a single output stays dense
def test_on_a_compressed_model_it_says_what_it_plans_without_and_what_serves_there(head):
    model = fill_(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, head)), 0)
    svd_compress_(model, 0.3)
    said = refusal(model, RankTail(0.6))
    assert "RankTail left out" in said
    assert "RankTail plans without low-rank and parametrized layers" in said
    assert "NuclearNorm() or another penalty serves low-rank ones" in said
    assert "filter_fn" not in said


def test_a_ratio_out_of_its_reach_names_the_penalty_and_the_layers_left_out():
    assert "cannot be planned: ratio 0.99999 cannot be reached" in refusal(mlp(), RankTail(0.99999))
    model = fill_(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), 0)
    svd_compress_(model, 0.3, filter_fn=lambda _, name: name == "0")
    said = refusal(model, RankTail(0.9))
    assert "'0.up', with" in said or "'0', with" in said
    assert "left out by RankTail" in said
    assert "filter_fn" not in said


@pytest.mark.parametrize(
    "make", [lambda: nn.TransformerEncoderLayer(32, 4, 64), lambda: nn.ModuleList([nn.LSTM(32, 32), nn.Linear(32, 64)])]
)
def test_layers_that_cannot_have_it_are_planned_as_they_will_be_compressed(make):
    model = fill_(make(), 0)
    penalty = RankTail(0.7, strength=1.0)
    _, handle = attached(model, penalty)
    plan = handle.adaptation(penalty).plan
    expected = plan_compression(model, 0.7)
    assert [(one.name, one.choice) for one in plan] == [(one.name, one.choice) for one in expected]
    pulled = {name.removesuffix(".weight") for name in handle.state_dict()["adaptive"][repr(penalty)]["layers"]}
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert pulled == plain & {one.name for one in expected if one.choice is not None}
    assert pulled


ATTENTION = {
    "joined": lambda: nn.MultiheadAttention(16, 4),
    "apart": lambda: nn.MultiheadAttention(16, 2, bias=False, kdim=12, vdim=8),
    "decoder": lambda: nn.TransformerDecoderLayer(16, 4, 24),
}


def outputs_of(model):
    """The layers at the end of attention, by the name of their weight."""
    return {f"{name}.weight": one for name, one in model.named_modules() if name.endswith("out_proj")}


@pytest.mark.parametrize("kind", ATTENTION)
@few
@given(seed=seeds, ratio=st.sampled_from([0.3, 0.5, 0.7]))
def test_a_whole_step_leaves_of_the_outputs_of_attention_what_compression_keeps(kind, seed, ratio):
    model = fill_(nn.Sequential(ATTENTION[kind](), nn.Linear(16, 16)), seed).double()
    expected = copy.deepcopy(model)
    svd_compress_(expected, ratio)
    optimizer, _ = attached(model, RankTail(ratio, 1.0))
    optimizer.step()
    weights = weights_of(restore_dense_(expected))
    for name, one in outputs_of(model).items():
        assert torch.allclose(one.weight, weights[name], atol=1e-10)


@pytest.mark.parametrize("kind", ATTENTION)
def test_outputs_of_attention_that_were_left_out_stay_dense_in_the_plan(kind):
    model = fill_(nn.Sequential(ATTENTION[kind](), nn.Linear(16, 16)), 0)
    penalty, left_out = RankTail(0.4, 1.0), {name.removesuffix(".weight") for name in outputs_of(model)}
    smooth_(model, penalty, lambda _, name: name not in left_out)
    before = {name: one.weight.clone() for name, one in outputs_of(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_(optimizer, model)
    optimizer.step()
    planned = {one.name for one in handle.adaptation(penalty).plan if one.choice is not None}
    assert not planned & left_out
    assert any(name.endswith("q_proj") for name in planned)
    assert all(torch.equal(one.weight, before[name]) for name, one in outputs_of(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", ["channel", "tucker"])
def test_a_checkpoint_holds_no_more_than_the_bases(scheme, dtype):
    layers = [nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3)]
    model = smooth_(fill_(nn.Sequential(*layers), 0).to(dtype), RankTail(0.8, scheme=scheme))
    handle = attach_(torch.optim.SGD(model.parameters(), 0.1), model)
    (state,) = handle.state_dict()["adaptive"].values()
    bases = [one for layer in state["layers"].values() for one in layer["bases"]]
    assert bases
    for one in bases:
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
