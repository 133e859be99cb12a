"""Packed weights: what they compute is what the factors do, and where they could not, the factors are run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import torchsmooth
from tests.networks import COPIES
from tests.strategies import convolutions, fill_, low_rank, randn, seeds
from torchsmooth import _packed
from torchsmooth._derive import derive
from torchsmooth._execution import derived_of, use_
from torchsmooth._packed import why_not_packed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch runs without oneDNN")

PACKED = ("packed", "packed_dense")


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def error(found, expected):
    """Return by what share of its largest value a result is off."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def packed_layer(kind="convolution", execution="packed_dense", dtype=torch.float32):
    """Make a layer that is run with packed weights, and inputs for it."""
    if kind == "linear":
        dense, inputs = nn.Linear(24, 20), randn(3, 2, 24, seed=1)
    else:
        dense, inputs = nn.Conv2d(12, 16, 3, padding=1, stride=2), randn(2, 12, 9, 8, seed=1)
    layer = KINDS[kind](fill_(dense.to(dtype), 0))
    inputs = inputs.to(dtype)
    with torch.no_grad():
        use_(layer.eval(), derive(layer, execution, inputs))
    assert layer.execution == execution
    return layer, inputs


KINDS = {
    "linear": lambda dense: torchsmooth.LowRankLinear.from_linear(dense, 5),
    "convolution": lambda dense: torchsmooth.LowRankConv2d.from_conv2d(dense, 5),
    "pivoted": lambda dense: torchsmooth.LowRankConv2d.from_conv2d(dense, 5, form="pivoted"),
    "tucker": lambda dense: torchsmooth.TuckerConv2d.from_conv2d(dense, (4, 5)),
}


def is_packed(layer, inputs):
    """Say whether a call is run with packed weights: by whether the operator is called."""
    derived = derived_of(layer)
    calls = []
    whole = derived.run
    derived.run = lambda *args: calls.append(0) or whole(*args)
    try:
        layer(inputs)
    finally:
        derived.run = whole
    return bool(calls)


@given(convolutions(), st.integers(1, 3), st.integers(0, 3), st.data())
@settings(max_examples=60)
def test_a_packed_convolution_computes_the_same_for_inputs_of_any_size(case, batch, larger, data):
    dense, inputs = case
    layer = low_rank(dense, data).eval()
    shape = (batch, inputs.shape[-3], inputs.shape[-2] + larger, inputs.shape[-1] + 2 * larger)
    others = [inputs if inputs.dim() == 4 else inputs.unsqueeze(0), randn(*shape, seed=1)]
    expected = [run(layer, one) for one in others]  # in float64
    layer.float()
    for execution in PACKED:
        derived = derive(layer, execution, others[0].float())
        if derived is None:  # the operator knows no other padding, and no pivots
            children = [layer.to_dense()] if execution == "packed_dense" or layer.form == "factored" else []
            assert layer.padding_mode != "zeros" or isinstance(layer.padding, str) or not children
            continue
        use_(layer, derived)
        for one, wanted in zip(others, expected, strict=True):
            for inputs in (one.float(), one.float().to(memory_format=torch.channels_last), one.float().mT.mT):
                found = run(layer, inputs)
                assert found.shape == wanted.shape
                assert error(found, wanted) < 1e-4
        use_(layer, None)


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_a_packed_linear_layer_computes_the_same(seed, inside, outside, bias, dtype):
    dense = fill_(nn.Linear(inside, outside, bias=bias, dtype=torch.float64), seed).to(dtype)
    layer = torchsmooth.LowRankLinear.from_linear(dense, max(1, min(inside, outside) // 2)).eval()
    for shape in ((inside,), (1, inside), (3, 5, inside), (0, inside)):
        inputs = randn(*shape, seed=seed).to(dtype)
        expected = run(copy.deepcopy(layer).double(), inputs.double())
        for execution in PACKED:
            derived = derive(layer, execution, randn(7, inside, seed=seed).to(dtype))
            if derived is None:
                assert dtype == torch.bfloat16  # not every processor has such kernels
                continue
            use_(layer, derived)
            found = run(layer, inputs)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            assert not found.numel() or error(found, expected) < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("execution", PACKED)
def test_each_kind_of_layer_is_packed(kind, execution):
    layer, inputs = packed_layer(kind, execution)
    with torch.no_grad():
        assert is_packed(layer, inputs)
        found = layer(inputs)
        keys = list(layer.state_dict())
        use_(layer, None)
        assert error(found, layer(inputs).double()) < 1e-5
        assert list(layer.state_dict()) == keys
    if found.dim() == 4:
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # by torch.func.jvp
def test_what_the_operators_cannot_do_is_run_by_the_factors(kind):
    layer, inputs = packed_layer(kind)
    factors = copy.deepcopy(layer)
    use_(factors, None)
    assert not is_packed(layer, inputs)  # gradients of the factors
    layer.requires_grad_(requires_grad=False)
    assert not is_packed(layer, inputs)  # gradients of the inputs
    inputs.requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0
    inputs.requires_grad_(requires_grad=False)
    with torch.no_grad():
        assert is_packed(layer, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_packed(layer, inputs)
            assert layer(inputs).dtype == torch.bfloat16
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, torch.ones_like(inputs)))).tangent
            assert tangent.abs().sum() > 0
        mapped = torch.func.vmap(layer)(inputs.unsqueeze(0))[0]
        assert error(mapped, layer(inputs).double()) < 1e-5
        _, product = torch.func.jvp(layer, (inputs,), (torch.ones_like(inputs),))
        assert torch.allclose(product, tangent, atol=1e-5)
        with pytest.raises(RuntimeError):
            layer(inputs.double())
        with pytest.raises(RuntimeError):
            layer(inputs[:, :3] if kind == "convolution" else inputs[..., :3])
    with torch.inference_mode():
        assert is_packed(layer, inputs)
    layer.train()
    assert not is_packed(layer, inputs)


def test_a_padding_that_was_set_later_counts():
    layer, inputs = packed_layer()
    use_(layer, None)
    layer.down.padding = (2, 0)
    with torch.no_grad():
        expected = layer(inputs)
        use_(layer, derive(layer, "packed", inputs))
        assert is_packed(layer, inputs)
        assert error(layer(inputs), expected.double()) < 1e-5


def test_a_convolution_takes_one_image_without_a_batch():
    layer, inputs = packed_layer()
    expected = run(layer, inputs)[0]
    assert error(run(layer, inputs[0]), expected.double()) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("execution", PACKED)
def test_multiply_adds_of_packed_layers_are_counted(kind, execution):
    layer, inputs = packed_layer(kind, execution)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        layer(inputs)
    use_(layer, None)
    with torch.no_grad(), FlopCounterMode(display=False) as expected:
        layer(inputs)
    assert counted.get_total_flops() == expected.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["linear", "convolution", "tucker"])
@pytest.mark.parametrize("execution", PACKED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_packed_layers_are_compiled_exported_and_traced(kind, execution):
    layer, inputs = packed_layer(kind, execution)
    expected = run(layer, inputs).double()
    model = nn.Sequential(layer)
    with torch.no_grad():
        torch.compiler.reset()  # it may have given up on this forward in another test of this process
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert error(compiled(inputs), expected) < 1e-5
        layer.up.weight.mul_(2)
        changed = model(inputs)
        assert error(compiled(inputs), changed.double()) < 1e-5 or execution == "packed_dense"  # as with "dense"
        layer.up.weight.div_(2)
        use_(layer, derive(layer, execution, inputs))
        for program in (torch.export.export(model, (inputs,)).module(), torch.jit.trace(model, inputs)):
            assert error(program(inputs), expected) < 1e-5
        assert error(torch.fx.symbolic_trace(model)(inputs), expected) < 1e-5


def test_a_merged_layer_is_dense_in_what_is_compiled():
    layer, inputs = packed_layer()
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend=note)
        found = compiled(inputs)
        assert is_packed(layer, inputs)  # still, where it is called as it is
        assert error(found, layer(inputs).double()) < 1e-5
    assert sum(node.op == "call_function" for node in graphs[0].graph.nodes) == 1
    assert compiled(inputs).shape == found.shape
    assert len(graphs) <= 2  # with gradients it is another graph


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_packed_on_their_own(kind, way):
    layer, inputs = packed_layer(kind, "packed")
    expected = run(layer, inputs)
    other = COPIES[way](layer)
    with torch.no_grad():
        layer.up.weight.zero_()
        assert layer.execution == layer.form
        assert other.execution == "packed"
        assert is_packed(other, inputs)
        assert error(other(inputs), expected.double()) < 1e-6


def test_a_copy_is_run_by_its_factors_where_there_are_no_such_kernels(monkeypatch):
    layer, inputs = packed_layer()
    saved = pickle.dumps(layer)

    def fail(*_):
        raise RuntimeError("not built with oneDNN")

    monkeypatch.setattr(_packed._Step, "of", fail)
    assert derive(layer, "packed", inputs) is None
    other = pickle.loads(saved)
    with torch.no_grad():
        assert not is_packed(other, inputs)
        assert other.execution == other.form
        assert error(other(inputs), layer(inputs).double()) < 1e-5
        again = pickle.loads(pickle.dumps(other))
        assert again.execution == again.form
        assert error(again(inputs), layer(inputs).double()) < 1e-5


def test_kernels_that_compute_something_else_are_not_used(monkeypatch):
    layer, inputs = packed_layer()
    whole = _packed._Step.call
    monkeypatch.setattr(_packed._Step, "call", lambda step: lambda values: whole(step)(values) * 1.001)
    assert derive(layer, "packed_dense", inputs) is None


def test_what_is_packed_stays_where_it_was_packed():
    layer, inputs = packed_layer()
    expected = run(layer, inputs).double()
    layer.to("cpu").float().to(memory_format=torch.preserve_format)
    with torch.no_grad():
        assert layer.execution == "packed_dense"
        assert is_packed(layer, inputs)
    layer.double()
    assert layer.execution == "factored"
    assert error(run(layer, inputs.double()), expected) < 1e-5
    layer.float()
    assert error(run(layer, inputs), expected) < 1e-5


@pytest.mark.parametrize(
    ("layer", "inputs", "reason"),
    [
        (nn.Linear(4, 4), "text", "for ordinary tensors in float32"),
        (nn.Linear(4, 4).double(), torch.zeros(1, 4, dtype=torch.float64), "for ordinary tensors in float32"),
        (nn.Linear(4, 4), torch.zeros(1, 4, device="meta"), "for ordinary tensors in float32"),
        (nn.Conv1d(4, 4, 1), torch.zeros(1, 4, 1), "a Conv1d is no plain Conv2d or Linear"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 4, 4, 4), "pad with zeros"),
        (nn.Conv2d(4, 4, 2, padding="same"), torch.zeros(1, 4, 4, 4), "as many on either side"),
        (nn.Conv2d(4, 4, 3), torch.zeros(4, 4, 4), "take batches"),
        (nn.Conv2d(4, 4, 3, padding="same"), torch.zeros(1, 4, 4, 4), ""),
    ],
)
def test_there_is_a_reason_where_weights_are_not_packed(layer, inputs, reason):
    found = why_not_packed([layer], inputs)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_weights_are_not_packed_where_onednn_is_turned_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert why_not_packed([nn.Linear(4, 4)], torch.zeros(1, 4)) == "this torch runs without oneDNN"


def test_tuning_packs_weights_and_changes_no_result():
    model = nn.Sequential(fill_(nn.Conv2d(8, 16, 3), 0), nn.ReLU(), nn.Flatten(), fill_(nn.Linear(16 * 16, 32), 1))
    inputs = randn(2, 8, 6, 6, seed=0, dtype=torch.float32)
    torchsmooth.svd_compress_(model.eval(), 0.6)
    expected, keys = run(model, inputs), list(model.state_dict())
    report = torchsmooth.tune_(model, inputs, executions=["packed"])
    assert any("packed" in one.seconds for one in report.layers)
    assert "packed ms" in str(report)
    assert list(model.state_dict()) == keys
    assert error(run(model, inputs), expected.double()) < 1e-5
