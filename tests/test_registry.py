"""Penalties on modules: what registering changes (nothing else), and what the loss adds up."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.networks import COPIES
from tests.reference import penalties as reference
from tests.strategies import fill_, randn, seeds
from torchsmooth import (
    FirstDerivative,
    NuclearNorm,
    SecondDerivative,
    functional,
    is_penalized,
    penalty_loss,
    register_penalty,
    remove_penalties,
    smooth_,
)

FUNCTIONS = {
    NuclearNorm: (functional.nuclear_norm, reference.nuclear_norm),
    FirstDerivative: (functional.first_derivative, reference.first_derivative),
    SecondDerivative: (functional.second_derivative, reference.second_derivative),
}
LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(6, 4, 2, groups=2),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(3, 6, 2, groups=3),
    "embedding": lambda: nn.Embedding(6, 3),
    "embedding_with_padding": lambda: nn.Embedding(6, 3, padding_idx=-4),
}

each_kind = pytest.mark.parametrize("kind", FUNCTIONS)
each_layer = pytest.mark.parametrize("layer", LAYERS)
few = settings(max_examples=10)


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    return fill_(module.double(), seed)


def layout_of(module: nn.Module) -> dict:
    return {"groups": getattr(module, "groups", 1), "transposed": "Transpose" in type(module).__name__}


def trained_rows(module: nn.Module) -> list[int]:
    padding = getattr(module, "padding_idx", None)
    return [row for row in range(module.weight.shape[0]) if row != padding]


def expected(kind, module: nn.Module) -> float:
    return FUNCTIONS[kind][1](module.weight[trained_rows(module)], **layout_of(module))


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@each_layer
@each_kind
def test_registering_changes_nothing_else(kind, layer):
    module = LAYERS[layer]()
    keys, attributes, parameters = list(module.state_dict()), set(vars(module)), dict(module.named_parameters())
    kept_class, text = type(module), repr(module)
    assert register_penalty(module, "weight", kind()) is module
    assert list(module.state_dict()) == keys
    assert type(module) is kept_class
    assert repr(module) == text
    assert all(parameters[name] is parameter for name, parameter in module.named_parameters())
    assert set(vars(remove_penalties(module, "weight"))) == attributes


class Noisy(nn.Module):
    """A parametrization that draws random numbers and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight + torch.randn_like(weight)


@pytest.mark.parametrize("compute", [parametrizations.spectral_norm, Noisy])
def test_registering_on_what_is_computed_moves_nothing(compute):
    layer = fill_(nn.Linear(20, 20), 0)
    _ = parametrize.register_parametrization(layer, "weight", Noisy()) if compute is Noisy else compute(layer)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    random = torch.get_rng_state()
    smooth_(layer, NuclearNorm(0.1))
    register_penalty(layer, "weight", FirstDerivative(0.1))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_computed_can_be_registered_before_it_has_values():
    with torch.device("meta"):
        layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    assert is_penalized(smooth_(layer, NuclearNorm(0.1)), "weight")


def test_arguments_come_in_the_order_of_register_parametrization():
    theirs = inspect.signature(nn.utils.parametrize.register_parametrization).parameters
    assert list(inspect.signature(register_penalty).parameters) == [*list(theirs)[:2], "penalty"]


def test_same_type_replaces_and_other_types_add_up():
    layer = double(nn.Linear(4, 3))
    for penalty in (NuclearNorm(5.0), FirstDerivative(2.0), NuclearNorm(3.0), SecondDerivative(1.0)):
        register_penalty(layer, "weight", penalty)
    total = sum(strength * expected(kind, layer) for kind, strength in zip(FUNCTIONS, (3.0, 2.0, 1.0), strict=True))
    assert penalty_loss(layer).item() == pytest.approx(total)


def test_any_tensor_with_two_axes_can_be_penalised_by_name():
    attention = double(nn.MultiheadAttention(4, 2))
    register_penalty(attention, "in_proj_weight", FirstDerivative(0.5))
    assert is_penalized(attention, "in_proj_weight")
    assert penalty_loss(attention).item() == pytest.approx(0.5 * reference.first_derivative(attention.in_proj_weight))


@pytest.mark.parametrize(
    ("error", "message", "module", "name", "penalty"),
    [
        (TypeError, "module must be a torch.nn.Module, got str", "model", "weight", NuclearNorm()),
        (TypeError, "penalty must be an instance", nn.Linear(3, 2), "weight", NuclearNorm),
        (TypeError, "penalty must be NuclearNorm.* got float 0.1", nn.Linear(3, 2), "weight", 0.1),
        (TypeError, "tensor_name must be a string, got int 0", nn.Linear(3, 2), 0, NuclearNorm()),
        (
            ValueError,
            "'wieght' of Linear does not exist: it has 'bias', 'weight'",
            nn.Linear(3, 2),
            "wieght",
            NuclearNorm(),
        ),
        (ValueError, r"'bias' of Linear has shape \(2,\)", nn.Linear(3, 2), "bias", NuclearNorm()),
        (ValueError, "'weight' of LazyLinear is not initialised", nn.LazyLinear(2), "weight", NuclearNorm()),
        (
            TypeError,
            "is of torch.complex64; a penalty needs float64",
            nn.Linear(3, 2, dtype=torch.complex64),
            "weight",
            NuclearNorm(),
        ),
    ],
)
def test_what_cannot_be_penalised_is_named_and_left_alone(error, message, module, name, penalty):
    with pytest.raises(error, match=message):
        register_penalty(module, name, penalty)
    assert isinstance(module, str) or not is_penalized(module)


@pytest.mark.parametrize("duplicate", COPIES.values())
def test_a_copy_keeps_its_penalties_and_is_independent(duplicate):
    model = smooth_(double(two_layers()), SecondDerivative(2.0))
    loss = penalty_loss(model)
    twin = duplicate(model)
    assert torch.equal(penalty_loss(twin), loss)
    remove_penalties(twin[0], "weight")
    register_penalty(twin[2], "weight", NuclearNorm())
    assert torch.equal(penalty_loss(model), loss)
    remove_penalties(twin)
    assert torch.equal(penalty_loss(model), loss)


def test_a_shallow_copy_of_a_layer_is_independent():
    layer = register_penalty(double(nn.Linear(4, 3)), "weight", NuclearNorm(2.0))
    loss = penalty_loss(layer)
    twin = copy.copy(layer)
    assert torch.equal(penalty_loss(twin), loss)
    register_penalty(twin, "weight", FirstDerivative())
    assert torch.equal(penalty_loss(layer), loss)
    remove_penalties(twin, "weight")
    assert torch.equal(penalty_loss(layer), loss)


def test_a_copy_of_a_parametrized_layer_is_independent():
    layer = parametrizations.weight_norm(double(nn.Linear(4, 3)))
    twin = copy.deepcopy(register_penalty(layer, "weight", NuclearNorm(2.0)))
    remove_penalties(twin)
    assert is_penalized(layer, "weight")
    assert penalty_loss(layer).item() == pytest.approx(2.0 * reference.nuclear_norm(layer.weight))


def test_forward_pass_is_unchanged_and_plain_state_dicts_load_strictly():
    model, x = fill_(two_layers(), seed=0), randn(5, 4, seed=1, dtype=torch.float32)
    before = model(x)
    assert torch.equal(smooth_(model, NuclearNorm(10.0))(x), before)
    plain = two_layers()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), before)


def test_is_penalized_looks_inside_only_without_a_name():
    model = two_layers()
    assert not is_penalized(model)
    register_penalty(model[0], "weight", NuclearNorm())
    assert is_penalized(model)
    assert is_penalized(model[0], "weight")
    assert not is_penalized(model[0], "bias")
    assert not is_penalized(model, "weight")
    assert not is_penalized(model[2])


def test_removing_by_name_leaves_the_other_tensors():
    recurrent = nn.LSTM(3, 2)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        register_penalty(recurrent, name, NuclearNorm())
    assert remove_penalties(recurrent, "weight_ih_l0") is recurrent
    assert not is_penalized(recurrent, "weight_ih_l0")
    assert is_penalized(recurrent, "weight_hh_l0")


def test_removing_without_a_name_removes_all_inside():
    model = nn.Sequential(two_layers(), register_penalty(nn.Linear(2, 2), "weight", SecondDerivative()))
    attributes = [set(vars(module)) for module in model[0].modules()]
    smooth_(model, NuclearNorm())
    assert remove_penalties(model) is model
    assert not any(is_penalized(module) for module in model.modules())
    assert [set(vars(module)) for module in model[0].modules()] == attributes
    assert remove_penalties(model) is model


@pytest.mark.parametrize("name", ["weight", "bias", "no_such_name"])
def test_removing_what_is_not_there_raises(name):
    layer = nn.Linear(3, 2)
    if name != "weight":
        register_penalty(layer, "weight", NuclearNorm())
    with pytest.raises(ValueError, match=f"no penalty is registered on tensor '{name}' of Linear"):
        remove_penalties(layer, name)
    assert is_penalized(layer) == (name != "weight")


@pytest.mark.parametrize(
    "verb", [is_penalized, remove_penalties, penalty_loss, lambda model: smooth_(model, NuclearNorm())]
)
def test_every_verb_refuses_what_is_not_a_module(verb):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        verb({})


@each_layer
@each_kind
def test_smooth_finds_every_supported_layer(kind, layer):
    model = nn.ModuleDict({"body": nn.Sequential(nn.BatchNorm1d(3), LAYERS[layer]()), "act": nn.PReLU(3)})
    assert smooth_(model, kind()) is model
    assert [name for name, module in model.named_modules() if is_penalized(module, "weight")] == ["body.1"]


def test_smooth_finds_subclasses_parametrized_layers_and_a_bare_layer():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(3, 2), parametrizations.orthogonal(nn.Linear(3, 3)), nn.MultiheadAttention(4, 2))
    smooth_(model, NuclearNorm())
    assert all(is_penalized(layer, "weight") for layer in (model[0], model[1], model[2].out_proj))
    assert is_penalized(smooth_(nn.Linear(3, 2), NuclearNorm()), "weight")


def test_filter_is_asked_about_each_supported_layer_by_its_qualified_name():
    model, asked = nn.Sequential(two_layers(), nn.Conv1d(2, 2, 1)), {}

    def keep(module, name):
        asked[name] = module
        return name.startswith("0")

    smooth_(model, NuclearNorm(), filter_fn=keep)
    assert asked == {name: model.get_submodule(name) for name in ("0.0", "0.2", "1")}
    assert is_penalized(model[0][0])
    assert is_penalized(model[0][2])
    assert not is_penalized(model[1])


@pytest.mark.parametrize(
    ("error", "message", "last", "filter_fn"),
    [
        (TypeError, "tensor 'weight' of '2' .*complex64", nn.Linear(3, 2, dtype=torch.complex64), None),
        (ValueError, "'2.weight' is not initialised", nn.LazyLinear(2), None),
        (ValueError, "no Linear, .* that filter_fn keeps", nn.Linear(3, 2), lambda module, name: False),
        (KeyError, "2", nn.Linear(3, 2), lambda module, name: {"0": True}[name]),
    ],
)
def test_smooth_registers_nothing_when_it_raises(error, message, last, filter_fn):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), last)
    with pytest.raises(error, match=message):
        smooth_(model, NuclearNorm(), filter_fn)
    assert not is_penalized(model)


def test_smooth_raises_when_there_is_nothing_to_smooth():
    with pytest.raises(ValueError, match=r"Sequential has no Linear, .* register_penalty"):
        smooth_(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), NuclearNorm())


@pytest.mark.parametrize("model", [nn.Linear(3, 2, device="meta"), nn.Linear(3, 2).double(), nn.ReLU()])
def test_loss_with_nothing_registered_is_zero_on_the_device_of_the_model(model):
    loss = penalty_loss(model)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.device == next(model.parameters(), torch.zeros(())).device
    assert loss.is_meta or loss.item() == 0.0


@each_kind
@few
@given(seed=seeds, strength=st.floats(0.0, 1e3))
def test_loss_is_the_sum_of_the_references_over_a_model(kind, seed, strength):
    model = double(nn.ModuleDict({name: make() for name, make in LAYERS.items()}), seed)
    smooth_(model, kind(strength))
    total = sum(strength * expected(kind, module) for module in model.values())
    assert penalty_loss(model).item() == pytest.approx(total, rel=1e-9)


@each_layer
@each_kind
@few
@given(seed=seeds, strength=st.floats(1e-3, 1e3))
def test_gradient_is_strength_times_that_of_the_function(kind, layer, seed, strength):
    module = register_penalty(double(LAYERS[layer](), seed), "weight", kind(strength))
    (gradient,) = torch.autograd.grad(penalty_loss(module), module.weight)
    rows = trained_rows(module)
    weight = module.weight.detach()[rows].requires_grad_()
    (alone,) = torch.autograd.grad(FUNCTIONS[kind][0](weight, **layout_of(module)), weight)
    # The row of an embedding that is never trained gets none.
    torch.testing.assert_close(gradient, torch.zeros_like(gradient).index_copy(0, torch.tensor(rows), strength * alone))


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ((torch.float32,), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.bfloat16,), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64, torch.float16), torch.float64),
    ],
)
def test_dtype_of_the_loss_is_single_or_the_widest(dtypes, dtype):
    layers = [fill_(nn.Linear(4, 3), seed=number).to(one) for number, one in enumerate(dtypes)]
    loss = penalty_loss(smooth_(nn.Sequential(*layers), NuclearNorm(1.0)))
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(sum(expected(NuclearNorm, layer) for layer in layers), rel=1e-5)


class Tied(nn.Module):
    """One weight in three layers: two of one parent, one of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Embedding(4, 4))
        self.second.weight = self.inner[0].weight = self.first.weight


@each_kind
def test_a_tied_weight_counts_once(kind):
    model = smooth_(double(Tied()), kind(2.0))
    assert penalty_loss(model).item() == pytest.approx(2.0 * expected(kind, model.first))
    register_penalty(model.second, "weight", kind(3.0))  # a different penalty, which counts as well
    assert penalty_loss(model).item() == pytest.approx(5.0 * expected(kind, model.first))


@pytest.mark.parametrize("parametrization", [nn.Module.train, parametrizations.weight_norm])
def test_equal_weights_that_are_not_tied_count_each(parametrization):
    model = nn.Sequential(*(parametrization(double(nn.Linear(4, 3))) for _ in range(30)))
    with torch.no_grad():  # where nothing keeps a parametrized weight alive, so that its id may be given out again
        loss = penalty_loss(smooth_(model, FirstDerivative(1.0)))
    assert loss.item() == pytest.approx(30 * expected(FirstDerivative, model[0]))


def test_a_shared_module_counts_once():
    layer = double(nn.Linear(4, 4))
    model = smooth_(nn.Sequential(layer, nn.Sequential(layer), layer), NuclearNorm(1.0))
    assert penalty_loss(model).item() == pytest.approx(expected(NuclearNorm, layer))


def test_a_replaced_weight_is_the_one_that_counts():
    layer = register_penalty(nn.Linear(4, 3), "weight", FirstDerivative(1.0))
    layer.weight = nn.Parameter(randn(5, 2, seed=1))
    assert penalty_loss(layer).item() == pytest.approx(expected(FirstDerivative, layer))


@each_kind
@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_weight_passes_its_gradient_to_the_original_parameters(kind, parametrization):
    layer = parametrization(double(nn.Linear(4, 3)))
    loss = penalty_loss(register_penalty(layer, "weight", kind(2.0)))
    assert loss.item() == pytest.approx(2.0 * expected(kind, layer))
    originals = list(layer.parametrizations.weight.parameters())
    gradients = torch.autograd.grad(loss, originals)
    again = torch.autograd.grad(2.0 * FUNCTIONS[kind][0](layer.weight), originals)
    torch.testing.assert_close(gradients, again)
    # A matrix with orthogonal rows keeps its nuclear norm, whatever the parameters.
    flat = kind is NuclearNorm and parametrization is parametrizations.orthogonal
    assert all((gradient.abs().max().item() < 1e-12) == flat for gradient in gradients)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("smooth_first", [False, True])
def test_a_wrapped_model_has_the_loss_of_the_model(wrap, smooth_first):
    model = double(two_layers())
    wrapped = wrap(smooth_(model, NuclearNorm(1.0))) if smooth_first else smooth_(wrap(model), NuclearNorm(1.0))
    assert is_penalized(wrapped)
    assert torch.equal(penalty_loss(wrapped), penalty_loss(model))
    assert penalty_loss(model).item() == pytest.approx(sum(expected(NuclearNorm, model[place]) for place in (0, 2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_cannot_be_evaluated_is_named(bad, dtype):
    model = nn.ModuleDict({"body": smooth_(two_layers(), NuclearNorm())}).to(dtype)
    nn.init.constant_(model.body[2].weight, bad)
    with pytest.raises(ValueError, match=r"NuclearNorm on tensor 'weight' of 'body\.2' \(Linear\): .*NaN or infinite"):
        penalty_loss(model)


def test_a_compiled_layer_is_penalised_with_its_own_geometry():
    conv = fill_(nn.Conv2d(6, 4, 3, groups=2), 0)
    compiled = torch.compile(conv, backend="eager")
    assert register_penalty(compiled, "weight", FirstDerivative(1.0)) is compiled
    assert is_penalized(compiled, "weight")
    assert torch.equal(penalty_loss(compiled), functional.first_derivative(conv.weight, groups=2))
    assert not is_penalized(remove_penalties(compiled, "weight"))


@pytest.mark.parametrize("head_first", [False, True])
def test_the_padding_row_counts_where_another_layer_trains_it(head_first):
    embedding, head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    nn.init.ones_(head.weight)
    model = smooth_(nn.Sequential(*([head, embedding] if head_first else [embedding, head])), NuclearNorm(1.0))
    assert float(penalty_loss(model).detach()) == pytest.approx(15**0.5)
    embedding.padding_idx = -1  # set by hand, counted from the end as torch does
    embedding.weight = nn.Parameter(torch.ones(5, 3))
    assert float(penalty_loss(nn.Sequential(embedding)).detach()) == pytest.approx(12**0.5)
