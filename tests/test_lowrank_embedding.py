"""LowRankEmbedding against the dense table, alone and through the whole compression."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.networks import Tied, same, snapshot
from tests.reference.lowrank import tail_energy, truncate
from tests.strategies import HARD_KINDS, fill_, hard_matrix, seeds
from torchsmooth import (
    CompressionPlan,
    LowRankEmbedding,
    LowRankLinear,
    RankTail,
    attach_,
    load_compressed_,
    plan_compression,
    restore_dense_,
    smooth_,
    svd_compress_,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
FORMS = ("factored", "pivoted")


def table(rows, size, seed=0, dtype=torch.float64, **options):
    """An embedding of entries drawn from a seed; the padding row is zero, as torch makes it."""
    layer = fill_(nn.Embedding(rows, size, dtype=dtype, **options), seed)
    if layer.padding_idx is not None:
        with torch.no_grad():
            layer.weight[layer.padding_idx] = 0
    return layer


def norm(tensor):
    return float(tensor.detach().double().norm())


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(FORMS), st.data(), seeds)
def test_at_every_rank_it_looks_up_the_truncated_table(rows, size, form, data, seed):
    full = min(rows, size)
    rank = data.draw(st.integers(1, full if form == "factored" else full - 1))
    embedding = table(rows, size, seed, padding_idx=data.draw(st.none() | st.integers(-rows, rows - 1)))
    layer = LowRankEmbedding.from_embedding(embedding, rank, form)
    expected = truncate(embedding.weight.detach(), rank)
    indices = torch.arange(rows).repeat(2, 1)
    assert torch.allclose(layer(indices), F.embedding(indices, expected), atol=1e-11)
    assert torch.allclose(layer.weight, expected, atol=1e-11)
    assert norm(embedding.weight - layer.weight) ** 2 == pytest.approx(
        tail_energy([embedding.weight.detach()], rank), abs=1e-10
    )
    dense = layer.to_embedding()
    assert repr(dense) == repr(embedding)
    assert torch.allclose(dense(indices), layer(indices), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HARD_KINDS)
def test_tables_of_hard_values(kind, dtype):
    for rows, size in ((9, 6), (5, 8)):
        weight = hard_matrix(kind, rows, size, seed=5, dtype=dtype)
        embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        indices = torch.arange(rows)
        for form, rank in (("factored", min(rows, size)), ("factored", 2), ("pivoted", 2)):
            layer = LowRankEmbedding.from_embedding(embedding, rank, form)
            assert {one.dtype for one in (*layer.parameters(), layer(indices))} == {dtype}
            # Of equal singular values any may be kept, so that the best table is not the only one.
            tail = tail_energy([weight], rank) ** 0.5
            assert norm(layer.weight.double() - weight.double()) <= tail + 2 * TOLERANCE[dtype] * norm(weight)
            assert norm(layer(indices).double() - layer.weight.double()) <= 2 * TOLERANCE[dtype] * norm(weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "size"), [(20, 6), (6, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_padding_row_stays_exactly_zero_and_is_not_trained(form, rows, size, dtype):
    embedding = table(rows, size, dtype=dtype, padding_idx=3)
    layer = LowRankEmbedding.from_embedding(embedding, 4, form)
    indices = torch.tensor([[3, 0, 3], [5, 3, 1]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        output = layer(indices)
        assert norm(output[indices == 3]) == norm(layer.weight[3]) == norm(layer.to_embedding().weight[3]) == 0
        assert norm(output[indices != 3]) > 0
        (output - 1).square().sum().backward()
        assert norm(layer.down.weight.grad[3]) == 0
        assert norm(layer.down.weight.grad[5]) > 0
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        embedding.weight[3] = 1  # some models do write there
    kept = LowRankEmbedding.from_embedding(embedding, 4, form)
    assert norm(kept.down.weight[3]) > 0


def test_everything_about_a_table_is_kept():
    embedding = table(10, 6, padding_idx=-2, scale_grad_by_freq=True, sparse=True).eval().requires_grad_(False)
    for form in FORMS:
        layer = LowRankEmbedding.from_embedding(embedding, 3, form)
        assert (type(layer.down), type(layer.up)) == (nn.Embedding, nn.Linear)
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (10, 6, 8)
        assert (layer.down.padding_idx, layer.down.sparse, layer.down.scale_grad_by_freq) == (8, True, True)
        assert not any(one.requires_grad for one in layer.parameters())
        assert not any(module.training for module in layer.modules())
        assert layer.bias is None
        dense = layer.to_dense()
        assert repr(dense) == repr(embedding)
        assert not dense.weight.requires_grad
        assert not dense.training
        for tensor in layer.state_dict().values():
            assert tensor.stride() == torch.empty(tensor.shape).stride()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert layer.extra_repr() == ("10, 6, rank=3, padding_idx=8, scale_grad_by_freq=True, sparse=True, form=pivoted")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_sparse_and_scaled_where_the_dense_ones_are(form):
    indices = torch.tensor([1, 2, 2, 2])
    sparse = LowRankEmbedding.from_embedding(table(9, 6, sparse=True), 3, form)
    sparse(indices).sum().backward()
    assert sparse.down.weight.grad.is_sparse
    plain = LowRankEmbedding.from_embedding(table(9, 6), 3, form)
    scaled = LowRankEmbedding.from_embedding(table(9, 6, scale_grad_by_freq=True), 3, form)
    for layer in (plain, scaled):
        layer(indices).sum().backward()
    assert torch.allclose(sparse.down.weight.grad.to_dense(), plain.down.weight.grad)
    assert torch.allclose(scaled.down.weight.grad[2], plain.down.weight.grad[2] / 3)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_a_sparse_table_is_trained_by_two_optimizers(form):
    layer = LowRankEmbedding.from_embedding(table(9, 6, sparse=True), 3, form)
    before = [one.detach().clone() for one in layer.parameters()]
    optimizers = torch.optim.SparseAdam(layer.down.parameters()), torch.optim.Adam(layer.up.parameters())
    layer(torch.arange(9)).square().sum().backward()
    for one in optimizers:
        one.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 1, 3)])
def test_indices_of_any_shape(form, shape):
    layer = LowRankEmbedding.from_embedding(table(9, 6), 3, form)
    indices = torch.full(shape, 4, dtype=torch.int32)
    assert layer(indices).shape == (*shape, 6)
    assert torch.allclose(layer(indices), layer.weight[indices.long()], atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_it_gives_the_dtype_that_a_table_gives(form):
    embedding = table(9, 6, dtype=torch.float32)
    layer, indices = LowRankEmbedding.from_embedding(embedding, 3, form), torch.arange(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(indices)
        assert output.dtype == embedding(indices).dtype == torch.float32
    assert norm(output - layer(indices)) <= 5e-2 * norm(output)


@pytest.mark.parametrize("form", FORMS)
def test_layers_survive_copies_and_compilers(form):
    layer = LowRankEmbedding.from_embedding(table(9, 6, dtype=torch.float32, padding_idx=0), 3, form)
    indices = torch.tensor([[0, 3], [8, 8]])
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.fx.symbolic_trace(layer)]
    copies.append(torch.export.export(layer, (indices,)).module())
    for again in copies:
        assert torch.allclose(again(indices), layer(indices), atol=1e-6)
    merged = torch.func.functional_call(layer, {"down.weight": torch.zeros(9, 3)}, (indices,))
    assert norm(merged) == 0


def test_layers_can_be_built_without_a_dense_one():
    for form in FORMS:
        layer = LowRankEmbedding(9, 6, 2, -1, dtype=torch.float64, form=form)
        indices = torch.arange(9)
        assert torch.allclose(layer(indices), layer.to_embedding()(indices), atol=1e-12)
        assert norm(layer(indices)[8]) == 0 < norm(layer(indices)[7])


class Reader(nn.Module):
    """Tokens and positions looked up, and a body; of the sizes of a small language model."""

    def __init__(self, seed):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(60, 24, padding_idx=0), nn.Embedding(8, 24)
        self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 60))
        fill_(self, seed)
        with torch.no_grad():
            self.tokens.weight[0] = 0

    def forward(self, tokens):
        return self.body(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))


TOKENS = torch.tensor([[0, 5, 17, 59], [3, 3, 0, 1]])


def counted(model, *inputs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


@settings(max_examples=8)
@given(seeds, st.floats(0.2, 0.8), st.sampled_from(["auto", *FORMS]))
def test_models_are_compressed_saved_loaded_and_restored(seed, ratio, form):
    model = Reader(seed)
    before, dense = sum(one.numel() for one in model.parameters()), copy.deepcopy(model)
    plan = plan_compression(model, ratio, form=form)
    again = CompressionPlan.from_json(plan.to_json())
    assert (again, again.to_json()) == (plan, plan.to_json())
    report = again.apply_(model)
    assert sum(one.numel() for one in model.parameters()) == report.parameters_after <= (1 - ratio) * before
    assert report["tokens"].shape == (60, 24)
    for layer in report.layers:
        exact, found = (one.get_submodule(layer.name).weight for one in (dense, model))
        assert layer.relative_error == pytest.approx(norm(exact - found) / norm(exact), abs=1e-6)
    loaded = load_compressed_(Reader(seed + 1), model.state_dict())
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert repr(loaded) == repr(model)
    assert repr(restore_dense_(loaded)) == repr(dense)
    assert torch.allclose(loaded(TOKENS), model(TOKENS), atol=1e-3)
    assert norm(loaded.tokens.weight[0]) == norm(model.tokens.weight[0]) == 0


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(FORMS), st.data(), seeds)
def test_structure_is_read_off_the_shapes_even_where_sizes_coincide(rows, size, form, data, seed):
    most = min(rows, size) - (form == "pivoted")
    if most < 1:
        rows, size, most = 2, 2, 1
    model = nn.Sequential(
        LowRankEmbedding.from_embedding(table(rows, size, seed), data.draw(st.integers(1, most)), form)
    )
    again = load_compressed_(nn.Sequential(table(rows, size, seed + 1)), model.state_dict())
    assert repr(again) == repr(model)
    assert torch.equal(again(torch.arange(rows)), model(torch.arange(rows)))


def test_the_best_table_for_a_lookup_is_found_in_the_plan():
    plan = plan_compression(Reader(0), 0.5)
    assert list(plan["tokens"].options) == ["channel"]
    errors = plan["tokens"].options["channel"].errors
    weight = Reader(0).tokens.weight.detach().double()
    expected = [tail_energy([weight], rank) / norm(weight) ** 2 for rank in range(25)]
    assert torch.allclose(errors, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_looking_up_costs_nothing_so_that_fewer_multiply_accumulates_leave_a_table_dense():
    model = Reader(0)
    report = svd_compress_(model, 0.5, target="macs", example_inputs=TOKENS)
    assert report.macs_after == counted(model, TOKENS) <= 0.5 * report.macs_before
    assert [report[name].reason for name in ("tokens", "positions")] == ["no rank needs fewer multiply-accumulates"] * 2

    class Idle(Reader):
        def forward(self, tokens):
            return self.body(self.tokens(tokens))

    plan = plan_compression(Idle(0), 0.5, target="macs", example_inputs=TOKENS)
    assert plan["positions"].reason == "never called on the example inputs"


@pytest.mark.parametrize("form", FORMS)
def test_a_table_that_is_compressed_all_the_same_is_priced_exactly(form):
    model = Reader(0)
    plan = plan_compression(model, 0.4, target="macs", example_inputs=TOKENS)
    plan["tokens"].choose("channel", 5, form)
    read = CompressionPlan.from_json(plan.to_json())
    report = read.apply_(model, TOKENS)
    assert read.macs_after == plan.macs_after == report.macs_after == counted(model, TOKENS)


def test_a_budget_of_time_is_kept(monkeypatch):
    def fake(call, device, repeats):
        owner = call.func.__self__
        return 1e-6 * sum(one.numel() for one in (owner if isinstance(owner, nn.Module) else call.args[0]).parameters())

    monkeypatch.setattr("torchsmooth._timing.seconds", fake)
    report = svd_compress_(Reader(0), 0.4, target="latency", example_inputs=TOKENS)
    assert report.latency_after <= 0.6 * report.latency_before
    assert report["tokens"].scheme == "channel"


def test_with_data_a_table_is_compressed_without_it_and_the_report_says_so():
    model, blind = Reader(0), Reader(0)
    plan = plan_compression(model, 0.5, calibration=[TOKENS])
    report = plan.apply_(model, calibration=[TOKENS, TOKENS.flip(0)])
    plan.apply_(blind)
    assert report["tokens"].note == "not calibrated: it looks rows up"
    assert report["tokens"].output_error is None
    assert torch.equal(model.tokens.weight, blind.tokens.weight)
    fitted = [layer for layer in report.compressed if not layer.note]
    assert fitted
    assert all(layer.output_error is not None for layer in fitted)
    assert "not calibrated: it looks rows up" in str(report)


def test_what_has_to_stay_dense_says_why():
    model = fill_(Tied(), 0)
    plan = plan_compression(model, 0.1)
    assert plan["embedding"].reason == "weight is shared with head.weight"
    several = nn.Sequential(
        nn.Embedding(30, 20, max_norm=1.0), nn.EmbeddingBag(30, 20), nn.Embedding(2, 1), nn.Linear(64, 64)
    )
    reasons = [layer.reason for layer in plan_compression(several, 0.2)]
    assert reasons == [
        "max_norm rescales its rows in place when they are looked up (set it to None first)",
        "EmbeddingBag is not supported",
        "no rank makes it smaller",
        "",
    ]


def test_hooks_and_notes_stay_with_the_table():
    model, calls = Reader(0), []
    model.tokens.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    model.tokens.note = "mine"
    svd_compress_(model, 0.6)
    model(TOKENS)
    restore_dense_(model)
    model(TOKENS)
    assert calls == [LowRankEmbedding, nn.Embedding]
    assert model.tokens.note == "mine"


@pytest.mark.parametrize(("rows", "size"), [(30, 8), (8, 30)])
def test_a_tail_is_penalised_but_not_that_of_the_padding_row(rows, size):
    model = nn.Sequential(table(rows, size, dtype=torch.float64, padding_idx=2))
    with torch.no_grad():
        model[0].weight[2] = 5  # never trained, whatever it holds
    smooth_(model, RankTail(0.5, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_(optimizer, model)
    optimizer.step()
    weight = model[0].weight.detach()
    assert torch.equal(weight[2], torch.full((size,), 5.0, dtype=torch.float64))
    trained = torch.cat([weight[:2], weight[3:]])
    values = torch.linalg.svdvals(trained)
    assert int((values > 1e-9 * values[0]).sum()) < min(rows - 1, size)
    assert handle is not None


def with_value(module, value):
    with torch.no_grad():
        module.weight[0, 0] = value
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowRankEmbedding.from_embedding(nn.Embedding(9, 6), 7), ValueError, "between 1 and 6 .the full rank."),
        (
            lambda: LowRankEmbedding.from_embedding(nn.Embedding(9, 6), 6, "pivoted"),
            ValueError,
            "between 1 and 5 .one ",
        ),
        (lambda: LowRankEmbedding.from_embedding(nn.Embedding(9, 6), 2, "dense"), ValueError, "form must be one of"),
        (lambda: LowRankEmbedding.from_embedding(nn.Embedding(9, 6), True), TypeError, "rank must be an integer, got"),
        (lambda: LowRankEmbedding(9, 6, 2, 9), ValueError, "padding_idx must lie between -9 and 8 .*, got 9"),
        (lambda: LowRankEmbedding(9, 6, 2, 1.0), TypeError, "padding_idx must be an integer or None, got float 1.0"),
        (
            lambda: LowRankEmbedding.from_embedding(nn.Embedding(9, 6, max_norm=1.0), 2),
            ValueError,
            "this Embedding cannot be factored: max_norm rescales its rows in place",
        ),
        (
            lambda: LowRankEmbedding.from_embedding(nn.EmbeddingBag(9, 6), 2),
            TypeError,
            "expected a torch.nn.Embedding, got EmbeddingBag",
        ),
        (
            lambda: LowRankEmbedding.from_embedding(nn.Linear(9, 6), 2),
            TypeError,
            "Use LowRankLinear.from_linear for that",
        ),
        (
            lambda: LowRankLinear.from_linear(nn.Embedding(9, 6), 2),
            TypeError,
            "Use LowRankEmbedding.from_embedding for that",
        ),
        (
            lambda: LowRankEmbedding.from_embedding(with_value(nn.Embedding(9, 6), torch.inf), 2),
            ValueError,
            "this Embedding holds 1 NaN or infinite values out of 54",
        ),
        (
            lambda: svd_compress_(nn.Embedding(9, 6), 0.5),
            ValueError,
            r"itself an Embedding.* use LowRankEmbedding.from_embedding\(layer, rank\), or wrap",
        ),
        (
            lambda: restore_dense_(LowRankEmbedding(9, 6, 2)),
            ValueError,
            r"itself a LowRankEmbedding.* call its to_dense\(\)",
        ),
    ],
)
def test_bad_input_is_named_with_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_error_changes_nothing():
    small, model = Reader(0), Reader(1)
    svd_compress_(small, 0.6)
    model.tokens = nn.Embedding(50, 24)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no factors of the weight of layer 'tokens', which has shape \(50, 24\)"):
        load_compressed_(model, small.state_dict())
    with torch.no_grad():
        model.tokens.weight[7, 7] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'tokens' holds 1 NaN"):
        svd_compress_(model, 0.5)
    assert same(before, snapshot(model))
