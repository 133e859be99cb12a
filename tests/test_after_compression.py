"""What is done to a compressed model by those who did not compress it: copied, sent, hooked, pruned, trained on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from tests.low_rank_networks import NETWORKS, difference, every_form, network
from tests.networks import small_resnet
from tests.strategies import randn
from torchsmooth import restore_dense_, svd_compress_
from torchsmooth._lowrank_layer import LowRankLayer

each_network = pytest.mark.parametrize("name", NETWORKS)


def low_rank_layers(model):
    found = [one for one in model.modules() if isinstance(one, LowRankLayer)]
    assert found
    return found


def factors_of(model):
    """List the children that hold a factor."""
    return [getattr(layer, child) for layer in low_rank_layers(model) for child in layer.factor_children]


@each_network
@pytest.mark.parametrize("build", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_share_nothing(name, build):
    model, batch = network(name)
    again, expected = build(model), model(batch)
    assert torch.equal(again(batch), expected)
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.zero_()
    assert torch.equal(model(batch), expected)


def test_a_model_can_be_sent_to_another_process():
    model, batch = network("every_form")
    model.requires_grad_(requires_grad=False)  # or what it puts out could not be sent back
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(model, (batch,)).clone()
    assert difference(there, model(batch)) <= 1e-5


@each_network
def test_hooks_of_every_module_are_called_once_and_change_nothing(name):
    model, batch = network(name)
    expected = model(batch)
    calls = {kind: [] for kind in ("before", "after", "back_before", "back")}
    for module in model.modules():
        module.register_forward_pre_hook(lambda one, inputs: calls["before"].append(one))
        module.register_forward_hook(lambda one, inputs, output: calls["after"].append(one))
        module.register_full_backward_pre_hook(lambda one, after: calls["back_before"].append(one))
        module.register_full_backward_hook(lambda one, before, after: calls["back"].append(one))
    output = model(batch.requires_grad_())
    assert torch.equal(output, expected)
    output.square().sum().backward()
    for layer in low_rank_layers(model):
        for module in layer.modules():
            assert [sum(one is module for one in found) for found in calls.values()] == [1, 1, 1, 1], module


def test_what_a_hook_returns_is_taken():
    model, batch = network("every_form")
    for layer in low_rank_layers(model):
        inputs = []
        handle = layer.register_forward_pre_hook(lambda one, args, inputs=inputs: inputs.append(args[0].detach()))
        model(batch)
        handle.remove()
        hooked = copy.deepcopy(layer)
        hooked.register_forward_pre_hook(lambda one, args: (args[0] + 1,))
        hooked.down.register_forward_hook(lambda one, args, output: 0 * output)
        hooked.register_forward_hook(lambda one, args, output: -output)
        silent = copy.deepcopy(layer)
        with torch.no_grad():
            silent.down.weight.zero_()
        assert torch.equal(hooked(inputs[0]), -silent(inputs[0] + 1))


def test_factors_can_be_pruned_and_merged_afterwards():
    model, batch = network("every_form")
    children = factors_of(model)
    prune.global_unstructured([(child, "weight") for child in children], prune.L1Unstructured, amount=0.4)
    pruned = model(batch)
    weights = [layer.weight.detach() for layer in low_rank_layers(model)]
    with pytest.raises(ValueError, match=r"cannot be merged.*without a plain weight \(quantised, pruned or"):
        restore_dense_(model)
    with pytest.raises(ValueError, match="cannot be filled"):
        low_rank_layers(model)[0].set_factors_(*low_rank_layers(model)[0].factors())
    for child in children:
        prune.remove(child, "weight")
    zeros = sum(int((child.weight == 0).sum()) for child in children)
    assert zeros == pytest.approx(0.4 * sum(child.weight.numel() for child in children), abs=1)
    assert torch.equal(model(batch), pruned)
    assert all(torch.equal(one.weight, other) for one, other in zip(low_rank_layers(model), weights, strict=True))
    assert difference(restore_dense_(model)(batch), pruned) <= 1e-5


def test_factors_can_be_parametrized_and_merged_afterwards():
    model, batch = network("every_form")
    expected = model(batch)
    for child in factors_of(model):
        parametrizations.weight_norm(child)
    assert difference(model(batch), expected) <= 1e-5
    model(batch).square().sum().backward()
    assert all(float(parameter.grad.norm()) > 0 for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="remove_parametrizations makes the others plain again"):
        restore_dense_(model)
    for child in factors_of(model):
        parametrize.remove_parametrizations(child, "weight")
    assert difference(restore_dense_(model)(batch), expected) <= 1e-5


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, lambda layer: prune.identity(layer, "weight")])
def test_the_product_itself_is_no_parameter_that_one_could_wrap(wrap):
    for layer in low_rank_layers(every_form()):
        before = list(layer.state_dict())
        with pytest.raises((ValueError, TypeError)):
            wrap(layer)
        assert list(layer.state_dict()) == before


@each_network
def test_it_can_be_trained_on(name):
    model, batch = network(name)
    model.train()
    target = randn(*model(batch).shape, seed=10, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = (model(batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(float(parameter.grad.norm()) > 0 for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_an_optimizer_from_before_steps_what_was_not_replaced_and_leaves_the_factors():
    model = small_resnet(width=16).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svd_compress_(model, 0.5)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    model(randn(4, 3, 32, 32, seed=0, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    factors = {id(child.weight) for child in factors_of(model)}
    stayed = {name for name, one in model.named_parameters() if torch.equal(one, before[name])}
    assert stayed == {name for name, one in model.named_parameters() if id(one) in factors}


@each_network
def test_autocast_gives_the_dtype_that_it_gives_the_dense_network(name):
    model, batch = network(name)
    dense, expected = restore_dense_(copy.deepcopy(model)), model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        assert output.dtype == dense(batch).dtype
    assert difference(output, expected) <= 5e-2 * float(expected.detach().abs().max())


def plain(named):
    return {name: tensor.detach() for name, tensor in named}


def test_parameters_can_be_passed_to_a_functional_call():
    model, batch = network("every_form")
    other = {name: 0.5 * tensor for name, tensor in plain(model.named_parameters()).items()}
    output = functional_call(model, other, (batch,))
    expected = copy.deepcopy(model)
    expected.load_state_dict(other, strict=False)
    assert torch.equal(output, expected(batch))


@pytest.mark.parametrize("name", ["every_form", "resnet"])
def test_gradients_of_single_samples_add_up(name):
    model, batch = network(name)

    def loss(parameters, inputs):
        return functional_call(model, parameters, (inputs,)).square().sum()

    parameters = plain(model.named_parameters())
    whole = grad(loss)(parameters, batch)
    single = vmap(grad(loss), in_dims=(None, 0))(parameters, batch.unsqueeze(1))
    for key, gradient in whole.items():
        assert difference(single[key].sum(0), gradient) <= 1e-4 * (1 + float(gradient.detach().abs().max()))
        assert float(gradient.norm()) > 0


def test_an_ensemble_of_models_runs_under_vmap():
    models = [every_form() for _ in range(2)]
    _, batch = network("every_form")
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    stacked = stack_module_state(models)
    outputs = vmap(lambda *state: functional_call(models[0], state, (batch,)))(*stacked)
    for output, model in zip(outputs, models, strict=True):
        assert difference(output, model(batch)) <= 1e-5


def test_jacobians_are_those_of_the_dense_network():
    model, batch = network("every_form")
    dense = restore_dense_(copy.deepcopy(model))
    rows = [torch.func.jacrev(one)(batch[:1]) for one in (model, dense)]
    assert difference(*rows) <= 1e-5
    assert float(rows[0].detach().norm()) > 0
