"""What ``attach_`` and its handle answer to mistakes."""

from __future__ import annotations

import copy

import torch

from tests.mistakes import Mistake, check, table
from tests.networks import two_layers
from torchsmooth import (
    Constrained,
    NuclearNorm,
    NuclearRatio,
    RankTail,
    attach_,
    smooth_,
)


def smoothed(penalty=None):
    return lambda: smooth_(two_layers(), penalty or NuclearNorm())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def stepped(model, **options):
    optimizer = sgd(model)
    attach_(optimizer, model, **options)
    model(torch.ones(2, 6, device=model[0].weight.device)).sum().backward()
    optimizer.step()


ATTACHED = [
    Mistake(
        "optimizer and model swapped",
        lambda model: attach_(model, sgd(model)),
        TypeError,
        "optimizer must be a torch.optim.Optimizer, got Sequential.",
        model=smoothed(),
    ),
    Mistake(
        "a class of optimizers",
        lambda model: attach_(torch.optim.SGD, model),
        TypeError,
        "optimizer must be a torch.optim.Optimizer, got the class SGD.",
        model=smoothed(),
    ),
    Mistake(
        "parameters for the model",
        lambda model: attach_(sgd(model), model.parameters()),
        TypeError,
        "model must be a torch.nn.Module, got generator.",
        model=smoothed(),
    ),
    Mistake(
        "before smooth_",
        lambda model: attach_(sgd(model), model),
        ValueError,
        (
            "no penalty is registered in this Sequential: call smooth_(model, penalty) or "
            "register_penalty(module, tensor_name, penalty) first."
        ),
    ),
    Mistake(
        "the optimizer of another model",
        lambda model: attach_(sgd(two_layers()), model),
        ValueError,
        (
            "none of the tensors with penalties in this Sequential is among the parameters of this "
            "SGD (the first is '0.weight'): make the optimizer from the parameters of the same "
            "model, after everything that replaces them (such as fully_shard or svd_compress_)."
        ),
        model=smoothed(),
    ),
    Mistake(
        "attached twice",
        lambda model: [attach_(optimizer := sgd(model), model), attach_(optimizer, model)],
        ValueError,
        (
            "this Sequential, or a part of it, is attached to this SGD already, and its penalties "
            "would count twice: call remove() on the handle of the first call."
        ),
        model=smoothed(),
    ),
    Mistake(
        "every zeroth step",
        lambda model: attach_(sgd(model), model, every=0),
        ValueError,
        "every must be at least 1 (optimizer steps from one evaluation to the next), got 0.",
        model=smoothed(),
    ),
    Mistake(
        "a number for a schedule",
        lambda model: attach_(sgd(model), model, schedule=0.5),
        TypeError,
        "schedule must be a function of the step, got float 0.5.",
        model=smoothed(),
    ),
    Mistake(
        "a schedule of no argument",
        lambda model: attach_(sgd(model), model, schedule=lambda: 1.0),
        TypeError,
        ("schedule must be a function of the step, got function <lambda>, which takes no arguments."),
        model=smoothed(),
    ),
    Mistake(
        "a schedule for learning rates",
        lambda model: attach_(optimizer := sgd(model), model, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 3)),
        TypeError,
        "schedule must be a function of the step, got StepLR.",
        model=smoothed(),
    ),
    Mistake(
        "a schedule that falls below zero",
        lambda model: stepped(model, schedule=lambda step: -1.0),
        ValueError,
        "schedule(0) must be ≥ 0, got -1.0: a negative factor would reward rough weights.",
        model=smoothed(),
    ),
    Mistake(
        "a schedule of text",
        lambda model: stepped(model, schedule=lambda step: "1"),
        TypeError,
        "schedule(0) must be a real number, got str '1'.",
        model=smoothed(),
    ),
    *(
        Mistake(
            f"{penalty} on weights without values",
            stepped,
            ValueError,
            (
                f"{type(penalty).__name__} on tensor 'weight' of '0' (Linear): the nuclear norm needs a weight with "
                "values, but this one is on the meta device: load the weights first (for instance "
                "model.to_empty(device=...), then load_state_dict)."
            ),
            model=lambda penalty=penalty: smooth_(two_layers().to("meta"), penalty),
        )
        for penalty in (
            NuclearNorm(),
            NuclearNorm(method="polar_express"),
            NuclearRatio(),
            Constrained(NuclearNorm()),
            Constrained(NuclearRatio()),
        )
    ),
    Mistake(
        "a copy of a handle",
        lambda model: copy.deepcopy(attach_(sgd(model), model)),
        TypeError,
        (
            "a PenaltyHandle cannot be copied or pickled, as copies of an optimizer have no hooks: "
            "call attach_(optimizer, model) for the copies, and load_state_dict(handle.state_dict()) "
            "on its handle."
        ),
        model=smoothed(),
    ),
    Mistake(
        "the state of another handle",
        lambda model: attach_(sgd(model), model).load_state_dict(sgd(model).state_dict()),
        ValueError,
        (
            "the state does not belong to this handle: expected what state_dict() of a handle with "
            "no adaptive penalties returns, got dict of 'param_groups', 'state'."
        ),
        model=smoothed(),
    ),
    Mistake(
        "a tail that cannot be reached",
        lambda model: attach_(sgd(model), model),
        ValueError,
        (
            "RankTail(strength=0.01, ratio=0.9, scheme='auto', form='auto', replan_every=400, refresh_every=40) cannot "
            "be planned: ratio 0.9 cannot be reached: with rank 1 in every layer that can be compressed, 27 of "
            "59 parameters are left. The largest ratio that can be reached is 0.5423."
        ),
        model=smoothed(RankTail(0.9)),
    ),
    Mistake(
        "no state of a penalty",
        lambda model: attach_(sgd(model), model).adaptation(NuclearNorm()),
        ValueError,
        (
            "NuclearNorm(strength=0.001, scheme='channel', method='auto') is not among the adaptive "
            "penalties of this handle: it has no adaptive penalties."
        ),
        model=smoothed(),
    ),
]


@table(ATTACHED)
def test_a_mistake_is_answered_in_these_words(mistake):
    check(mistake)
