"""Compressed networks on their way out: torch.export, ONNX, AOTInductor, torch.fx and TorchScript."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import nn

from tests.low_rank_networks import NETWORKS, difference, needs_compiler, network
from tests.networks import same, snapshot
from tests.strategies import fill_, randn
from torchsmooth import LowRankLinear, svd_compress_
from torchsmooth._lowrank_layer import LowRankLayer

each_network = pytest.mark.parametrize("name", NETWORKS)
with_the_rest_slow = pytest.mark.parametrize(
    "name", ["every_form", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "every_form")]
)
# torch's exporter calls what torch has renamed.
tree_spec = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
torchscript = pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is deprecated")


def exported(model, batch, **kwargs):
    """Export a model for batches of any size."""
    return torch.export.export(
        model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},), **kwargs
    )


@with_the_rest_slow
def test_an_exported_program_runs_batches_of_any_size_after_it_was_saved(name):
    model, batch = network(name)
    file = io.BytesIO()
    torch.export.save(exported(model, batch), file)
    file.seek(0)
    program = torch.export.load(file)
    assert set(program.state_dict) <= set(model.state_dict())
    for inputs in (batch, batch[:1], torch.cat([batch, batch])):
        assert difference(program.module()(inputs), model(inputs)) <= 1e-5


@pytest.mark.slow
@each_network
def test_strict_export_computes_the_same(name):
    model, batch = network(name)
    assert difference(exported(model, batch, strict=True).module()(batch[:2]), model(batch[:2])) <= 1e-5


def run_onnx(program, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


@tree_spec
@with_the_rest_slow
def test_onnx_computes_the_same(name):
    pytest.importorskip("onnxscript")
    model, batch = network(name)
    batches = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(model, (batch,), dynamo=True, dynamic_shapes=({0: batches},), verbose=False)
    for inputs in (batch, batch[:1], torch.cat([batch, batch])):
        assert difference(run_onnx(program, inputs), model(inputs)) <= 1e-4


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torchscript
@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("scheme", ["channel", "input", "spatial", "tucker"])
def test_the_older_onnx_exporter_takes_every_scheme_and_form(scheme, form):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    layers = [
        nn.Conv2d(4, 12, 3),
        nn.ConvTranspose2d(12, 12, 3),
        nn.Conv2d(12, 12, 5),
        nn.Flatten(1),
        nn.Linear(48, 40),
    ]
    model = fill_(nn.Sequential(*layers), 0).eval()
    report = svd_compress_(model, 0.3, scheme=(scheme, "channel") if scheme == "tucker" else scheme, form=form)
    assert {one.form for one in report.compressed} == {form}
    file, batch = io.BytesIO(), randn(3, 4, 6, 6, seed=1, dtype=torch.float32)
    batch = batch.to(memory_format=torch.channels_last)
    torch.onnx.export(model, (batch,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    assert difference(torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0]), model(batch)) <= 1e-4


@tree_spec
def test_onnx_holds_the_factors_and_not_their_product():
    pytest.importorskip("onnxscript")
    model = fill_(nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48)), 0).eval()
    svd_compress_(model, 0.5, form="factored")
    program = torch.onnx.export(model, (torch.zeros(2, 48),), dynamo=True, verbose=False)
    operators = Counter(node.op_type for node in program.model_proto.graph.node)
    assert operators["Gemm"] + operators["MatMul"] == 4
    stored = sum(len(one.raw_data) for one in program.model_proto.graph.initializer)
    assert stored <= 4 * sum(parameter.numel() for parameter in model.parameters()) + 64


@needs_compiler
@tree_spec
@pytest.mark.slow
@each_network
def test_an_ahead_of_time_compiled_package_computes_the_same(name, tmp_path):
    model, batch = network(name)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            exported(model, batch), package_path=str(tmp_path / "model.pt2")
        )
        runner = torch._inductor.aoti_load_package(path)
        for inputs in (batch, batch[:2]):
            assert difference(runner(inputs), model(inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["every_form", "resnet"])  # torch.fx cannot trace nn.TransformerEncoder itself
def test_a_symbolic_trace_computes_the_same_and_keeps_the_names(name):
    model, batch = network(name)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(batch[:2]), model(batch[:2]))
    assert traced.state_dict().keys() == model.state_dict().keys()


@torchscript
@pytest.mark.parametrize(
    "name",
    [
        "every_form",
        "resnet",
        # nn.MultiheadAttention decides by sizes
        pytest.param("encoder", marks=pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")),
    ],
)
def test_torchscript_can_trace(name):
    model, batch = network(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, batch, check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert difference(traced(batch), model(batch)) <= 1e-6
    assert difference(traced(batch[:2]), model(batch[:2])) <= 1e-5


@torchscript
def test_torchscript_cannot_compile_and_says_what_can():
    model, batch = network("every_form")
    before, expected = snapshot(model), model(batch)
    kinds = {type(layer).__name__ for layer in model.modules() if isinstance(layer, LowRankLayer)}
    assert len(kinds) == 5
    for layer in (model, *(one for one in model if isinstance(one, LowRankLayer))):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot compile a (LowRank|Tucker).*use torch.jit.trace"):
            torch.jit.script(layer)
    assert torch.equal(model(batch), expected)
    assert same(before, snapshot(model))
    torch.jit.script(LowRankLinear.from_linear(nn.Linear(5, 4), 2).to_linear())
