"""What was derived from factors is used only while they are what they were: in eager mode, in graphs and in traces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchsmooth
from tests.networks import COPIES
from tests.strategies import fill_, randn, seeds
from torchsmooth._derive import derive
from torchsmooth._execution import use_

EXECUTIONS = ("dense", "pivoted", "packed", "packed_dense")
OPTIMIZERS = {
    "AdamW": lambda parameters, **options: torch.optim.AdamW(parameters, 0.1, **options),
    "SGD": lambda parameters, **options: torch.optim.SGD(parameters, 0.1, momentum=0.9, **options),
}


def tuned(execution, seed=0, bias=True):
    layer = torchsmooth.LowRankLinear.from_linear(fill_(nn.Linear(24, 20, bias=bias), seed), 6).eval()
    inputs = randn(5, 24, seed=seed + 1, dtype=torch.float32)
    derived = derive(layer, execution, inputs)
    if derived is None:
        pytest.skip("weights cannot be packed here")
    use_(layer, derived)
    return layer, inputs


def is_right(layer, inputs, call=None):
    """Say whether a layer gives what its children do, one after the other."""
    with torch.no_grad():
        expected = layer.up(layer.down(inputs))
        return torch.allclose(
            (layer if call is None else call)(inputs), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


def by_backward(layer, inputs):
    layer.train()(inputs).square().sum().backward()
    layer.eval()


def by_backward_in_eval_mode(layer, inputs):
    layer(inputs).square().sum().backward()


def with_a_metric_before_the_step(layer, inputs):
    layer(inputs).square().sum().backward()
    assert is_right(layer, inputs)


def accumulated(layer, inputs):
    by_backward(layer, inputs)
    by_backward(layer, inputs)
    assert is_right(layer, inputs)


def compiled(layer, inputs):
    torch.compile(layer.train(), backend="eager")(inputs).square().sum().backward()
    layer.eval()


def by_func(layer, inputs):
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(lambda own: torch.func.functional_call(layer, own, (inputs,)).square().sum())(
        parameters
    )
    for name, one in parameters.items():
        one.grad = gradients[name]


def by_hand(layer, inputs):
    for one in layer.parameters():
        one.grad = torch.ones_like(one)


def counted(layer, inputs):
    with FlopCounterMode(display=False):
        by_backward(layer, inputs)


GRADIENTS = (
    by_backward, by_backward_in_eval_mode, with_a_metric_before_the_step, accumulated, compiled, by_func, by_hand,
    counted,
)  # fmt: skip


@pytest.mark.parametrize("gradients", GRADIENTS)
@given(seeds, st.sampled_from(EXECUTIONS), st.sampled_from([*OPTIMIZERS]), st.booleans())
@settings(max_examples=8)
def test_a_step_is_seen_however_the_gradients_came(gradients, seed, execution, optimizer, fused):
    layer, inputs = tuned(execution, seed)
    # A fused optimizer leaves no new version of what it writes to.
    stepping = OPTIMIZERS[optimizer](layer.parameters(), fused=fused)
    before = layer.weight.detach()
    gradients(layer, inputs)
    assert layer.execution == execution  # nothing was stepped
    stepping.step()
    assert not torch.equal(layer.weight, before)
    assert is_right(layer, inputs)
    assert layer.execution == "factored"
    use_(layer, derive(layer, execution, inputs))  # tuned again
    assert is_right(layer, inputs)
    assert layer.execution == execution


class ClearingAdam(torch.optim.Adam):
    """Takes a step, and lets go of the gradients."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_ends_without_gradients_is_seen(fused):
    layer, inputs = tuned("dense")
    optimizer = ClearingAdam(layer.parameters(), lr=0.1, fused=fused)
    by_backward(layer, inputs)
    optimizer.step()
    assert is_right(layer, inputs)
    assert layer.execution == "factored"


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_seen_by_the_layer_whose_factors_it_writes_to_and_by_no_other(way, fused):
    layer, inputs = tuned("dense")
    other = COPIES[way](layer)
    frozen = COPIES[way](layer).requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD([*other.parameters(), *frozen.parameters()], 0.1, fused=fused)
    by_backward(other, inputs)
    optimizer.step()
    assert [one.execution for one in (layer, other, frozen)] == ["dense", "factored", "dense"]
    assert all(is_right(one, inputs) for one in (layer, other, frozen))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("fused", [True, False])
def test_the_steps_of_a_compiled_optimizer_are_seen(fused):
    layer, inputs = tuned("dense")
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=fused)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        by_backward(layer, inputs)
        step()
        assert is_right(layer, inputs)
        assert layer.execution == "factored"
        use_(layer, derive(layer, "dense", inputs))
        assert is_right(layer, inputs)


def load(layer):
    layer.load_state_dict({name: one + 1 for name, one in layer.state_dict().items()})


def load_by_assigning(layer):
    layer.load_state_dict({name: one + 1 for name, one in layer.state_dict().items()}, assign=True)


def step(layer, **options):
    optimizer = torch.optim.SGD(layer.parameters(), 0.5, **options)
    by_hand(layer, None)
    optimizer.step()


CHANGES = {
    "load_state_dict": load,
    "load_state_dict by assigning": load_by_assigning,
    "a step": step,
    "a fused step": lambda layer: step(layer, fused=True),
    "another parameter": lambda layer: setattr(layer.up, "weight", nn.Parameter(layer.up.weight.detach() * 2)),
    "pruned": lambda layer: torch.nn.utils.prune.random_unstructured(layer.down, "weight", amount=0.5),
    "to and fro": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@given(seeds, st.sampled_from(EXECUTIONS), st.lists(st.sampled_from([*CHANGES]), max_size=1))
@settings(max_examples=6, deadline=None)
def test_a_compiled_graph_is_made_anew_once_the_factors_are_others(change, seed, execution, earlier):
    torch.compiler.reset()
    layer, inputs = tuned(execution, seed)
    graph = torch.compile(layer, backend="eager", fullgraph=True)
    for one in (*earlier, change):
        assert is_right(layer, inputs, graph)
        if not layer.up._forward_pre_hooks and not layer.down._forward_pre_hooks:
            CHANGES[one](layer)
    assert is_right(layer, inputs, graph)
    assert is_right(layer, inputs)


def test_a_compiled_graph_takes_the_parameters_of_a_functional_call():
    layer, inputs = tuned("dense")
    graph = torch.compile(lambda own: torch.func.functional_call(layer, own, (inputs,)), backend="eager")
    own = dict(layer.named_parameters())
    doubled = {name: 2 * one.detach() for name, one in own.items()}
    with torch.no_grad():
        for parameters in (own, doubled, own):
            expected = torch.func.functional_call(layer, parameters, (inputs,))
            assert torch.allclose(graph(parameters), expected, rtol=1e-4, atol=1e-4)


def test_a_state_dict_of_another_part_of_the_model_leaves_a_layer_merged():
    layer, inputs = tuned("dense")
    model = nn.Sequential(layer, nn.Linear(20, 3)).eval()
    model.load_state_dict({"1.bias": torch.ones(3)}, strict=False)
    assert layer.execution == "dense"
    model.load_state_dict({"0.up.bias": torch.ones(20)}, strict=False)
    assert layer.execution == "factored"
    assert is_right(layer, inputs)


ADDED = {
    "a bias of the second factor": lambda layer: setattr(layer.up, "bias", nn.Parameter(torch.ones(20))),
    "a bias of the first factor": lambda layer: setattr(layer.down, "bias", nn.Parameter(torch.ones(6))),
    "a forward": lambda layer: setattr(layer.down, "forward", lambda inputs: inputs[..., :6]),
}


@pytest.mark.parametrize("added", ADDED)
@given(seeds, st.sampled_from(EXECUTIONS), st.sampled_from([None, *COPIES]))
@settings(max_examples=12)
def test_what_is_added_to_a_child_is_seen(added, seed, execution, way):
    layer, inputs = tuned(execution, seed, bias=False)
    layer = layer if way is None else COPIES[way](layer)
    assert layer.execution == execution
    ADDED[added](layer)
    assert is_right(layer, inputs)
    assert layer.execution == "factored"


def load_under_inference_mode(layer):
    with torch.inference_mode():
        other = COPIES["torch.save"](layer)
        load(other)
    return other


def copy_under_inference_mode(layer):
    with torch.inference_mode():
        other = COPIES["deepcopy"](layer)
        for one in other.parameters():
            one.mul_(2)
    return other


def move_under_inference_mode(layer):
    with torch.inference_mode():
        layer.double().float()
        layer.down.weight.mul_(2)
    return layer


@pytest.mark.parametrize("make", [load_under_inference_mode, copy_under_inference_mode, move_under_inference_mode])
@given(seeds, st.sampled_from(EXECUTIONS))
@settings(max_examples=6)
def test_factors_without_versions_are_run_as_they_are(make, seed, execution):
    layer, inputs = tuned(execution, seed)
    other = make(layer)
    with torch.inference_mode():
        assert is_right(other, inputs)
    assert other.execution == "factored"


def test_layers_that_were_made_in_inference_mode_stay_as_they_are_stored():
    with torch.inference_mode():
        model = fill_(nn.Sequential(nn.Linear(24, 20)), 0).eval()
        torchsmooth.svd_compress_(model, 0.3, form="factored")
        model.to(memory_format=torch.channels_last)._apply(torch.clone)
        inputs = torch.zeros(2, 24)
        report = torchsmooth.tune_(model, inputs)
        load(model[0])
        assert is_right(model[0], inputs)
    assert report.layers[0].note.startswith("as stored: a LowRankLinear made under torch.inference_mode()")
    assert set(report.layers[0].seconds) == {"factored"}


@given(seeds, st.sampled_from([None, ["dense"], []]), st.booleans())
@settings(max_examples=10)
def test_a_model_that_is_tuned_in_inference_mode_is_an_ordinary_one(seed, executions, last):
    model = fill_(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), seed).eval()
    torchsmooth.svd_compress_(model, 0.3)
    inputs = randn(1, 4, 6, 6, seed=seed, dtype=torch.float32)
    with torch.inference_mode():
        torchsmooth.tune_(model, inputs, executions=executions, memory_format="auto" if last else "keep")
    assert not any(map(torch.is_inference, model.parameters()))
    model.requires_grad_(requires_grad=False)
    model(inputs.requires_grad_()).sum().backward()
    model.requires_grad_().train()
    model(inputs).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda model: torch.jit.trace(model, torch.ones(1, 24))])
@pytest.mark.parametrize("frozen", [True, False])
@given(seeds, st.sampled_from(EXECUTIONS))
@settings(max_examples=6)
def test_a_trace_holds_the_parameters_and_runs_them(trace, frozen, seed, execution):
    layer, inputs = tuned(execution, seed)
    model = nn.Sequential(layer).requires_grad_(requires_grad=not frozen)
    with torch.no_grad():
        traced = trace(model)
        assert layer.execution == execution
        assert set(traced.state_dict()) == set(model.state_dict())
        assert is_right(layer, inputs, traced)
        load(model)
        traced.load_state_dict(model.state_dict())
        assert is_right(layer, inputs, traced)


HOOKS = {
    "a hook": lambda one: one.register_forward_hook(lambda module, inputs, output: 2 * output),
    "a hook before": lambda one: one.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],)),
}


@pytest.mark.parametrize("child", ["down", "up"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hooks_of_a_child_are_called(execution, hook, child):
    layer, inputs = tuned(execution)
    handle = HOOKS[hook](getattr(layer, child))
    assert layer.execution == "factored"
    assert is_right(layer, inputs)
    handle.remove()
    assert is_right(layer, inputs)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_is_written_into_a_factor_is_seen(execution):
    layer, inputs = tuned(execution)
    with torch.no_grad():
        layer.down.weight.mul_(2)
        assert layer.execution == "factored"
        assert is_right(layer, inputs)
