"""``attach_``: whatever the model and the optimizer, the same parameters as with the penalties in the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.networks import EVERY_LAYER, Shared, Tied
from tests.strategies import fill_, seeds
from tests.training import (
    assert_same_parameters,
    differ,
    double_layers,
    pull,
    sgd,
    smoothed,
    squares,
    trained,
)
from torchsmooth import (
    FirstDerivative,
    NuclearNorm,
    SecondDerivative,
    attach_,
    penalty_loss,
    register_penalty,
    remove_penalties,
)

few = settings(max_examples=3)


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01, **options)


def muon(parameters):
    # Muon takes matrices only.
    return torch.optim.Muon([one for one in parameters if one.dim() == 2], lr=0.02)


OPTIMIZERS = {
    "sgd": sgd,
    "nesterov": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd_foreach": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, foreach=True),
    "sgd_fused": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, fused=True),
    "adamw": adamw(),
    "adamw_foreach": adamw(foreach=True),
    "adamw_fused": adamw(fused=True),
    "amsgrad": adamw(amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "muon": muon,
}


def agree(make, make_optimizer=sgd, *, loss=squares, **tolerance):
    """Train two models that ``make`` makes alike, in the two ways, and compare."""
    attached = trained(make(), make_optimizer, attach=True, loss=loss)
    assert_same_parameters(attached, trained(make(), make_optimizer, attach=False, loss=loss), **tolerance)
    return attached


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@few
@given(seed=seeds)
def test_every_optimizer_ends_where_it_does_with_the_penalties_in_the_loss(optimizer, seed):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    # Muon orthogonalises in bfloat16, where rounding of the gradient may be seen.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if optimizer == "muon" else {}
    model = agree(lambda: double_layers(seed), OPTIMIZERS[optimizer], **tolerance)
    without = remove_penalties(double_layers(seed))
    assert differ(model, trained(without, OPTIMIZERS[optimizer], attach=False))


@pytest.mark.parametrize("layer", EVERY_LAYER)
@few
@given(seed=seeds)
def test_every_layer_ends_where_it_does_with_the_penalties_in_the_loss(layer, seed):
    agree(lambda: smoothed(fill_(EVERY_LAYER[layer]().double(), seed)), loss=pull)


def test_row_that_pads_an_embedding_gets_nothing():
    model = smoothed(fill_(EVERY_LAYER["embedding"]().double(), 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_(optimizer, model)
    model(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    assert not model.weight.grad[0].any()
    assert model.weight.grad[1:].all()


def sparse_embedding():
    return smoothed(fill_(nn.Embedding(6, 3, padding_idx=1, sparse=True).double(), 0))


def looked_up(model, step):
    return model(torch.tensor([step % 6, 4, 4])).square().sum()


def test_sparse_gradient_of_an_embedding_becomes_dense_as_autograd_has_it():
    plain_sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    model = agree(sparse_embedding, plain_sgd, loss=looked_up)
    assert model.weight.grad.layout == torch.strided


def test_optimizer_for_sparse_gradients_alone_says_so_either_way():
    for attach in (True, False):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            trained(sparse_embedding(), torch.optim.SparseAdam, attach=attach, loss=looked_up)


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
}


class Halved(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, weight):
        return self.scale * weight


@pytest.mark.parametrize("name", PARAMETRIZED)
@few
@given(seed=seeds)
def test_gradient_reaches_what_a_weight_is_computed_from(name, seed):
    def make():
        model = fill_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)).double(), seed)
        torch.manual_seed(0)  # spectral_norm starts from random vectors
        PARAMETRIZED[name](model[0])
        return smoothed(model)

    # The Frobenius norm of an orthogonal weight is constant: its penalties leave rounding, and nothing to compare.
    agree(make, rtol=1e-7, atol=1e-9)


def test_parametrization_that_two_layers_share_gets_both_gradients():
    def make():
        model, shared = fill_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)).double(), 0), Halved()
        for layer in model:
            parametrize.register_parametrization(layer, "weight", shared)
        return smoothed(model)

    agree(make)


def test_attaching_does_not_compute_parametrized_tensors():
    # It would move the power iteration of spectral_norm.
    model = parametrizations.spectral_norm(fill_(nn.Linear(20, 20).double(), 0), n_power_iterations=1)
    smoothed(model, FirstDerivative(0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attach_(sgd(model.parameters()), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weight_computed_once_and_for_all_is_named():
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 5)))
    register_penalty(model[0], "weight", FirstDerivative(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    squares(model, 0).backward()
    with pytest.raises(ValueError, match=r"FirstDerivative on tensor 'weight' of '0' \(Linear\).*parametrizations"):
        optimizer.step()


@few
@given(seed=seeds)
def test_tied_weights_and_shared_modules_count_once(seed):
    tokens = torch.arange(12).reshape(3, 4)
    agree(lambda: smoothed(fill_(Tied().double(), seed)), loss=lambda model, _: model(tokens).square().mean())
    agree(lambda: smoothed(fill_(Shared().double(), seed)), loss=pull)


def test_frozen_parameters_get_no_gradient():
    model = double_layers()
    model[0].weight.requires_grad_(requires_grad=False)
    before = model[0].weight.clone()
    trained(model, attach=True)
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


def test_parameters_thawed_later_count_from_then_on():
    model = double_layers().requires_grad_(requires_grad=False)
    model[2].bias.requires_grad_()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    optimizer.step()
    assert model[0].weight.grad is None
    model.requires_grad_()
    optimizer.step()
    assert model[0].weight.grad.any()


def test_frozen_parametrization_is_left_alone():
    model = smoothed(parametrizations.weight_norm(fill_(nn.Linear(6, 5), 0)), FirstDerivative(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    model.requires_grad_(requires_grad=False)
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parametrization_frozen_in_part_is_trained_in_part():
    def make():
        model = smoothed(parametrizations.weight_norm(fill_(nn.Linear(6, 5).double(), 0)), FirstDerivative(0.1))
        model.parametrizations.weight.original1.requires_grad_(requires_grad=False)
        return model

    model = agree(make)
    assert model.parametrizations.weight.original0.grad is not None
    assert model.parametrizations.weight.original1.grad is None


def test_parameters_of_no_optimizer_get_no_gradient():
    model = double_layers()
    optimizer = sgd(model[2].parameters())
    attach_(optimizer, model)
    optimizer.step()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_two_optimizers_share_a_model_as_one_would_have_it():
    def split(model):
        first, second = sgd(model[0].parameters()), torch.optim.AdamW(model[2].parameters(), lr=0.01)
        return first, second

    attached, reference = double_layers(), double_layers()
    for model, attach in ((attached, True), (reference, False)):
        both = split(model)
        handles = [attach_(optimizer, model) for optimizer in both if attach]
        for step in range(4):
            model.zero_grad()
            (squares(model, step) + (0.0 if attach else penalty_loss(model))).backward()
            for optimizer in both:
                optimizer.step()
        assert [handle.step for handle in handles] == [4, 4] * attach
    assert_same_parameters(attached, reference)


def test_parametrized_weight_whose_parameters_two_optimizers_share():
    def make():
        return smoothed(parametrizations.weight_norm(fill_(nn.Linear(6, 5).double(), 0)), FirstDerivative(0.1))

    attached, reference = make(), make()
    for model, attach in ((attached, True), (reference, False)):
        both = [
            sgd([model.bias, model.parametrizations.weight.original0]),
            sgd([model.parametrizations.weight.original1]),
        ]
        for optimizer in both:
            _ = attach and attach_(optimizer, model)
        model.zero_grad()
        (squares(model, 0) + (0.0 if attach else penalty_loss(model))).backward()
        # Both at once: after the first step the weight is another one.
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step()
    for one, other in zip(attached.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_not_there_are_made(set_to_none):
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    expected = torch.autograd.grad(penalty_loss(model), [model[0].weight, model[2].weight])
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    torch.testing.assert_close((model[0].weight.grad, model[2].weight.grad), expected)
    assert model[0].bias.grad is None


def test_gradients_keep_no_graph_and_their_storage():
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    squares(model, 0).backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name]  # views of the buckets of DistributedDataParallel stay such
        assert parameter.grad.grad_fn is None
        assert not parameter.grad.requires_grad


def test_gradients_of_biases_are_those_of_the_loss():
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    squares(model, 0).backward()
    before = [model[0].bias.grad.clone(), model[2].bias.grad.clone()]
    optimizer.step()
    assert all(map(torch.equal, before, [model[0].bias.grad, model[2].bias.grad]))


def test_mixed_dtypes_end_where_they_do_with_the_penalties_in_the_loss():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.single, self.narrow = nn.Linear(6, 5).double(), nn.Linear(5, 5), nn.Linear(5, 4).bfloat16()

        def forward(self, x):
            return self.narrow(self.single(self.wide(x).float()).bfloat16()).float()

    make = lambda: smoothed(fill_(Mixed(), 0))  # noqa: E731
    attached = trained(make(), attach=True)
    reference = trained(make(), attach=False)
    assert {parameter.grad.dtype for parameter in attached.parameters()} == {
        torch.float64,
        torch.float32,
        torch.bfloat16,
    }
    # A few roundings of bfloat16, which the gradients that follow carry into the other layers.
    assert_same_parameters(attached, reference, rtol=0.02, atol=0.01)


def test_channels_last_weights_keep_their_strides():
    def make():
        conv = fill_(nn.Conv2d(4, 6, 3, groups=2).double(), 0).to(memory_format=torch.channels_last)
        return smoothed(conv)

    model = agree(make, loss=pull)
    assert model.weight.grad.stride() == model.weight.stride()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    optimizer.zero_grad()
    optimizer.step()
    assert model.weight.grad.stride() == model.weight.stride()


class Nested(nn.Module):
    """Penalised layers in dictionaries and lists, and a parameter of the module's own."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(6, 5)]), "b": nn.Sequential(nn.Linear(6, 5))})
        self.mixing = nn.Parameter(torch.empty(5, 5))

    def forward(self, x):
        return (self.branches["a"][0](x) + self.branches["b"](x)) @ self.mixing


def test_penalties_of_all_modules_and_names_are_found():
    make = lambda: register_penalty(smoothed(fill_(Nested().double(), 0)), "mixing", NuclearNorm(0.1))  # noqa: E731
    agree(make)


def test_compiled_model_ends_where_the_plain_one_does():
    attached = trained(torch.compile(double_layers(), backend="aot_eager"), attach=True)
    assert_same_parameters(attached._orig_mod, trained(double_layers(), attach=False))


def test_model_compiled_after_attaching_ends_where_the_plain_one_does():
    model = double_layers()
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        optimizer.zero_grad()
        squares(compiled, step).backward()
        optimizer.step()
    assert_same_parameters(model, trained(double_layers(), attach=False))


def test_parameters_added_to_the_optimizer_later_count_from_then_on():
    model = double_layers()
    optimizer = sgd(model[0].parameters())
    attach_(optimizer, model)
    optimizer.step()
    assert model[2].weight.grad is None
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step()
    assert model[2].weight.grad is not None


def test_penalties_registered_and_removed_later_count_from_the_next_step():
    model, reference = double_layers(0, FirstDerivative(0.1)), double_layers(0, FirstDerivative(0.1))
    optimizers = [sgd(one.parameters()) for one in (model, reference)]
    attach_(optimizers[0], model)
    for step in range(6):
        for one, optimizer in zip((model, reference), optimizers, strict=True):
            if step == 2:
                register_penalty(one[0], "weight", SecondDerivative(0.2))
            if step == 4:
                remove_penalties(one)
            optimizer.zero_grad()
            (squares(one, step) + (penalty_loss(one) if one is reference else 0.0)).backward()
            optimizer.step()
    assert_same_parameters(model, reference)


MAXIMISING = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01),
}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("optimizer", MAXIMISING)
@few
@given(seed=seeds)
def test_parameters_that_are_maximised_become_smooth_too(optimizer, computed, seed):
    models = []
    for attach, maximize in ((True, False), (True, True), (True, "second"), (False, False)):
        model = double_layers(seed)
        if computed:
            parametrizations.weight_norm(model[0])
        groups = [{"params": list(layer.parameters()), "maximize": maximize is True} for layer in (model[0], model[2])]
        groups[1]["maximize"] = bool(maximize)
        steps = MAXIMISING[optimizer](groups)
        if attach:
            attach_(steps, model)
        for step in range(4):
            model.zero_grad()
            (squares(model, step) + (0.0 if attach else penalty_loss(model))).backward()
            for group in groups:  # what is descended by one is climbed by its negative
                for one in group["params"] if group["maximize"] else ():
                    one.grad.neg_()
            steps.step()
        models.append(model)
    for one in models[:-1]:
        assert_same_parameters(one, models[-1])


@given(seed=seeds)
@settings(max_examples=5)
def test_of_a_value_that_is_maximised_the_penalties_are_taken_off(seed):
    model = double_layers(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, maximize=True)
    attach_(optimizer, model)
    expected = (squares(model, 0) - penalty_loss(model)).item()
    assert optimizer.step(lambda: squares(model, 0)).item() == pytest.approx(expected)


def test_no_random_number_is_drawn():
    model = double_layers()
    optimizer = sgd(model.parameters())
    before = torch.get_rng_state()
    attach_(optimizer, model)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


class Derived(torch.optim.SGD):
    """Calls the step of the class it was derived from."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("boom")
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_another_class_counts_once(with_closure):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # whose step torch wraps, too
    found = []
    for cls in (torch.optim.SGD, Derived):
        model = fill_(nn.Linear(4, 4), 0)
        register_penalty(model, "weight", FirstDerivative(0.1))
        optimizer = cls(model.parameters(), lr=1.0)
        handle = attach_(optimizer, model)
        for _ in range(3):
            model.zero_grad()
            optimizer.step(*([lambda model=model: model.weight.sum() * 0] if with_closure else []))
        assert handle.step == 3
        found.append(model.weight.detach())
    assert torch.equal(*found)


def test_a_step_that_failed_does_not_keep_the_next_from_counting():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = fill_(nn.Linear(4, 4), 0)
    register_penalty(model, "weight", FirstDerivative(0.1))
    optimizer = Derived(model.parameters(), lr=1.0)
    handle = attach_(optimizer, model)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step()
    optimizer.fails = False
    model.zero_grad()
    before = model.weight.detach().clone()
    optimizer.step()
    assert handle.step == 1
    assert not torch.equal(model.weight, before)


class FussyError(ValueError):
    """Wants two arguments, as errors of other libraries do."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


class Failing(FirstDerivative):
    """Cannot be evaluated."""

    def gradients(self, weights):
        raise FussyError("this", "that")


def test_an_error_of_ones_own_penalty_keeps_its_words():
    model = nn.Linear(4, 4)
    register_penalty(model, "weight", Failing(0.1))
    optimizer = sgd(model.parameters())
    attach_(optimizer, model)
    with pytest.raises(ValueError, match="weight.*this: that"):
        optimizer.step()
