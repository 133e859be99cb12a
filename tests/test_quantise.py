"""Low rank × int8: torchao quantises the factors of a compressed model as it would any linear layer."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn

from tests.low_rank_networks import difference, network
from tests.networks import mlp, same, snapshot
from tests.strategies import fill_, randn
from torchsmooth import LowRankLinear, load_compressed_, restore_dense_, svd_compress_

quantization = pytest.importorskip("torchao.quantization")
CONFIGS = {
    "weight_only": quantization.Int8WeightOnlyConfig,
    "dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
}
each_config = pytest.mark.parametrize("config", CONFIGS)
SIZES = (64, 96, 64, 10)


def small_mlp(form="auto"):
    model = mlp(0, SIZES)
    svd_compress_(model, 0.5, form=form)
    assert sum(isinstance(layer, LowRankLinear) for layer in model) >= 2
    return model


def quantised(model, config="weight_only"):
    again = copy.deepcopy(model)
    quantization.quantize_(again, CONFIGS[config]())
    return again


def is_int8(linear):
    return type(linear.weight).__name__ not in {"Tensor", "Parameter"} and type(linear) is nn.Linear


def in_floats(small, model):
    """Return a copy of a model with the values that the int8 weights of another stand for."""
    again = copy.deepcopy(model)
    for module, other in zip(again.modules(), small.modules(), strict=True):
        if type(module) is nn.Linear:
            with torch.no_grad():
                module.weight.copy_(other.weight.dequantize())
    return again


@each_config
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_every_factor_becomes_int8_and_little_is_lost(form, config):
    model, inputs = small_mlp(form), randn(20, 64, seed=1, dtype=torch.float32)
    small = quantised(model, config)
    expected = model(inputs)
    assert difference(small(inputs), expected) <= 0.05 * float(expected.detach().abs().max())
    if config == "weight_only":
        assert difference(small(inputs), in_floats(small, model)(inputs)) <= 1e-5
    linears = [module for module in small.modules() if type(module) is nn.Linear]
    assert len(linears) == sum(type(module) is nn.Linear for module in model.modules())
    assert all(is_int8(linear) for linear in linears)
    assert [type(layer) for layer in small] == [type(layer) for layer in model]


@each_config
def test_a_transformer_runs_in_every_mode(config):
    model, batch = network("encoder")
    small = quantised(model, config)
    assert Counter(map(type, small.modules())) == Counter(map(type, model.modules()))
    expected = model(batch)
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):  # in eval mode without: what reads linear1.weight
                assert difference(small.train(training)(batch), expected) <= 0.05 * float(expected.detach().abs().max())


def test_the_weight_is_that_of_the_quantised_factors():
    for form in ("factored", "pivoted"):
        model = small_mlp(form)
        small = quantised(model)
        for layer, expected in zip(small, in_floats(small, model), strict=True):
            if isinstance(layer, LowRankLinear):
                assert type(layer.weight) is torch.Tensor
                assert layer.weight.dtype == torch.float32
                assert difference(layer.weight, expected.weight) <= 1e-6


def test_quantised_factors_are_not_written_and_the_error_says_when_they_can_be():
    model = quantised(small_mlp())
    before, inputs = snapshot(model), randn(2, 64, seed=1, dtype=torch.float32)
    expected = model(inputs)
    layer = next(one for one in model if isinstance(one, LowRankLinear))
    message = "a LowRankLinear cannot be {}: its factor is now a .*Linear with a weight of type .*before quantising"
    for call, what in (
        (lambda: restore_dense_(model), "merged"),
        (layer.to_linear, "merged"),
        (lambda: layer.set_factors_(*layer.factors()), "filled"),
    ):
        with pytest.raises(ValueError, match=message.format(what)):
            call()
    assert torch.equal(model(inputs), expected)
    after = snapshot(model)
    before.pop("values"), after.pop("values")
    assert before == after


def test_a_quantised_layer_is_not_compressed():
    model = quantised(mlp(0, SIZES))
    with pytest.raises(
        ValueError, match="none of its 3 layers can be made smaller .*weight is quantised, an Int8Tensor"
    ):
        svd_compress_(model, 0.5)


def test_the_state_dict_is_saved_and_loaded_with_weights_only():
    model = quantised(small_mlp())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = small_mlp()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(state, assign=True)
    inputs = randn(5, 64, seed=1, dtype=torch.float32)
    assert torch.equal(again(inputs), model(inputs))


def test_a_state_dict_quantised_too_early_is_not_loaded_and_the_error_says_so():
    state = quantised(small_mlp()).state_dict()
    dense = mlp(1, SIZES)
    before = snapshot(dense)
    with pytest.raises(ValueError, match="a quantised Int8Tensor: save the state dict before quantising"):
        load_compressed_(dense, state)
    assert same(before, snapshot(dense))


def test_factors_of_rank_one_are_left_in_floats():
    """The quantiser fails for any linear layer with one input, so it has to be told to leave those."""
    model = nn.Sequential(LowRankLinear.from_linear(nn.Linear(32, 32), 1), nn.Linear(32, 32))
    inputs = randn(4, 32, seed=1, dtype=torch.float32)
    expected = model(inputs)
    for one in (copy.deepcopy(model), nn.Sequential(nn.Linear(1, 32))):
        with pytest.raises(RuntimeError, match=r"shape '\[32, 1\]' is invalid"):
            quantization.quantize_(one, CONFIGS["weight_only"]())

    def is_wide(module, name):
        return isinstance(module, nn.Linear) and module.in_features > 1

    quantization.quantize_(model, CONFIGS["weight_only"](), filter_fn=is_wide)
    assert [is_int8(one) for one in (model[0].down, model[0].up, model[1])] == [True, False, True]
    assert difference(model(inputs), expected) <= 0.05 * float(expected.detach().abs().max())


@each_config
def test_a_quantised_model_compiles_to_one_graph(config):
    model, inputs = quantised(small_mlp(), config), randn(5, 64, seed=1, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert difference(compiled(inputs), model(inputs)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_layers_that_are_quantised_already_stay_as_they_are_with_the_reason():
    model = fill_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32)), 0)
    quantization.quantize_(model, CONFIGS["weight_only"](), filter_fn=lambda _, name: name == "2")
    kept = model[2].weight
    model = torch.ao.quantization.quantize_dynamic(model, {"0"}, dtype=torch.qint8)
    inputs = randn(4, 32, seed=1, dtype=torch.float32)
    first = model[0]
    report = svd_compress_(model, 0.1)
    assert report["0"].reason == "Linear is quantised already (compress first, then quantise)"
    assert report["2"].reason == f"weight is quantised, an {type(kept).__name__} (compress first, then quantise)"
    assert [one.name for one in report.compressed] == ["3"]
    assert model[0] is first
    assert torch.isfinite(model(inputs)).all()
