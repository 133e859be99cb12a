"""Saving and loading: bit for bit the same outputs, and errors that change nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.networks import Shared, Tied, mlp, same, small_resnet, snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import LowRankConv2d, LowRankLinear, load_compressed_, plan_compression, restore_dense_, svd_compress_
from torchsmooth._matricise import SCHEMES

IMAGES = randn(2, 3, 16, 16, seed=11, dtype=torch.float32)


def through_torch_save(state, _):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(state, tmp_path / "small.safetensors")
    return load_file(tmp_path / "small.safetensors")


@pytest.mark.parametrize("travel", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.85])
def test_a_fresh_model_computes_the_same_bit_for_bit(travel, ratio, tmp_path):
    model = small_resnet(1)
    svd_compress_(model, ratio)
    again = load_compressed_(small_resnet(2), travel(model.state_dict(), tmp_path)).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert [(name, type(one)) for name, one in again.named_modules()] == [
        (name, type(one)) for name, one in model.named_modules()
    ]
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


@settings(max_examples=25)
@given(st.sampled_from(SCHEMES), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 2), seeds)
def test_every_scheme_kernel_and_group_is_recognised_by_its_shapes(scheme, kernel, groups, seed):
    def build(own_seed):
        conv = nn.Conv2d(4 * groups, 6 * groups, kernel, stride=(1, 2), padding=1, groups=groups)
        return fill_(nn.Sequential(conv, nn.Conv2d(6 * groups, 6 * groups, 3)), own_seed)

    model = build(seed)
    plan = plan_compression(model, 0.3, filter_fn=lambda module, name: name == "1")
    plan.apply_(model)
    model[0] = LowRankConv2d.from_conv2d(model[0], 2, scheme)
    again = load_compressed_(build(seed + 1), model.state_dict())
    assert again[0].scheme == model[0].scheme
    inputs = randn(2, 4 * groups, 7, 9, seed=seed, dtype=torch.float32)
    assert torch.equal(again(inputs), model(inputs))


def one_of_each_pivoted(seed):
    """A linear layer and a convolution in every scheme, all in the pivoted form, between layers that stay dense."""
    model = dense_for_pivoted(seed)
    model[0] = LowRankLinear.from_linear(model[0], 5, "pivoted")
    for place, scheme in enumerate(SCHEMES):
        model[2][place] = LowRankConv2d.from_conv2d(model[2][place], 2, scheme, "pivoted")
    return model


def dense_for_pivoted(seed):
    convs = [nn.Conv2d(8, 8, (2, 3), padding=1, groups=2, bias=place != 1) for place in range(4)]
    parts = [nn.Linear(24, 8 * 4), nn.Unflatten(1, (8, 2, 2)), nn.Sequential(*convs), nn.BatchNorm2d(8)]
    return fill_(nn.Sequential(*parts, nn.Conv2d(8, 3, 1)), seed).eval()


@pytest.mark.parametrize("travel", [through_torch_save, through_safetensors])
@given(seeds)
@settings(max_examples=5)
def test_layers_in_the_pivoted_form_come_back_bit_for_bit(travel, tmp_path_factory, seed):
    model = one_of_each_pivoted(seed)
    inputs = randn(3, 24, seed=seed, dtype=torch.float32)
    state = travel(model.state_dict(), tmp_path_factory.mktemp("travel"))
    for fresh in (dense_for_pivoted(seed + 1), one_of_each_pivoted(seed + 2)):
        again = load_compressed_(fresh, state)
        assert torch.equal(again(inputs), model(inputs))
        assert repr(again) == repr(model)
        assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())
    wide = {name: one.long() if name.endswith("order") else one for name, one in state.items()}
    again = load_compressed_(dense_for_pivoted(seed + 1), wide)
    assert torch.equal(again(inputs), model(inputs))
    assert {one.dtype for name, one in again.state_dict().items() if name.endswith("order")} == {torch.int32}
    restored = restore_dense_(again)
    assert torch.allclose(restored(inputs), model(inputs), atol=1e-5)
    plain = load_compressed_(dense_for_pivoted(seed + 3), restored.state_dict())
    assert torch.equal(plain(inputs), restored(inputs))


def test_bias_flags_and_hooks_stay_with_a_layer_that_becomes_pivoted():
    fresh = dense_for_pivoted(1).requires_grad_(False)
    fresh[0].bias.requires_grad_(True)
    biases = fresh[0].bias, fresh[2][2].bias
    calls = []
    fresh[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    load_compressed_(fresh, one_of_each_pivoted(0).state_dict())
    fresh(torch.zeros(1, 24))
    assert calls == [LowRankLinear]
    assert fresh[0].merge.bias is biases[0]
    assert fresh[2][2].up.bias is biases[1]
    assert [name for name, parameter in fresh.named_parameters() if parameter.requires_grad] == ["0.merge.bias"]


def pivoted_state(**changes):
    state = dict(one_of_each_pivoted(0).state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value(state.get(name)) if callable(value) else value
    return state


def exchanged(one, other):
    """Exchange two entries of an order."""

    def change(order):
        order = order.clone()
        order[[one, other]] = order[[other, one]]
        return order

    return change


BAD_PIVOTED = {
    "order_missing": (
        {"0__merge__order": None},
        r"holds layer '0' in the pivoted form, with '0.up.weight' of shape \(27, 5\), but not '0.merge.order'",
    ),
    "order_of_an_input_scheme_missing": ({"2__1__split__order": None}, "but not '2.1.split.order': part of the layer"),
    "order_of_a_spatial_scheme_missing": ({"2__3__up__order": None}, "but not '2.3.up.order': part of the layer"),
    "factor_missing": ({"0__up__weight": None}, "holds '0.down.weight' but not '0.up.weight': half of layer '0'"),
    "nothing_but_an_order": (
        {"0__up__weight": None, "0__down__weight": None},
        "holds '0.merge.order' but not '0.down.weight': half of layer '0' is missing",
    ),
    "order_beside_the_dense_layer": (
        {"4__merge__order": torch.arange(3)},
        "holds '4.merge.order' but not '4.down.weight'",
    ),
    "order_of_the_factored_form": (
        {"0__up__weight": torch.zeros(32, 5)},
        'Unexpected key.*"0.merge.order"',
    ),
    "bias_missing": ({"0__merge__bias": None}, 'Missing key.*"0.merge.bias"'),
    "bias_elsewhere": ({"0__up__bias": torch.zeros(27)}, 'Unexpected key.*"0.up.bias"'),
    "two_orders": ({"0__split__order": torch.arange(24)}, 'Unexpected key.*"0.split.order"'),
    "order_of_another_scheme": (
        {"2__0__split__order": torch.arange(8), "2__0__merge__order": None},
        "but not '2.0.merge.order'",
    ),
    "rank_contradicts": (
        {"0__up__weight": torch.zeros(26, 5)},
        r"'0.down.weight' of shape \(5, 24\) and '0.up.weight' of shape \(26, 5\) are no factors of the weight",
    ),
    "full_rank": (
        {"0__down__weight": torch.zeros(24, 24), "0__up__weight": torch.zeros(8, 24)},
        "are no factors of the weight of layer '0'",
    ),
    "floating_order": (
        {"0__merge__order": torch.arange(32.0)},
        r"'0.merge.order' is no order of pivots for layer '0': expected 32 integers, got shape .* of torch.float32",
    ),
    "short_order": ({"0__merge__order": torch.arange(31)}, r"for layer '0': expected 32 integers, got shape \(31,\)"),
    "list_order": ({"0__merge__order": list(range(32))}, "for layer '0': expected a tensor of 32 integers, got list"),
    "repeated_order": (
        {"2__3__up__order": lambda order: order.clamp_min(1)},
        "'2.3.up.order' is no order of pivots for layer '2.3': expected each number from 0 to 15 once",
    ),
    "order_out_of_range": ({"2__1__split__order": lambda order: order + 1}, "each number from 0 to 7 once"),
    "negative_order": ({"0__merge__order": lambda order: -order}, "each number from 0 to 31 once"),
    "pivots_of_the_other_group": (
        {"2__1__split__order": exchanged(0, 3)},
        "'2.1.split.order' is no order of pivots for layer '2.1': expected 2 pivots from each of 2 groups of 4",
    ),
    "rows_of_the_other_group": ({"2__2__up__order": exchanged(0, -1)}, "pivots from each of 2 groups of 12"),
}


@pytest.mark.parametrize("case", BAD_PIVOTED)
@pytest.mark.parametrize("build", [dense_for_pivoted, one_of_each_pivoted])
def test_a_pivoted_state_that_does_not_fit_names_its_keys_and_changes_nothing(case, build):
    changes, message = BAD_PIVOTED[case]
    model = build(1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message if build is dense_for_pivoted else "the state dict does not fit|half"):
        load_compressed_(model, pivoted_state(**changes))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("build", [Tied, Shared])
def test_tied_and_shared_layers_load(build):
    model = fill_(build(), 0)
    svd_compress_(model, 0.1)
    again = load_compressed_(fill_(build(), 1), model.state_dict())
    inputs = torch.tensor([[1, 2]]) if build is Tied else randn(2, 16, seed=0, dtype=torch.float32)
    assert torch.equal(again(inputs), model(inputs))
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_the_dtype_of_the_model_is_kept():
    model = mlp(1)
    svd_compress_(model, 0.5)
    again = load_compressed_(mlp(2).to(torch.float64), model.state_dict())
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float64}
    assert torch.equal(again[0].up.weight, model[0].up.weight.double())


def test_flags_modes_and_hooks_of_the_model_are_kept():
    model = mlp(1)
    svd_compress_(model, 0.5)
    fresh = mlp(2).eval().requires_grad_(False)
    calls = []
    fresh[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    load_compressed_(fresh, model.state_dict())
    fresh(torch.zeros(1, 24))
    assert calls == [LowRankLinear]
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    assert not any(module.training for module in fresh.modules())


def test_dense_and_already_compressed_models_load_too():
    model = small_resnet(1)
    dense = load_compressed_(small_resnet(2), model.state_dict())
    assert torch.equal(dense(IMAGES), model(IMAGES))
    svd_compress_(model, 0.5)
    other = load_compressed_(small_resnet(3), model.state_dict())
    for parameter in other.parameters():
        parameter.data.zero_()
    load_compressed_(other, model.state_dict())
    assert torch.equal(other(IMAGES), model(IMAGES))


def test_names_that_only_look_like_factors_are_ordinary_modules():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleDict({"down": nn.Linear(32, 32), "up": nn.Linear(32, 32)})

        def forward(self, x):
            return self.block["up"](self.block["down"](x))

    model = fill_(UNet(), 0)
    inputs = randn(2, 32, seed=0, dtype=torch.float32)
    for change in (lambda: None, lambda: svd_compress_(model, 0.5)):
        change()
        again = load_compressed_(fill_(UNet(), 1), model.state_dict())
        assert torch.equal(again(inputs), model(inputs))


def test_a_restored_model_loads_into_a_plain_one():
    model = small_resnet(1)
    svd_compress_(model, 0.6)
    restore_dense_(model)
    plain = small_resnet(2)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IMAGES), model(IMAGES))


def test_neither_the_state_dict_nor_the_random_state_is_touched():
    model = mlp(1)
    svd_compress_(model, 0.5)
    state = model.state_dict()
    fresh = mlp(2)
    before, random_state = copy.deepcopy(state), torch.get_rng_state()
    again = load_compressed_(fresh, state)
    again[0].up.weight.data.zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert torch.equal(torch.get_rng_state(), random_state)


def compressed_state(**changes):
    model = mlp(1)
    svd_compress_(model, 0.5, form="factored")
    state = dict(model.state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


BAD_STATES = {
    "down_missing": (
        lambda: compressed_state(**{"0__down__weight": None}),
        ValueError,
        "holds '0.up.weight' but not '0.down.weight': half of layer '0' is missing",
    ),
    "both": (
        lambda: compressed_state(**{"0__weight": torch.zeros(32, 24)}),
        ValueError,
        r"holds layer '0' twice, dense \('0.weight'\) and low-rank \('0.down.weight'\)",
    ),
    "wrong_rank": (
        lambda: compressed_state(**{"0__down__weight": torch.zeros(3, 24)}),
        ValueError,
        r"'0.down.weight' of shape \(3, 24\) and '0.up.weight' of shape .* no factors of the weight of layer '0'",
    ),
    "too_large_rank": (
        lambda: compressed_state(**{"0__down__weight": torch.zeros(25, 24), "0__up__weight": torch.zeros(32, 25)}),
        ValueError,
        "no factors of the weight of layer '0'",
    ),
    "scalar_factors": (
        lambda: compressed_state(**{"0__down__weight": torch.zeros(()), "0__up__weight": torch.zeros(())}),
        ValueError,
        "no factors of the weight of layer '0'",
    ),
    "missing_bias": (lambda: compressed_state(**{"0__up__bias": None}), ValueError, 'Missing key.*"0.up.bias"'),
    "missing_layer": (
        lambda: compressed_state(**{"2__down__weight": None, "2__up__weight": None, "2__up__bias": None}),
        ValueError,
        'Missing key.*"2.weight"',
    ),
    "wrong_bias": (
        lambda: compressed_state(**{"0__up__bias": torch.zeros(5)}),
        ValueError,
        "size mismatch for 0.up.bias",
    ),
    "unexpected": (lambda: compressed_state(extra=torch.zeros(3)), ValueError, 'Unexpected key.*"extra"'),
    "empty": (dict, ValueError, 'Missing key.*"0.weight"'),
    "other_model": (lambda: small_resnet().state_dict(), ValueError, 'Unexpected key.*"conv1.weight"'),
    "wrapped": (
        lambda: {f"module.{key}": value for key, value in compressed_state().items()},
        ValueError,
        r"\(its keys start with 'module.', the prefix of a wrapper: strip it, or save model.module.state_dict\(\)\)",
    ),
    "checkpoint": (
        lambda: {"state_dict": compressed_state(), "epoch": torch.tensor(3)},
        TypeError,
        r"'state_dict' is a dict \(a whole checkpoint\? pass that entry of it\)",
    ),
    "not_tensors": (lambda: {"0.weight": [1.0]}, TypeError, "must hold tensors, but '0.weight' is a list"),
    "not_a_mapping": (lambda: [torch.zeros(3)], TypeError, "must be a mapping from names to tensors"),
    "keys": (lambda: {3: torch.zeros(3)}, TypeError, "must have strings for keys, got int 3"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_does_not_fit_names_its_keys_and_changes_nothing(case):
    make, error, message = BAD_STATES[case]
    state = make()
    model = mlp(2)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_compressed_(model, state)
    assert same(before, snapshot(model))


def test_batchnorm_statistics_survive_a_failed_load():
    model = small_resnet(1)
    svd_compress_(model, 0.5)
    state = dict(model.state_dict())
    state["layers.7.bn2.running_mean"] = torch.zeros(3)
    fresh = small_resnet(2)
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"size mismatch for layers.7.bn2.running_mean"):
        load_compressed_(fresh, state)
    assert same(before, snapshot(fresh))


def test_a_model_in_a_wrapper_is_recognised():
    with pytest.raises(
        ValueError, match=r"\(the model's keys start with 'module.', the prefix of a wrapper: load into model.mod"
    ):
        load_compressed_(nn.DataParallel(mlp(2)), compressed_state())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(24, 32), ValueError, "itself a Linear, .* LowRankLinear.like and call its load_state_dict"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), ValueError, "'0.weight' is not initialised yet"),
        (lambda: mlp().to("meta"), ValueError, "tensors on the meta device .*to_empty"),
        (lambda: "mlp", TypeError, "model must be a torch.nn.Module, got str 'mlp'"),
    ],
)
def test_models_that_cannot_be_loaded_into_are_named(make, error, message):
    state = {"down.weight": torch.zeros(2, 24), "up.weight": torch.zeros(32, 2)}
    with pytest.raises(error, match=message):
        load_compressed_(make(), state)


def test_everything_a_failed_load_has_written_is_put_back():
    class Awkward(nn.Module):
        """Has a buffer that cannot be written to, one that loading replaces, and extra state."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(1).expand(5), persistent=False)
            self.register_buffer("table", torch.zeros(3))
            self.linear, self.norm, self.last = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.LayerNorm(32)
            self.note = "before"

        def _load_from_state_dict(self, state, prefix, *arguments):
            self.table = state[prefix + "table"].clone()
            super()._load_from_state_dict(state, prefix, *arguments)

        def get_extra_state(self):
            return self.note

        def set_extra_state(self, note):
            self.note = note

    model = Awkward()
    svd_compress_(model, 0.3)
    model.note = "after"
    state = dict(model.state_dict()) | {"table": torch.ones(3), "last.bias": torch.ones(7)}
    state["norm.running_mean"] = torch.ones(32)
    fresh = Awkward()
    before, table = snapshot(fresh), fresh.table
    with pytest.raises(ValueError, match="size mismatch for last.bias"):
        load_compressed_(fresh, state)
    assert fresh.table is table
    assert fresh.note == "before"
    assert same(before, snapshot(fresh))


def test_the_memory_format_of_the_model_is_kept():
    def build(seed):
        return fill_(nn.Sequential(nn.Conv2d(16, 32, 3)), seed).to(memory_format=torch.channels_last)

    model = build(0)
    svd_compress_(model, 0.5)
    again = load_compressed_(build(1), model.state_dict())
    assert [one.stride() for one in again.parameters()] == [one.stride() for one in model.parameters()]


AWKWARD_BUFFERS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed_sparse": lambda: torch.eye(3).to_sparse_csr(),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "empty": lambda: torch.empty(0, 3),
    "boolean": lambda: torch.tensor([True, False]),
    "nan": lambda: torch.tensor([torch.nan, -0.0]),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", AWKWARD_BUFFERS)
def test_a_failed_load_is_undone_beside_buffers_of_every_kind(kind):
    model = mlp(1)
    svd_compress_(model, 0.5, form="factored")
    state = dict(model.state_dict()) | {"extra": torch.ones(3)}
    fresh = mlp(2)
    bias = fresh[0].bias.detach().clone()
    fresh.register_buffer("odd", AWKWARD_BUFFERS[kind](), persistent=False)
    with pytest.raises(ValueError, match="Unexpected key"):
        load_compressed_(fresh, state)
    assert torch.equal(fresh[0].bias, bias)
    assert type(fresh[0]) is nn.Linear


def test_entries_that_are_no_tensors_are_left_to_torch():
    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.note = mlp(1), None

        def _save_to_state_dict(self, state, prefix, keep_vars):
            super()._save_to_state_dict(state, prefix, keep_vars)
            state[prefix + "note"] = self.note

        def _load_from_state_dict(self, state, prefix, *arguments):
            self.note = state.pop(prefix + "note")
            super()._load_from_state_dict(state, prefix, *arguments)

    model = Noted()
    svd_compress_(model, 0.5)
    model.note = torch.float32
    again = Noted()
    load_compressed_(again, model.state_dict())
    assert again.note is torch.float32
