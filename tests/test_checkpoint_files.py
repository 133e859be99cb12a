"""Checkpoints compressed without the model: the same tensors as with it, from every kind of file, in little memory."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from testbed.cifar_resnet import load_cifar_resnet
from tests import checkpoints
from tests.checkpoints import KINDS, load, out, same, save
from tests.networks import Tied, mlp, small_resnet
from tests.strategies import fill_, hard_matrix, randn, seeds
from torchsmooth import LowRankLinear, _leading, _options, compress_checkpoint, load_compressed_, svd_compress_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def blank():
    """Every kind of layer that shapes can tell, with and without a bias, between norms."""
    return nn.Sequential(
        nn.Conv1d(6, 10, 3),
        nn.BatchNorm1d(10),
        nn.Conv2d(5, 8, (3, 2), bias=False),
        nn.Conv3d(4, 6, 2),
        nn.LayerNorm(12),
        nn.Linear(12, 9),
        nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 14)),
    )


def mixed(seed, dtype=torch.float32):
    """The same with values; three of the matrices are hard."""
    model = fill_(blank(), seed)
    for number, (layer, kind) in enumerate(zip((model[5], *model[6]), ("rank_one", "repeated", "zero"), strict=True)):
        layer.weight.data = hard_matrix(kind, *layer.weight.shape, seed + number, torch.float32)
    return model.to(dtype)


@settings(max_examples=12)
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    goal=st.one_of(st.floats(0.1, 0.7).map(lambda one: {"ratio": one}), st.just({"max_error": 0.4})),
    options=st.fixed_dictionaries(
        {
            "scheme": st.sampled_from(["auto", "channel", ("channel", "spatial"), "tucker"]),
            "form": st.sampled_from(["auto", "factored", "pivoted"]),
            "allocation": st.sampled_from(["budget", "uniform"]),
            "rank_multiple": st.sampled_from([1, 2]),
        }
    ),
    with_model=st.booleans(),
)
def test_the_same_tensors_as_from_the_model_bit_for_bit(tmp_path_factory, seed, dtype, kind, goal, options, with_model):
    folder = tmp_path_factory.mktemp("same")
    model = mixed(seed, dtype)
    source = save(model.state_dict(), folder, kind)
    with torch.device("meta"):
        skeleton = blank() if with_model else None
    refusal = ""
    try:
        expected = svd_compress_(model, **goal, **options)
    except ValueError as error:
        refusal = str(error)
    if refusal:  # not every plan that is drawn can reach the ratio
        assert "cannot be reached" in refusal
        with pytest.raises(ValueError, match=re.escape(refusal)):
            compress_checkpoint(source, out(folder, kind), **goal, **options, model=skeleton)
        assert not out(folder, kind).exists()
        return
    report = compress_checkpoint(source, out(folder, kind), **goal, **options, model=skeleton)
    assert same(load(out(folder, kind)), model.state_dict())
    assert [one.name for one in report.layers] == [one.name for one in expected.layers]
    assert report == expected
    again = load_compressed_(mixed(seed + 1, dtype), out(folder, kind))
    assert same(again.state_dict(), model.state_dict())
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("room", [1 << 26, 0])
def test_few_vectors_of_large_weights_are_found_as_from_the_model(tmp_path, monkeypatch, room):
    monkeypatch.setattr(_leading, "_LARGE", 32)
    monkeypatch.setattr(_options, "_ROOM", room)
    monkeypatch.setattr(_options, "_LAYERS", int(room > 0))
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.data = hard_matrix("decaying", 64, 64, 5, torch.float64).float()
    source = save(model.state_dict(), tmp_path, "safetensors")
    report = compress_checkpoint(source, out(tmp_path, "safetensors"), 0.93, form="factored")
    assert all(layer.rank <= 4 for layer in report.compressed)
    assert svd_compress_(model, 0.93, form="factored") == report
    assert same(load(out(tmp_path, "safetensors")), model.state_dict())


class Words(nn.Module):
    """Names as transformers have them."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 12)
        self.wpe = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.relative_attention_bias = nn.Embedding(8, 2)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(12, 12)})
        self.embeddings = nn.ModuleList([nn.Embedding(9, 12)])
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12)
        self.quantised = nn.Linear(12, 12)
        self.quantised.register_buffer("weight_scale", torch.ones(1))
        self.norm = nn.LayerNorm((2, 12))
        self.norm_like = nn.BatchNorm1d(12)
        self.codes = nn.Parameter(torch.zeros(4, 12))
        self.register_buffer("position_ids", torch.arange(20).reshape(1, 20))
        self.lm_head = nn.Linear(12, 30, bias=False)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_what_is_no_plain_layer_by_its_name_or_shape_stays_dense(tmp_path, kind):
    model = fill_(Words(), 3)
    state = model.state_dict()
    source = save(state, tmp_path, kind)
    report = compress_checkpoint(source, out(tmp_path, kind), 0.15)
    reasons = {one.name: one.reason for one in report.layers}
    by_name = "an embedding by its name (give the model to be sure)"
    more = "there is more than a weight and a bias: "
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "embed_tokens": by_name,
        "wpe": by_name,
        "relative_attention_bias": by_name,
        "embeddings.0": by_name,
        "attention.in_proj_weight": "its key does not end in .weight",
        "attention.out_proj": "part of an nn.MultiheadAttention, which only svd_compress_ compresses",
        "depthwise": "depthwise, as far as its shape tells (give the model to be sure)",
        "quantised": f"{more}'quantised.weight_scale'",
        "norm": "a norm by its name (give the model to be sure)",
        "norm.bias": "its key does not end in .weight",
        "codes": "its key does not end in .weight",
    }
    # 2 × 12 numbers of running statistics are no parameters.
    assert report.parameters_before == sum(one.numel() for one in model.parameters()) + 1
    kept = load(out(tmp_path, kind))
    dense = [key for key in state if key in kept]
    assert same({key: kept[key] for key in dense}, {key: state[key] for key in dense})


def test_a_filter_sees_names_and_shapes_of_what_could_be_compressed(tmp_path):
    source, seen = save(mlp().state_dict(), tmp_path, "pickle"), {}

    def keep(shape, name):
        seen[name] = shape
        return name != "2"

    report = compress_checkpoint(source, tmp_path / "small.pt", 0.3, filter_fn=keep)
    assert seen == {"0": (32, 24), "2": (16, 32), "4": (8, 16)}
    assert report["2"].reason == "left out by filter_fn"


class Grouped(nn.Module):
    """What names and shapes cannot tell: groups, a lookup under another name, a transposed weight, a subclass."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.conv = nn.Conv2d(16, 16, 3, groups=2)
        self.back = nn.ConvTranspose2d(16, 8, 3)
        self.odd = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
        self.embed_out = nn.Linear(16, 30)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_the_model_says_what_names_cannot(tmp_path, kind):
    model = fill_(Grouped(), 1)
    source = save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path, kind)
    with torch.device("meta"):
        skeleton = Grouped()
    before = repr(skeleton)
    report = compress_checkpoint(source, out(tmp_path, kind), max_error=0.6, model=skeleton)
    assert repr(skeleton) == before
    svd_compress_(model, max_error=0.6)
    assert same(load(out(tmp_path, kind)), {f"module.{key}": value for key, value in model.state_dict().items()})
    assert {one.name.removeprefix("module.") for one in report.compressed} == {"table", "conv", "back", "embed_out"}
    kept = {key.removeprefix("module."): value for key, value in load(out(tmp_path, kind)).items()}
    assert load_compressed_(Grouped(), kept).conv.groups == 2


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_tied_weights_stay_dense_and_count_once(tmp_path, kind):
    model = fill_(Tied(), 2)
    state = model.state_dict()
    if kind == "safetensors":  # which holds a copy, or one of the two
        state = {key: value.clone() for key, value in state.items()}
    report = compress_checkpoint(save(state, tmp_path, kind), out(tmp_path, kind), 0.05)
    assert report["head"].scheme is None
    assert report["head"].reason == (
        "weight is shared with embedding.weight"
        if kind == "pickle"
        else "weight equals that of embedding.weight, to which it seems to be tied"
    )
    if kind == "pickle":
        assert report.parameters_before == sum(one.numel() for one in model.parameters())
        kept = torch.load(out(tmp_path, kind), weights_only=True)
        assert kept["head.weight"].data_ptr() == kept["embedding.weight"].data_ptr()
        load_compressed_(Tied(), out(tmp_path, kind))
    del state["head.weight"]
    half = save(state, tmp_path, kind, "half")
    by_model = compress_checkpoint(half, out(tmp_path, kind, "smaller"), 0.05, model=Tied())
    assert by_model["head"].reason or by_model["embedding"].reason
    assert by_model.parameters_before == sum(one.numel() for one in model.parameters())


def test_tied_weights_that_a_file_holds_once_are_loaded(tmp_path):
    model = fill_(Tied(), 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    del state["head.weight"], state["body.1.weight"]
    loaded = load_compressed_(Tied(), save(state, tmp_path, "safetensors"))
    assert loaded.head.weight is loaded.embedding.weight
    assert same(loaded.state_dict(), model.state_dict())
    del state["body.1.bias"]
    with pytest.raises(ValueError, match=r'Missing key\(s\) in state_dict: "body\.1\.bias"'):
        load_compressed_(Tied(), save(state, tmp_path, "pickle"))


def test_attention_stays_as_it_is_and_can_be_loaded(tmp_path):
    def build(seed):
        return fill_(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.MultiheadAttention(16, 2, kdim=8)), seed)

    source = save(build(0).state_dict(), tmp_path, "safetensors")
    for options in ({}, {"model": build(1)}):
        report = compress_checkpoint(source, tmp_path / "small.safetensors", 0.2, **options)
        assert {one.name for one in report.compressed} == {"0.linear1", "0.linear2"}
        loaded = load_compressed_(build(2), tmp_path / "small.safetensors")
        assert same(loaded.state_dict(), load(tmp_path / "small.safetensors"))
        assert torch.equal(loaded[1].q_proj_weight, build(0)[1].q_proj_weight)


def test_square_matrices_stay_dense_among_transposed_ones(tmp_path):
    state = {
        "h.0.attn.c_proj.weight": randn(12, 12, seed=0),
        "h.0.attn.c_proj.bias": torch.zeros(12),
        "h.0.mlp.c_fc.weight": randn(12, 48, seed=1),  # (in, out), as the bias tells
        "h.0.mlp.c_fc.bias": torch.zeros(48),
        "head.weight": randn(30, 12, seed=2),
    }
    report = compress_checkpoint(save(state, tmp_path, "pickle"), tmp_path / "small.pt", 0.05)
    assert report["h.0.mlp.c_fc"].reason == "bias is of shape (48,)"
    assert report["h.0.attn.c_proj"].reason == (
        "perhaps stored as (in, out), as 'h.0.mlp.c_fc' is (give the model to be sure)"
    )
    assert report["head"].scheme == "channel"
    del state["h.0.mlp.c_fc.weight"], state["h.0.mlp.c_fc.bias"]
    report = compress_checkpoint(save(state, tmp_path, "pickle"), tmp_path / "small.pt", max_error=0.9)
    assert report["h.0.attn.c_proj"].scheme == "channel"


def test_other_tensors_and_what_a_file_says_of_itself_are_kept(tmp_path):
    odd = {
        "empty.weight": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "eight.weight": randn(8, 8, seed=0, dtype=torch.float32).to(torch.float8_e4m3fn),
        "whole.weight": torch.arange(6, dtype=torch.int8).reshape(2, 3),
        "flags": torch.tensor([True, False, True]),
        "half.bias": randn(3, seed=1, dtype=torch.bfloat16),
        "complex.weight": torch.ones(2, 2, dtype=torch.complex64),
        "five": torch.arange(5, dtype=torch.uint8),
    }
    state = {**mlp().state_dict(), **odd}
    for kind in ("safetensors", "sharded", "pickle"):
        report = compress_checkpoint(save(state, tmp_path, kind), out(tmp_path, kind), 0.5)
        kept = load(out(tmp_path, kind))
        assert same({key: kept[key] for key in odd}, odd)
        assert {
            one.name: one.reason for one in report.layers if one.name in ("empty", "eight", "whole", "complex")
        } == {
            "empty": "weight is empty",
            "eight": "weight is of torch.float8_e4m3fn",
            "whole": "weight is of torch.int8",
            "complex": "weight is of torch.complex64",
        }
        assert report.parameters_before == sum(one.numel() for one in state.values() if one.dtype.is_floating_point) + 4
    with safe_open(out(tmp_path, "safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "torchsmooth": "ratio 0.5"}
    index = json.loads((out(tmp_path, "sharded") / "model.safetensors.index.json").read_text())
    sizes = sum(one.numel() * one.element_size() for one in load(out(tmp_path, "sharded")).values())
    assert index["metadata"] == {"by": "a test", "total_size": sizes}


def test_a_training_checkpoint_keeps_what_does_not_belong_to_the_dense_weights(tmp_path):
    source = save(mlp().state_dict(), tmp_path, "nested")
    compress_checkpoint(source, tmp_path / "small.pth", 0.5)
    content = torch.load(tmp_path / "small.pth", weights_only=True)
    assert content.keys() == {"state_dict", "epoch"}
    assert content["epoch"] == 3
    assert content["state_dict"]._metadata == mlp().state_dict()._metadata


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_loaded_from_any_kind_of_file(tmp_path, kind):
    model = small_resnet(1)
    svd_compress_(model, 0.4, scheme="channel")
    path = save(model.state_dict(), tmp_path, kind)
    for way in (path, str(path), *([path.parent] if kind.startswith("sharded") else [])):
        assert same(load_compressed_(small_resnet(2), way).state_dict(), model.state_dict())


def test_the_format_of_old_versions_of_torch_is_read(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    compress_checkpoint(tmp_path / "old.pt", tmp_path / "small.pt", 0.5)
    model = mlp()
    svd_compress_(model, 0.5)
    assert same(load(tmp_path / "small.pt"), model.state_dict())


def test_a_file_that_is_mapped_anew_between_tensors_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("torchsmooth._pickle_file._MAPPED", 0)
    compress_checkpoint(save(mlp().state_dict(), tmp_path, "pickle"), tmp_path / "small.pt", 0.5)
    model = mlp()
    svd_compress_(model, 0.5)
    assert same(load(tmp_path / "small.pt"), model.state_dict())


PEAK = """
import resource, sys, torch, torchsmooth
small, large, folder = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torchsmooth.compress_checkpoint(small, folder + "/first.safetensors", 0.5, progress=False)
before = peak()
torchsmooth.compress_checkpoint(large, folder + "/second.safetensors", 0.5, progress=False)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured in units that differ by system")
def test_memory_is_that_of_a_few_layers_not_of_the_file(tmp_path):
    layer = randn(32, 8192, seed=0, dtype=torch.float32)  # 1 MiB
    small = save({f"layers.{number}.weight": layer for number in range(2)}, tmp_path, "safetensors", "small")
    large = save({f"layers.{number}.weight": layer for number in range(32)}, tmp_path, "safetensors", "large")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PEAK, str(small), str(large), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second.safetensors").stat().st_size > 15 * 2**20
    assert float(done.stdout) < 8  # MiB: what 32 layers take beyond 2


def test_a_trained_network_from_the_wild(tmp_path, shared_data_folder):
    """Saved from an nn.DataParallel, under "state_dict", beside its accuracy."""
    (source,) = (shared_data_folder / "cifar_resnet").glob("resnet20-*.th")
    report = compress_checkpoint(source, tmp_path / "small.th", 0.6, scheme=("channel", "spatial"))
    model = load_cifar_resnet(20)
    assert report.totals == svd_compress_(model, 0.6, scheme=("channel", "spatial")).totals
    small = load(tmp_path / "small.th")
    assert all(key.startswith("module.") for key in small)
    # It is older than the counters of BatchNorm.
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert same({key.removeprefix("module."): value for key, value in small.items()}, expected)
    with pytest.raises(ValueError, match=r"its keys start with 'module\.', the prefix of a wrapper"):
        load_compressed_(load_cifar_resnet(20), tmp_path / "small.th")


def test_weights_in_other_strides_are_compressed_like_those_in_the_ordinary_ones(tmp_path):
    state = {"0.weight": randn(24, 16, seed=4, dtype=torch.float32).T, "1.weight": randn(8, 8, 3, 3, seed=5).float()}
    torch.save(state | {"1.weight": state["1.weight"].to(memory_format=torch.channels_last)}, tmp_path / "odd.pt")
    compress_checkpoint(tmp_path / "odd.pt", tmp_path / "small.pt", 0.3)
    compress_checkpoint(save(copy.deepcopy(state), tmp_path, "safetensors"), tmp_path / "small.safetensors", 0.3)
    assert same(load(tmp_path / "small.pt"), load(tmp_path / "small.safetensors"))
    assert all(value.is_contiguous() for value in load(tmp_path / "small.pt").values())


def test_the_helpers_of_these_tests_see_a_difference(tmp_path):
    state = mlp().state_dict()
    for kind in KINDS:
        assert same(load(save(state, tmp_path, kind, kind)), state)
    other = {key: value.clone() for key, value in state.items()}
    other["0.bias"][0] += 1
    assert not same(state, other)
    assert checkpoints.out(tmp_path, "sharded").suffix == ""


class Twice(nn.Module):
    """Has a layer under two names."""

    def __init__(self, names=("a", "b")):
        super().__init__()
        layer = nn.Linear(32, 32)
        for name in names:
            setattr(self, name, layer)
        self.out = nn.Linear(32, 8)

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


def check_loads(model, path, **options):
    x = torch.ones(3, 32)
    again = load_compressed_(Twice(**options), path)
    assert torch.equal(model(x), again(x))
    assert again.a is again.b


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_layer_under_two_names_is_compressed_under_both(tmp_path, names):
    model = fill_(Twice(names), 0)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    save_model(model, tmp_path / "dense.safetensors")  # which keeps one of the names
    expected = copy.deepcopy(model)
    svd_compress_(expected, 0.4)
    for kind in ("pt", "safetensors"):
        small = tmp_path / f"small.{kind}"
        report = compress_checkpoint(tmp_path / f"dense.{kind}", small, 0.4, model=model)
        assert len(report.layers) == 2
        check_loads(expected, small, names=names)
        assert not any(key in load(small) for key in ("a.weight", "b.weight"))
        assert small.stat().st_size < (tmp_path / f"dense.{kind}").stat().st_size
    save_model(expected, tmp_path / "saved.safetensors")
    check_loads(expected, tmp_path / "saved.safetensors", names=names)


class Versioned(nn.Module):
    """Wants to know by which version of it a state dict was saved."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"saved by version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_modules_are_read_from_a_file_too(tmp_path):
    model = nn.Sequential(Versioned(), nn.Linear(32, 8))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    compress_checkpoint(tmp_path / "dense.pt", tmp_path / "small.pt", 0.3)
    again = load_compressed_(nn.Sequential(Versioned(), nn.Linear(32, 8)), tmp_path / "small.pt")
    assert isinstance(again[0].inner, LowRankLinear)


def test_views_of_one_large_tensor_do_not_keep_it_in_the_file(tmp_path):
    model = fill_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0)
    state = model.state_dict()
    flat = torch.cat([one.flatten() for one in state.values()])
    views = dict(
        zip(
            state,
            (
                part.view(one.shape)
                for part, one in zip(flat.split([one.numel() for one in state.values()]), state.values(), strict=True)
            ),
            strict=True,
        )
    )
    views["tied"] = views["0.bias"]
    torch.save(views, tmp_path / "flat.pt")
    compress_checkpoint(tmp_path / "flat.pt", tmp_path / "small.pt", 0.7)
    found = load(tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 0.5 * (tmp_path / "flat.pt").stat().st_size
    bias = next(value for key, value in found.items() if key.startswith("0.") and key.endswith("bias"))
    assert torch.equal(found["tied"], state["0.bias"])
    assert bias.untyped_storage().data_ptr() == found["tied"].untyped_storage().data_ptr()


def test_factors_of_a_file_that_was_compressed_stay_as_they_are(tmp_path):
    build = lambda: nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 40))  # noqa: E731
    model = fill_(build(), 0)
    svd_compress_(model, 0.3, filter_fn=lambda _, name: name != "3")
    torch.save(model.state_dict(), tmp_path / "small.pt")
    report = compress_checkpoint(tmp_path / "small.pt", tmp_path / "smaller.pt", 0.1)
    reasons = {one.name: one.reason for one in report.layers}
    assert reasons["0.down"] == "a factor of '0', which is low-rank already (compress the dense checkpoint)"
    assert [one.name for one in report.layers if one.rank is not None] == ["3"]
    again = load_compressed_(build(), tmp_path / "smaller.pt")
    assert torch.equal(again[0].up.weight, model[0].up.weight)
    with pytest.raises(ValueError, match="holds layer '0' low-rank already"):
        compress_checkpoint(tmp_path / "small.pt", tmp_path / "none.pt", 0.1, model=build())


def factored_file(folder, kind):
    """A file of two factored layers and a dense one, which this library wrote."""
    model = fill_(nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 40)), 0)
    source = save(model.state_dict(), folder, kind, "dense")
    keep = lambda _, name: name != "3"  # noqa: E731
    compress_checkpoint(source, out(folder, kind), 0.3, form="factored", filter_fn=keep)
    return out(folder, kind), model


@pytest.mark.parametrize("kind", ["safetensors", "sharded"])
def test_a_file_that_says_it_was_compressed_keeps_its_factors(tmp_path, kind):
    path, model = factored_file(tmp_path, kind)
    report = compress_checkpoint(path, out(tmp_path, kind, "smaller"), 0.05)
    assert [one.name for one in report.compressed] == ["3"]
    assert report["2.up"].reason == "a factor of '2', which is low-rank already (compress the dense checkpoint)"
    again = load_compressed_(copy.deepcopy(model), out(tmp_path, kind, "smaller"))
    assert torch.equal(again[0].up.weight, load(path)["0.up.weight"])
    with pytest.raises(ValueError, match=r"nothing to compress in this checkpoint: .*compress the dense checkpoint"):
        compress_checkpoint(out(tmp_path, kind, "smaller"), out(tmp_path, kind, "none"), 0.05)


def test_what_may_be_factors_in_a_file_that_does_not_say_is_noted(tmp_path):
    path, _ = factored_file(tmp_path, "pickle")
    report = compress_checkpoint(path, tmp_path / "smaller.pt", max_error=0.9)
    notes = {one.name: one.note for one in report.compressed}
    assert notes.keys() == {"0.down", "0.up", "2.down", "2.up", "3"}
    text = "a factor of '0', if this file was compressed before: nothing loads this then, use the dense file"
    assert notes["0.down"] == notes["0.up"] == text
    assert text in str(report)
    assert notes["3"] == ""


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.down.weight": (8, 40), "a.up.weight": (40, 8), "a.weight": (40, 40)},
        {"a.down.weight": (8, 40), "a.up.weight": (40, 9)},
        {"a.down.weight": (40, 24), "a.up.weight": (24, 40)},
        {"a.down.weight": (8, 40), "b.up.weight": (40, 8)},
        {"a.down.weight": (8, 40, 1), "a.up.weight": (40, 8)},
    ],
)
def test_layers_that_cannot_be_factors_get_no_note(tmp_path, shapes):
    torch.save({key: randn(*shape, seed=1) for key, shape in shapes.items()}, tmp_path / "dense.pt")
    report = compress_checkpoint(tmp_path / "dense.pt", tmp_path / "small.pt", max_error=0.9)
    assert report.compressed
    assert not any(one.note for one in report.layers)


def test_layers_that_are_called_up_and_down_are_layers(tmp_path):
    model = fill_(nn.ModuleDict({"up": nn.Linear(24, 96), "down": nn.Linear(96, 24)}), 0)
    torch.save({f"mlp.{key}": value for key, value in model.state_dict().items()}, tmp_path / "dense.pt")
    report = compress_checkpoint(tmp_path / "dense.pt", tmp_path / "small.pt", 0.5)
    assert not any(one.reason for one in report.layers)
