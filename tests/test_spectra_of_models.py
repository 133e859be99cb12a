"""Which layers a spectrum looks at and what it calls them, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import torchsmooth
from tests.networks import EVERY_LAYER, linear_of, two_layers
from tests.snapshots import Snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import plot_weights, spectrum


def test_the_layers_are_those_that_smooth_finds():
    model = nn.ModuleDict({name: make() for name, make in EVERY_LAYER.items()} | {"norm": nn.BatchNorm2d(3)})
    model["prelu"], model["attention"] = nn.PReLU(3), nn.MultiheadAttention(4, 2)
    model["parametrized"] = parametrizations.weight_norm(nn.Linear(3, 2))
    found = spectrum(model)
    torchsmooth.smooth_(model, torchsmooth.NuclearNorm())
    smoothed = [name for name, module in model.named_modules() if torchsmooth.is_penalized(module, "weight")]
    assert [layer.name for layer in found] == smoothed
    assert len(found) == len(EVERY_LAYER) + 2
    assert found["linear"] is found.layers[0]
    with pytest.raises(KeyError, match=r"no layer 'norm' in this spectrum: it has 'attention.out_proj', "):
        found["norm"]


def test_a_tied_or_shared_weight_is_there_once_with_all_its_names():
    head, table, body = nn.Linear(3, 7, bias=False), nn.Embedding(7, 3), nn.Linear(3, 3)
    table.weight = head.weight
    model = nn.ModuleDict({"table": table, "body": nn.Sequential(body, body), "head": head})
    found = spectrum(model)
    assert [(layer.name, layer.tied) for layer in found] == [("table", ("head",)), ("body.0", ("body.1",))]
    assert found["head"] is found["table"]
    assert "tied: head" in str(found)
    assert [layer.name for layer in spectrum(model, filter_fn=lambda module, name: name != "table")] == [
        "body.0",
        "head",
    ]


def test_equal_weights_that_are_computed_are_not_taken_for_tied():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 3)) for _ in range(20)))
    assert len(spectrum(model)) == 20


def test_wrappers_change_no_numbers():
    model = two_layers()
    plain = spectrum(model)
    compiled = torch.compile(nn.Sequential(model[0], torch.compile(model[2], backend="eager")), backend="eager")
    asked = []
    found = spectrum(compiled, filter_fn=lambda module, name: asked.append((type(module), name)) or True)
    assert [layer.name for layer in found] == ["0", "1"]
    assert asked == [(nn.Linear, "0"), (nn.Linear, "1")]
    assert spectrum(torch.compile(model[0], backend="eager")).layers[0].name == ""
    assert [layer.name for layer in spectrum(nn.DataParallel(model))] == ["module.0", "module.2"]
    assert [layer.effective_rank for layer in found] == [layer.effective_rank for layer in plain]


def test_low_rank_layers_show_their_factors():
    model = two_layers()
    torchsmooth.svd_compress_(model, ratio=0.3, form="factored")
    assert {"0.down", "0.up"} <= {layer.name for layer in spectrum(model)}


class Noise(nn.Module):
    """A parametrization that draws random numbers and counts how often it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reads", torch.zeros(()))

    def forward(self, weight):
        self.reads += 1
        return weight + 0.1 * torch.randn_like(weight)


def noisy(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Noise())


WRAPPINGS = {
    "plain": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "noisy": noisy,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_nothing_about_the_model_changes(wrapping, training):
    model = two_layers()
    model[0] = WRAPPINGS[wrapping](model[0])
    model.train(training)
    model(randn(3, 6, seed=1, dtype=torch.float32)).square().mean().backward()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    # A buffer that is put back is written; one that did not change must not be, for a graph may hold it.
    held = [*model.parameters(), *(() if wrapping in {"spectral_norm", "noisy"} else model.buffers())]
    versions = [tensor._version for tensor in held]
    spectrum(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), gradients, strict=True))
    assert [tensor._version for tensor in held] == versions
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("wrapping", ["weight_norm", "orthogonal", "spectral_norm", "noisy"])
def test_looking_inside_a_cached_region_keeps_buffers_and_gradients(wrapping):
    def gradients(*, look):
        torch.manual_seed(0)
        model = nn.Sequential(WRAPPINGS[wrapping](fill_(nn.Linear(6, 5), 0)))
        with parametrize.cached():
            if look:
                spectrum(model)
            model(randn(3, 6, seed=1, dtype=torch.float32)).square().mean().backward()
        return [*model.buffers(), *(parameter.grad for parameter in model.parameters())]

    assert all(map(torch.equal, gradients(look=True), gradients(look=False)))


# What computes the weight in a hook, before each forward pass; the attribute is that of the last one.
HOOKS = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.ln_structured(prune.identity(layer, "weight"), "weight", 0.5, n=2, dim=0),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "spectral_norm of a parametrized one": lambda layer: parametrizations.spectral_norm(
        spectral_norm(layer), "weight_orig"
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@given(seed=seeds)
def test_a_weight_that_a_hook_computes_is_that_of_the_parameters_as_they_are(hook, training, seed):
    with torch.random.fork_rng(devices=[]):  # masks, and the vectors of the norms, are drawn at random
        torch.manual_seed(seed)
        layer = HOOKS[hook](fill_(nn.Linear(6, 5), seed))
    model = nn.Sequential(layer)
    with torch.no_grad():  # as load_state_dict and the steps of optimizers do
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + number))
    before = Snapshot(model.train(training))
    found = spectrum(model)["0"].singular_values
    (axes, _) = plot_weights({"layer": layer}).axes
    assert not before.difference()
    model.eval()(randn(1, 6, seed=seed, dtype=torch.float32))
    assert torch.equal(found, spectrum(linear_of(layer.weight.detach()))[""].singular_values)
    assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), layer.weight.detach().double())


@pytest.mark.parametrize(
    "region",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),
    ],
)
def test_the_numbers_are_the_same_in_every_region(region):
    model = two_layers().double()
    expected = spectrum(model)
    with region():
        found = spectrum(model)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.singular_values, other.singular_values)
        assert not one.singular_values.requires_grad
        assert one.first_difference == other.first_difference


def test_training_goes_on_as_if_nobody_had_looked():
    def trained(*, look):
        torch.manual_seed(0)
        model = nn.Sequential(
            fill_(nn.Linear(6, 5), 0), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(5, 4))
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            loss = model(randn(8, 6, seed=step, dtype=torch.float32)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if look:
                spectrum(model)
            optimizer.step()
        return model.state_dict()

    watched, alone = trained(look=True), trained(look=False)
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def with_weight(weight) -> nn.Sequential:
    model = two_layers()
    del model[2].weight
    model[2].weight = weight
    return model


@pytest.mark.parametrize(
    ("error", "message", "model", "options"),
    [
        (TypeError, "model must be a torch.nn.Module, got dict", {}, {}),
        (ValueError, r"ratio must lie strictly between 0 and 1 \(.*\), got 80", two_layers(), {"ratio": 80}),
        (TypeError, "ratio must be a real number, got bool", two_layers(), {"ratio": True}),
        (ValueError, "scheme must be one of 'channel', .* got str 'tucker'", two_layers(), {"scheme": "tucker"}),
        (TypeError, "filter_fn must be a function of", two_layers(), {"filter_fn": "0"}),
        (ValueError, "that filter_fn keeps, got a Sequential", two_layers(), {"filter_fn": lambda module, name: False}),
        (ValueError, "must have a Linear, .* got a ReLU with none", nn.ReLU(), {}),
        (ValueError, "'1.weight' is not initialised .* run one", nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), {}),
        (ValueError, "of layer '2' is on the meta device .* load", with_weight(nn.Parameter(
            torch.ones(4, 5, device="meta"))), {}),
        (ValueError, "of layer '2' holds 2 NaN .* out of 4: repair it, or leave", with_weight(nn.Parameter(
            torch.tensor([[math.nan, 1.0], [2.0, -math.inf]]))), {}),
        (TypeError, "of layer '2' must be of float64, .* got torch.complex64", with_weight(nn.Parameter(
            torch.ones(2, 2, dtype=torch.complex64))), {}),
        (ValueError, r"of layer '2' must have an output .* got shape \(20,\): .* gather", with_weight(nn.Parameter(
            torch.ones(20))), {}),
        (ValueError, "layer '2' must have a tensor as its weight, got None", with_weight(None), {}),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_named(error, message, model, options):
    with pytest.raises(error, match=message):
        spectrum(model, **options)


def test_a_sharded_weight_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise NotImplementedError

    weight = nn.Parameter(torch.ones(4, 5).as_subclass(Sharded))
    with pytest.raises(ValueError, match=r"of layer '2' must be whole, got a sharded one .Sharded.: .*unshard"):
        spectrum(with_weight(weight))


@pytest.mark.parametrize("bad", [0, 1, -0.1, math.nan])
def test_ratios_and_energies_are_checked(bad):
    (found,) = spectrum(nn.Linear(3, 2))
    for method in (found.energy, found.rank_at, found.rank_for):
        with pytest.raises(ValueError, match="must"):
            method(bad)
