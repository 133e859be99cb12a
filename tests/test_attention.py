"""LowRankMultiheadAttention against nn.MultiheadAttention, over everything that attention can be asked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tests.strategies import fill_, randn, seeds
from torchsmooth import LowRankLinear, LowRankMultiheadAttention, svd_compress_

E = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage"


@st.composite
def attentions(draw, dtype=torch.float64):
    """An attention layer of any settings, without dropout."""
    attention = nn.MultiheadAttention(
        E,
        draw(st.sampled_from([1, 2, 4])),
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=draw(st.sampled_from([None, 6])),
        vdim=draw(st.sampled_from([None, 5])),
        batch_first=draw(st.booleans()),
        dtype=torch.float64,
    )
    return fill_(attention, draw(seeds)).to(dtype)


def mask_of(kind, shape, seed):
    """A mask that leaves the first key to everybody, or one of all minus infinity."""
    if kind == "none":
        return None
    if kind == "float":
        return randn(*shape, seed=seed)
    mask = randn(*shape, seed=seed) > (0.3 if kind == "bool" else -9)
    if kind == "bool":
        mask[..., 0] = False
    return mask


@st.composite
def questions(draw, attention, kinds=("none", "bool", "float")):
    """What the forward pass may be asked: tensors and masks that fit, and every flag."""
    targets, sources, samples, seed = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(seeds),
    )
    batched, alike = draw(st.booleans()), draw(st.booleans())
    first = (samples,) if batched else ()
    shape = lambda length: (*first, length) if attention.batch_first or not batched else (length, *first)  # noqa: E731
    query = randn(*shape(targets), E, seed=seed)
    key = randn(*shape(sources), attention.kdim, seed=seed + 1)
    value = randn(*shape(sources), attention.vdim, seed=seed + 2)
    if alike and attention.kdim == attention.vdim == E:
        key = value = query
        sources = targets
    kind = draw(st.sampled_from(kinds))
    each = draw(st.booleans())
    heads = attention.num_heads * (samples if batched else 1)
    attn_mask = mask_of(kind, (heads, targets, sources) if each else (targets, sources), seed + 3)
    # Torch warns where only one of the two is bool.
    other = draw(st.sampled_from(["none", kind]))
    return (query, key, value), {
        "key_padding_mask": mask_of(other, (*first, sources), seed + 4),
        "attn_mask": attn_mask,
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
        "is_causal": attn_mask is not None and kind == "bool" and draw(st.booleans()) and not each,
    }


def alike(found, expected, tolerance=1e-11):
    """Whether outputs and weights, or Nones, are the same to rounding."""
    return all(
        (one is None and other is None) or torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )


def gradients(module, inputs, output):
    inputs = [one for one in inputs if one.requires_grad]
    return torch.autograd.grad(output, [*inputs, *module.parameters()], allow_unused=True)


@given(st.data())
def test_outputs_weights_and_gradients_are_those_of_torch(data):
    attention = data.draw(attentions())
    inputs, asked = data.draw(questions(attention))
    layer = LowRankMultiheadAttention.from_attention(attention)
    inputs = [inputs[0]] * 3 if inputs[0] is inputs[1] else list(inputs)
    for one in inputs:
        one.requires_grad_()
    if asked["is_causal"]:  # the hint must be true
        asked["attn_mask"] = torch.ones_like(asked["attn_mask"]).triu(1)
    found, expected = layer(*inputs, **asked), attention(*inputs, **asked)
    assert alike(found, expected)
    own, theirs = (
        dict(
            zip(
                ["q", "k", "v", *(name for name, _ in one.named_parameters())],
                gradients(one, inputs, output[0].sum()),
                strict=True,
            )
        )
        for one, output in ((layer, found), (attention, expected))
    )
    stacked = [
        torch.cat([own[f"{name}.weight"] for name in PROJECTIONS[:3]])
        if "in_proj_weight" in theirs
        else own["q_proj.weight"]
    ]
    assert alike(stacked, [theirs["in_proj_weight" if "in_proj_weight" in theirs else "q_proj_weight"]])
    assert alike([own[name] for name in "qkv"], [theirs[name] for name in "qkv"])
    shared = theirs.keys() & own.keys()
    assert {"out_proj.weight"} <= shared
    assert alike([own[name] for name in shared], [theirs[name] for name in shared])


@settings(max_examples=20)
@given(st.data())
def test_queries_that_may_attend_to_nothing_get_what_torch_gives_them(data):
    attention = data.draw(attentions())
    inputs, asked = data.draw(questions(attention, kinds=("all", "none")))
    layer = LowRankMultiheadAttention.from_attention(attention)
    assert alike(layer(*inputs, **asked), attention(*inputs, **asked))


@pytest.mark.parametrize("need_weights", [True, False])
@settings(max_examples=10)
@given(seed=seeds)
def test_dropout_is_that_of_torch(need_weights, seed):
    attention = fill_(nn.MultiheadAttention(E, 2, dropout=0.4, dtype=torch.float64), seed)
    layer = LowRankMultiheadAttention.from_attention(attention)
    x = randn(4, 3, E, seed=seed)
    outputs = []
    for one in (layer, attention):
        torch.manual_seed(seed)
        outputs.append(one(x, x, x, need_weights=need_weights))
    assert alike(*outputs)
    assert not alike([layer(x, x, x)[0]], [outputs[0][0]])
    assert alike(layer.eval()(x, x, x), attention.eval()(x, x, x))


@settings(max_examples=20)
@given(st.data())
def test_taking_apart_shares_memory_and_putting_together_is_bit_for_bit(data):
    attention = data.draw(attentions()).train(data.draw(st.booleans()))
    attention.requires_grad_(data.draw(st.booleans()))
    before, state = copy.deepcopy(attention.state_dict()), torch.get_rng_state()
    layer = LowRankMultiheadAttention.from_attention(attention)
    again = layer.to_attention()
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.out_proj.weight is attention.out_proj.weight
    assert layer.out_proj.bias is attention.out_proj.bias
    assert layer.bias_k is attention.bias_k
    assert layer.bias_v is attention.bias_v
    assert repr(again) == repr(attention)
    settings_of = lambda one: {k: v for k, v in vars(one).items() if not k.startswith("_") and k != "bias_k"}  # noqa: E731
    assert settings_of(again).items() >= {k: v for k, v in settings_of(attention).items() if k != "bias_v"}.items()
    assert list(again.state_dict()) == list(before)
    for name, parameter in again.named_parameters():
        own = attention.get_parameter(name)
        assert torch.equal(parameter, before[name])
        assert torch.equal(own, before[name])
        assert parameter.requires_grad == own.requires_grad
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert {parameter.requires_grad for parameter in layer.parameters()} == {attention.out_proj.weight.requires_grad}
    assert all(module.training == attention.training for module in (*layer.modules(), again))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert not any(parameter.any() for parameter in attention.parameters())
    assert again.out_proj.weight.any()


def test_state_dict_keys_are_api():
    keys = [f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")]
    assert list(LowRankMultiheadAttention(E, 2).state_dict()) == keys
    layer = LowRankMultiheadAttention(E, 2, bias=False, add_bias_kv=True, kdim=3)
    assert list(layer.state_dict()) == ["bias_k", "bias_v", *keys[::2]]
    layer.k_proj = LowRankLinear.from_linear(layer.k_proj, 2)
    assert list(layer.state_dict()) == [
        *("bias_k", "bias_v", "q_proj.weight", "k_proj.down.weight", "k_proj.up.weight", "v_proj.weight"),
        "out_proj.weight",
    ]


@given(seeds)
def test_a_new_layer_is_drawn_as_torch_draws_one(seed):
    built = []
    for cls in (nn.MultiheadAttention, LowRankMultiheadAttention):
        torch.manual_seed(seed)
        built.append(cls(E, 2, add_bias_kv=True, batch_first=True, dtype=torch.float64))
    attention, layer = built
    x = randn(2, 3, E, seed=seed)
    assert alike(layer(x, x, x), attention(x, x, x))
    assert all(one.untyped_storage().nbytes() == one.numel() * 8 for one in layer.parameters())


def low_rank_(layer, attention, form, rank):
    """Replace all children by low-rank layers, and set the weights of the original to what they stand for."""
    for name in PROJECTIONS:
        setattr(layer, name, LowRankLinear.from_linear(getattr(layer, name), rank, form))
    with torch.no_grad():
        attention.out_proj.weight.copy_(layer.out_proj.weight)
        products = [getattr(layer, name).weight for name in PROJECTIONS[:3]]
        if attention.in_proj_weight is not None:
            attention.in_proj_weight.copy_(torch.cat(products))
        else:
            for name, product in zip(PROJECTIONS, products, strict=False):
                attention.get_parameter(f"{name}_weight").copy_(product)


@settings(max_examples=25)
@given(st.data())
def test_low_rank_children_compute_what_their_products_stand_for(data):
    attention = data.draw(attentions())
    inputs, asked = data.draw(questions(attention))
    full = LowRankMultiheadAttention.from_attention(copy.deepcopy(attention))
    before = full(*inputs, **asked)
    for name in PROJECTIONS:
        child = getattr(full, name)
        setattr(full, name, LowRankLinear.from_linear(child, min(child.weight.shape)))
    assert alike(full(*inputs, **asked), before, 1e-10)
    layer = LowRankMultiheadAttention.from_attention(copy.deepcopy(attention))
    low_rank_(layer, attention, data.draw(st.sampled_from(["factored", "pivoted"])), data.draw(st.integers(1, 4)))
    assert alike(layer(*inputs, **asked), attention(*inputs, **asked), 1e-10)


def test_children_are_called_and_get_gradients():
    layer = LowRankMultiheadAttention(E, 2)
    called = []
    for name in PROJECTIONS:
        child = LowRankLinear.from_linear(getattr(layer, name), 3)
        setattr(layer, name, child)
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    x = randn(4, 3, E, seed=0, dtype=torch.float32)
    layer(x, x, x)[0].square().sum().backward()
    assert called == list(PROJECTIONS)
    assert all(bool(parameter.grad.any()) for name, parameter in layer.named_parameters() if name != "k_proj.up.bias")


def test_the_stacked_weights_can_be_read():
    attention = nn.MultiheadAttention(E, 2)
    layer = LowRankMultiheadAttention.from_attention(attention)
    assert torch.equal(layer.in_proj_weight, attention.in_proj_weight)
    assert torch.equal(layer.in_proj_bias, attention.in_proj_bias)
    layer.k_proj = LowRankLinear.from_linear(layer.k_proj, E)
    assert torch.allclose(layer.in_proj_weight, attention.in_proj_weight, atol=1e-5)
    assert LowRankMultiheadAttention(E, 2, bias=False, kdim=3).in_proj_weight is None
    assert LowRankMultiheadAttention(E, 2, bias=False).in_proj_bias is None
    special = torch.rand(E, E).as_subclass(type("Special", (torch.Tensor,), {}))
    layer.v_proj._parameters["weight"] = special  # as of a quantised layer, which cannot be stacked
    assert layer.in_proj_weight is special


def encoder(norm_first, seed):
    layer = nn.TransformerEncoderLayer(E, 2, 12, 0.1, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    return fill_(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), seed)


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("form", ["dense", "factored", "pivoted"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_computes_the_same_in_every_mode(norm_first, which, form):
    expected = encoder(norm_first, seed=3)
    model = copy.deepcopy(expected)
    for number in which:
        layer, original = model.layers[number], expected.layers[number]
        layer.self_attn = LowRankMultiheadAttention.from_attention(layer.self_attn)
        if form != "dense":
            low_rank_(layer.self_attn, original.self_attn, form, 5)
            layer.linear1 = LowRankLinear.from_linear(layer.linear1, 5, form)
            with torch.no_grad():
                original.linear1.weight.copy_(layer.linear1.weight)
    x = randn(3, 5, E, seed=4)
    padding = torch.arange(5) >= torch.tensor([3, 5, 2]).unsqueeze(1)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    model.eval(), expected.eval()
    for frozen in (False, True):
        model.requires_grad_(not frozen), expected.requires_grad_(not frozen)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert alike([model(x, src_key_padding_mask=padding)], [expected(x, src_key_padding_mask=padding)])
                assert alike([model(x, causal, is_causal=True)], [expected(x, causal, is_causal=True)])
                assert alike([model(x)], [expected(x)])
    for module in (*model.modules(), *expected.modules()):  # what is dropped depends on the strides
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "num_heads"):
            module.dropout = 0.0
    model.train(), expected.train()
    assert alike([model(x, src_key_padding_mask=padding)], [expected(x, src_key_padding_mask=padding)])


@pytest.mark.parametrize("grad", [True, False])
def test_a_decoder_computes_the_same(grad):
    expected = fill_(nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 2, 12, dtype=torch.float64), 1), 5).eval()
    model = copy.deepcopy(expected)
    layer = model.layers[0]
    for name in ("self_attn", "multihead_attn"):
        setattr(layer, name, LowRankMultiheadAttention.from_attention(getattr(layer, name)))
        low_rank_(getattr(layer, name), getattr(expected.layers[0], name), "factored", 3)
    target, memory = randn(4, 2, E, seed=6), randn(5, 2, E, seed=7)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    asked = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    with torch.set_grad_enabled(grad):
        assert alike([model(target, memory, **asked)], [expected(target, memory, **asked)])


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("average", [True, False])
def test_nested_self_attention_is_that_of_the_kernel(average):
    attention = fill_(nn.MultiheadAttention(E, 2, batch_first=True), 8).eval()
    layer = LowRankMultiheadAttention.from_attention(attention)
    parts = [randn(length, E, seed=length, dtype=torch.float32) for length in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts)
    with torch.no_grad():
        found = layer(nested, nested, nested, average_attn_weights=average)
        expected = attention(nested, nested, nested, average_attn_weights=average)
    assert found[0].is_nested
    assert alike(found[0].unbind(), expected[0].unbind(), 1e-5)
    assert alike(found[1:], expected[1:], 1e-5)
    with pytest.raises(ValueError, match="nested tensors are taken in self-attention alone"):
        layer(nested, nested, nested, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="pad them, and give a key_padding_mask"):
        layer(nested, nested.clone(), nested)


@pytest.mark.filterwarnings(NESTED)
def test_pivoted_layers_take_nested_tensors():
    layer = LowRankLinear.from_linear(fill_(nn.Linear(E, 6), 9), 3, "pivoted")
    parts = [randn(length, E, seed=length, dtype=torch.float32) for length in (3, 1, 5)]
    found = layer(torch.nested.nested_tensor(parts))
    assert alike(found.unbind(), [layer(part) for part in parts], 1e-6)


def test_a_compiled_layer_is_one_graph():
    layer = LowRankMultiheadAttention(E, 2, batch_first=True)
    layer.k_proj = LowRankLinear.from_linear(layer.k_proj, 3)
    x = randn(2, 3, E, seed=0, dtype=torch.float32)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for need_weights in (True, False):
        asked = {"key_padding_mask": padding, "need_weights": need_weights}
        assert alike(compiled(x, x, x, **asked), layer(x, x, x, **asked), 1e-5)


def test_a_layer_is_exported_with_any_batch_and_traced_symbolically():
    layer = LowRankMultiheadAttention(E, 2, batch_first=True).eval()
    x, y = randn(2, 3, E, seed=0, dtype=torch.float32), randn(5, 3, E, seed=1, dtype=torch.float32)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(layer, (x, x, x), dynamic_shapes=(batch, batch, batch)).module()
    assert alike(exported(y, y, y), layer(y, y, y), 1e-5)
    traced = torch.fx.symbolic_trace(layer)
    assert alike(traced(y, y, y, need_weights=False), layer(y, y, y, need_weights=False), 1e-6)
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} <= {node.target for node in traced.graph.nodes}


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_gives_the_dtype_that_torch_gives(need_weights):
    attention = fill_(nn.MultiheadAttention(E, 2, add_bias_kv=True), 1)
    layer = LowRankMultiheadAttention.from_attention(attention)
    x, mask = randn(4, 3, E, seed=2, dtype=torch.float32), randn(4, 4, seed=3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (one(x, x, x, need_weights=need_weights, attn_mask=mask) for one in (layer, attention))
    assert found[0].dtype == expected[0].dtype
    assert alike(*([one[0].float()] for one in (found, expected)), 5e-2)
    assert torch.func.functional_call(layer, {"q_proj.weight": torch.zeros(E, E)}, (x, x, x))[0].isfinite().all()


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded])
def test_layers_survive_copies_and_pickles(build):
    layer = LowRankMultiheadAttention.from_attention(nn.MultiheadAttention(E, 2, add_bias_kv=True))
    layer.v_proj = LowRankLinear.from_linear(layer.v_proj, 3)
    again = build(layer)
    x = randn(4, 3, E, seed=0, dtype=torch.float32)
    assert alike(again(x, x, x), layer(x, x, x), 0)
    assert again.q_proj.weight.data_ptr() != layer.q_proj.weight.data_ptr()
    assert repr(again) == repr(layer)


def pruned():
    attention = nn.MultiheadAttention(E, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    return attention


def pruned_linear():
    linear = nn.Linear(E, E)
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


def changed(name, child):
    """Put together a layer with another child."""
    layer = LowRankMultiheadAttention(E, 2)
    setattr(layer, name, child)
    return layer.to_attention()


def taken(attention):
    return LowRankMultiheadAttention.from_attention(attention)


def with_out_proj():
    attention = nn.MultiheadAttention(E, 2)
    attention.out_proj = LowRankLinear(E, E, 2)
    return attention


class Attention(nn.MultiheadAttention):
    """A subclass."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: taken(nn.Linear(E, E)), TypeError, "nn.MultiheadAttention itself, got Linear"),
        (lambda: taken(Attention(E, 2)), TypeError, "a subclass may use its weights"),
        (lambda: taken(pruned()), ValueError, "in_proj_weight is not a plain parameter"),
        (lambda: taken(with_out_proj()), ValueError, "its out_proj is a LowRankLinear"),
        (lambda: changed("k_proj", LowRankLinear(E, E, 2)), ValueError, "child 'k_proj' .* restore_dense_"),
        (lambda: changed("v_proj", nn.Identity()), ValueError, "child 'v_proj' .* put a torch.nn.Linear there"),
        (lambda: changed("q_proj", nn.Linear(E, 4)), ValueError, r"'q_proj' .* shape \(4, 8\), expected \(8, 8\)"),
        (lambda: changed("q_proj", nn.Linear(E, E, bias=False)), ValueError, "child 'q_proj' has no bias"),
        (lambda: changed("v_proj", nn.Linear(E, E).half()), ValueError, "'v_proj' .* is of torch.float16"),
        (lambda: changed("v_proj", pruned_linear()), ValueError, "'v_proj' .* has no plain weight"),
        (lambda: LowRankMultiheadAttention(0, 2), ValueError, "embed_dim must be at least 1"),
    ],
)
def test_bad_layers_are_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("shapes", "asked", "message"),
    [
        (((E,), (E,), (E,)), {}, "query must have 2 axes, or 3 with a batch, got 1"),
        (((3, 2, E), (4, E), (4, E)), {}, "key must have 3 axes, as query has, got 2"),
        (((3, 2, 7), (4, 2, E), (4, 2, E)), {}, r"query must have 8 features .*got shape \(3, 2, 7\)"),
        (((3, 2, E), (4, 2, E), (4, 2, 5)), {}, "value must have 8 features"),
        (((3, 2, E), (4, 2, E), (5, 2, E)), {}, "key and value must be equally long"),
        (((3, 2, E), (4, 1, E), (4, 1, E)), {}, "equally many samples .axis 1, as batch_first=False"),
        (((3, 2, E), (4, 2, E), (4, 2, E)), {"key_padding_mask": torch.zeros(4, 2)}, r"must be of shape \(2, 4\), got"),
        (((3, E), (4, E), (4, E)), {"key_padding_mask": torch.zeros(1, 4)}, r"must be of shape \(4,\), got"),
        (((3, 2, E), (4, 2, E), (4, 2, E)), {"attn_mask": torch.zeros(4, 3)}, r"shape \(3, 4\) or \(4, 3, 4\), got"),
        (((3, 2, E),) * 3, {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, "must be bool .* got torch.int64"),
        (((3, 2, E),) * 3, {"is_causal": True}, "only says that attn_mask is causal, and there is none"),
    ],
)
def test_bad_inputs_are_named(shapes, asked, message):
    layer = LowRankMultiheadAttention(E, 2)
    inputs = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        layer(*inputs, **asked)
    with pytest.raises((AssertionError, RuntimeError)):  # torch refuses the same, in other words
        layer.to_attention()(*inputs, **asked)


@pytest.mark.parametrize(
    ("queries", "keys"), [((0, 5, E), None), ((2, 0, E), None), ((2, 3, E), (2, 0, E)), ((0, 3, E), (0, 4, E))]
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty_inputs_come_out_as_of_the_dense_layer(queries, keys, need_weights):
    dense = fill_(nn.MultiheadAttention(E, 2, batch_first=True), 0)
    model = nn.Sequential(copy.deepcopy(dense))
    svd_compress_(model, 0.2)
    x = randn(*queries, seed=1, dtype=torch.float32)
    y = x if keys is None else randn(*keys, seed=2, dtype=torch.float32)
    found, expected = (one(x, y, y, need_weights=need_weights) for one in (model[0], dense))
    assert found[0].shape == expected[0].shape
    assert (found[1] is None) == (expected[1] is None)
    assert bool(found[0].isfinite().all()) == bool(expected[0].isfinite().all())


@given(st.data())
def test_masks_of_no_keys_queries_or_samples_are_taken(data):
    batch_first, heads = data.draw(st.booleans()), 2
    dense = fill_(nn.MultiheadAttention(E, heads, batch_first=batch_first, dtype=torch.float64), data.draw(seeds))
    sizes = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)).filter(lambda one: 0 in one))
    samples, targets, sources = sizes
    query, key = (
        randn(*((samples, length) if batch_first else (length, samples)), E, seed=data.draw(seeds))
        for length in (targets, sources)
    )
    padding = data.draw(st.sampled_from([None, (samples, sources)]))
    attending = data.draw(st.sampled_from([None, (targets, sources), (samples * heads, targets, sources)]))
    asked = {
        name: None if shape is None else torch.zeros(shape, dtype=torch.bool)
        for name, shape in (("key_padding_mask", padding), ("attn_mask", attending))
    }
    layer = LowRankMultiheadAttention.from_attention(dense)
    # Of some of these, torch makes nothing where it is not asked for the weights.
    expected = dense(query, key, key, **asked)
    assert alike(layer(query, key, key, **asked), expected)
    assert alike(layer(query, key, key, need_weights=False, **asked)[:1], expected[:1])
