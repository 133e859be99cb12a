"""torch.compile on compressed networks: one graph, no more recompilations than the dense network, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.low_rank_networks import NETWORKS, difference, needs_compiler, network
from torchsmooth import restore_dense_

slow = pytest.mark.slow


def graphs_after(model, batches):
    """Compile a model as one graph, run it on batches, and return how many graphs there were after each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for batch in batches:
        assert difference(compiled(batch), model(batch)) <= 1e-5
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("every_form", True),
        ("encoder", False),  # the path that reads linear1.weight
        pytest.param("every_form", False, marks=slow),
        pytest.param("encoder", True, marks=slow),
        pytest.param("resnet", True, marks=slow),
        pytest.param("resnet", False, marks=slow),
    ],
)
def test_there_is_one_graph_and_no_more_recompilations_than_of_the_dense_network(name, gradients):
    model, batch = network(name)
    dense = restore_dense_(copy.deepcopy(model))
    batches = [batch, batch + 1, batch[:2], torch.cat([batch, batch]), torch.cat([batch, batch[:1]])]
    with torch.set_grad_enabled(gradients):
        counts = graphs_after(model, batches)
        assert counts[:2] == [1, 1]
        assert counts == graphs_after(dense, batches)


@slow
def test_training_under_a_compiler_gives_the_gradients_of_plain_training():
    model, batch = network("every_form")
    torch._dynamo.reset()
    gradients = []
    for one in (model.train(), torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        one(batch).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    assert all(difference(gradients[0][key], gradients[1][key]) <= 1e-4 for key in gradients[0])
    assert all(float(gradient.norm()) > 0 for gradient in gradients[1].values())


@needs_compiler
@slow
@pytest.mark.parametrize("name", NETWORKS)
def test_inductor_computes_the_same(name):
    model, batch = network(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(batch), model(batch)) <= 1e-5


@needs_compiler
@slow
def test_inductor_trains_the_same():
    model, batch = network("every_form")
    model(batch).square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(batch).square().sum().backward()
    assert all(difference(parameter.grad, expected[key]) <= 1e-4 for key, parameter in model.named_parameters())
