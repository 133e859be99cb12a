"""What others build on: public names, signatures, the two halves apart, and the built wheel."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import torchsmooth
from torchsmooth import functional, fused, penalties

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "torchsmooth"

SIGNATURES = {
    "compress_checkpoint": (
        "(source, destination, ratio=None, *, max_error=None, scheme='auto', form='auto', allocation='budget', "
        "rank_multiple=None, filter_fn=None, model=None, device='cpu', progress=None)"
    ),
    "is_penalized": "(module, tensor_name=None)",
    "load_compressed_": "(model, state_dict)",
    "penalty_loss": "(model)",
    "plan_compression": (
        "(model, ratio=None, *, max_error=None, scheme='auto', form='auto', allocation='budget', target='params', "
        "example_inputs=None, rank_multiple=None, filter_fn=None, calibration=None, parametrized='keep', "
        "progress=None)"
    ),
    "register_layer": "(layer_type, expand, collapse=None)",
    "recalibrate_batchnorm_": "(model, batches)",
    "register_penalty": "(module, tensor_name, penalty)",
    "remove_penalties": "(module, tensor_name=None)",
    "restore_dense_": "(model)",
    "plot_spectra": "(spectra, path=None)",
    "plot_weights": "(weights, path=None, *, position=None, relative=False)",
    "smooth_": "(model, penalty, filter_fn=None)",
    "spectrum": "(model, *, ratio=0.8, scheme='channel', filter_fn=None)",
    "svd_compress_": (
        "(model, ratio=None, *, max_error=None, scheme='auto', form='auto', allocation='budget', target='params', "
        "example_inputs=None, rank_multiple=None, filter_fn=None, calibration=None, parametrized='keep', "
        "progress=None, process_group=None)"
    ),
    "sweep": (
        "(model, ratios, *, scheme='auto', form='auto', allocation='budget', target='params', example_inputs=None, "
        "rank_multiple=None, filter_fn=None, calibration=None, parametrized='keep', "
        "progress=None)"
    ),
    "tune_": ("(model, example_inputs, *, executions=None, memory_format='auto', cuda_graphs=False, progress=None)"),
    "FoldingReport": "(folded, left)",
    "fold_batchnorm_": "(model, *, pairs=None)",
    "TuningReport": "(layers, memory_format, seconds_before, seconds_after, seconds_dense=None, note='')",
    "attach_": "(optimizer, model, *, every=1, schedule=None)",
    "NuclearNorm": "(strength=0.001, scheme='channel', method='auto')",
    "NuclearRatio": "(strength=0.01, scheme='channel', method='auto')",
    "Constrained": "(penalty, bound=0.5, strength=0.0001)",
    "RankTail": "(ratio, strength=0.01, *, scheme='auto', form='auto', replan_every=400, refresh_every=40)",
    "StrengthSchedule": "(total_steps, shape='linear', begin=0.0, full=0.5, end=1.0)",
    "FirstDerivative": "(strength=0.0003)",
    "SecondDerivative": "(strength=0.0001)",
    "LowRankLinear": "(in_features, out_features, rank, bias=True, device=None, dtype=None, *, form='factored')",
    **dict.fromkeys(
        ("LowRankConv1d", "LowRankConv2d", "LowRankConv3d"),
        "(in_channels, out_channels, kernel_size, rank, *, scheme='channel', stride=1, padding=0, dilation=1, "
        "groups=1, bias=True, padding_mode='zeros', device=None, dtype=None, form='factored')",
    ),
    **dict.fromkeys(
        ("LowRankConvTranspose1d", "LowRankConvTranspose2d", "LowRankConvTranspose3d"),
        "(in_channels, out_channels, kernel_size, rank, *, scheme='channel', stride=1, padding=0, output_padding=0, "
        "dilation=1, groups=1, bias=True, padding_mode='zeros', device=None, dtype=None, form='factored')",
    ),
    "LowRankEmbedding": (
        "(num_embeddings, embedding_dim, rank, padding_idx=None, *, scale_grad_by_freq=False, sparse=False, "
        "device=None, dtype=None, form='factored')"
    ),
    "LowRankMultiheadAttention": (
        "(embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None, vdim=None, "
        "batch_first=False, device=None, dtype=None)"
    ),
    "LowRankRNN": (
        "(input_size, hidden_size, num_layers=1, nonlinearity='tanh', bias=True, batch_first=False, dropout=0.0, "
        "bidirectional=False, device=None, dtype=None)"
    ),
    "LowRankLSTM": (
        "(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, "
        "proj_size=0, device=None, dtype=None)"
    ),
    "LowRankGRU": (
        "(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, "
        "device=None, dtype=None)"
    ),
    "LowRankRNNCell": "(input_size, hidden_size, bias=True, nonlinearity='tanh', device=None, dtype=None)",
    "LowRankLSTMCell": "(input_size, hidden_size, bias=True, device=None, dtype=None)",
    "LowRankGRUCell": "(input_size, hidden_size, bias=True, device=None, dtype=None)",
    "TuckerConv2d": (
        "(in_channels, out_channels, kernel_size, rank, *, stride=1, padding=0, dilation=1, groups=1, bias=True, "
        "padding_mode='zeros', device=None, dtype=None, form='factored')"
    ),
    "Spectrum": "(layers, ratio)",
    "CompressionPlan": "(layers, parameters_before, asked, target='params', macs_before=None, latency_before=None)",
    "CompressionReport": (
        "(layers, parameters_before, parameters_after, asked, macs_before=None, macs_after=None, latency_before=None, "
        "latency_after=None)"
    ),
}


FUSED = {
    "fold_batchnorm": "(up, bias, batchnorm)",
    "is_available": "(device='cuda')",
    "low_rank_conv2d": "(input, down, up, bias=None, stride=1, padding=0, dilation=1, *, relu=False)",
    "low_rank_linear": "(input, down, up, bias=None, *, relu=False)",
    "why_unavailable": "(device='cuda')",
}


def bare(signature):
    """A signature without annotations."""
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def test_the_public_names_are_these():
    assert set(torchsmooth.__all__) == SIGNATURES.keys() | {"functional"}
    assert all(hasattr(torchsmooth, name) for name in torchsmooth.__all__)
    assert functional.__all__ == ["first_derivative", "nuclear_norm", "nuclear_ratio", "second_derivative"]
    assert fused.__all__ == sorted(FUSED)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", torchsmooth.__version__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_api(name):
    assert bare(inspect.signature(getattr(torchsmooth, name))) == SIGNATURES[name]


@pytest.mark.parametrize("name", FUSED)
def test_signatures_of_the_fused_operators_are_api(name):
    assert bare(inspect.signature(getattr(fused, name))) == FUSED[name]


@pytest.mark.parametrize(
    ("layer", "signatures"),
    [
        (
            torchsmooth.LowRankLinear,
            {
                "from_linear": "(linear, rank, form='factored')",
                "like": "(linear, rank, form='factored')",
                "to_linear": "(self)",
            },
        ),
        (
            torchsmooth.LowRankEmbedding,
            {
                "from_embedding": "(embedding, rank, form='factored')",
                "like": "(embedding, rank, form='factored')",
                "to_embedding": "(self)",
            },
        ),
        *(
            (
                getattr(torchsmooth, f"LowRankConv{kind}"),
                {
                    f"from_conv{name}": "(conv, rank, scheme='channel', form='factored')",
                    "like": "(conv, rank, scheme='channel', form='factored')",
                    f"to_conv{name}": "(self)",
                },
            )
            for axes in (1, 2, 3)
            for kind, name in ((f"{axes}d", f"{axes}d"), (f"Transpose{axes}d", f"_transpose{axes}d"))
        ),
    ],
)
def test_methods_of_the_layers_are_api(layer, signatures):
    shared = {"to_dense": "(self)", "factors": "(self)", "set_factors_": "(self, up, down)"}
    for name, expected in (signatures | shared).items():
        assert bare(inspect.signature(getattr(layer, name))) == expected


@pytest.mark.parametrize(
    ("layer", "signatures"),
    [
        ("LowRankMultiheadAttention", {"from_attention": "(attention)", "to_attention": "(self)"}),
        *((f"LowRank{one}", {"from_recurrent": "(layer)", "to_recurrent": "(self)"}) for one in ("RNN", "LSTM", "GRU")),
        *((f"LowRank{one}Cell", {"from_cell": "(cell)", "to_cell": "(self)"}) for one in ("RNN", "LSTM", "GRU")),
    ],
)
def test_ways_into_layers_with_projections_and_out_are_api(layer, signatures):
    for name, expected in signatures.items():
        assert bare(inspect.signature(getattr(getattr(torchsmooth, layer), name))) == expected


def test_attention_is_called_as_torchs_is():
    ours, theirs = torchsmooth.LowRankMultiheadAttention.forward, nn.MultiheadAttention.forward
    assert bare(inspect.signature(ours)) == bare(inspect.signature(theirs))


def test_methods_of_plans_are_api():
    expected = {
        "apply_": "(self, model, example_inputs=None, *, calibration=None, progress=None)",
        "save": "(self, path)",
        "load": "(path)",
        "to_json": "(self)",
        "from_json": "(text)",
        "to_dict": "(self)",
        "compare": "(self, other)",
    }
    for name, signature in expected.items():
        assert bare(inspect.signature(getattr(torchsmooth.CompressionPlan, name))) == signature


# What watches the training: of the penalties it knows what they are functions of, and which layers they find.
WATCHING = {"_layer_spectrum", "_reading", "plotting", "spectra"}


def imports():
    """Which module of the package imports which."""
    graph = {}
    for path in SOURCE.glob("*.py"):
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        names = {node.module for node in froms if node.module}
        names |= {alias.name for node in froms if not node.module for alias in node.names}
        graph[path.stem] = names
    return graph


def reachable(graph, start):
    found, todo = set(), [start]
    while todo:
        for name in graph[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def test_imports_are_acyclic_and_need_only_torch():
    graph = imports()
    assert all(name not in reachable(graph, name) for name in graph)
    for path in SOURCE.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            # Pictures need matplotlib, which is optional: imported where one is drawn, or for the type checker alone.
            lazy = {"matplotlib"} if path.stem in {"plotting", "spectra"} and node not in tree.body else set()
            # The kernels need Triton, which is optional: only functions import them.
            lazy |= {"triton"} if path.stem.startswith("_triton") else set()
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch"} | lazy | sys.stdlib_module_names
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in {"torch"} | lazy | sys.stdlib_module_names


def test_watching_a_training_needs_nothing_of_the_compression():
    graph = imports()
    algebra = {"_computed", "_decompose", "_linalg", "_matricise", "_checks"}
    knows = {"functional", "registry", "_registered", "_table"} | algebra
    assert set().union(*(graph[name] for name in WATCHING)) <= WATCHING | knows
    others = graph.keys() - WATCHING - {"__init__"}
    assert not any(graph[name] & WATCHING for name in others)


def test_the_two_halves_share_only_the_algebra_and_the_checks():
    graph = imports()
    penalty_half = {
        "_accumulate",
        "_derivatives",
        "_nuclear",
        "_polar",
        "_registered",
        "_sharded",
        "_stepping",
        "_weight",
        "adaptive",
        "attach",
        "functional",
        "loss",
        "penalties",
        "registry",
        "schedules",
    }
    compression_half = {
        "_backup",
        "_contents",
        "_sharing",
        "_whole",
        "_ranks",
        "_arrival",
        "_alike",
        "_checksum",
        "_pivoting",
        "_pivoted_modules",
        "_lowrank_conv",
        "_quantised",
        "_lowrank_layer",
        "_source_layer",
        "_expansion",
        "_undo",
        "layer_types",
        "_linear_parts",
        "_attend",
        "attention",
        "_recurrent",
        "recurrent",
        "recurrent_cells",
        "_lowrank_transposed",
        "lowrank",
        "lowrank_conv",
        "lowrank_embedding",
        "lowrank_transposed",
        "_layers",
        "_swap",
        "_budget",
        "_prices",
        "_objective",
        "_leading",
        "_stepped",
        "_execution",
        "_packed",
        "_derive",
        "_traces",
        "_follows",
        "_fused_layers",
        "_together",
        "folding",
        "_memory_format",
        "_tried",
        "tuning",
        "_spectrum",
        "_options",
        "_progress",
        "_kept_state",
        "_running",
        "_timing",
        "_counting",
        "_macs",
        "_latency",
        "_targets",
        "_weight_reads",
        "_workpiece",
        "_terms",
        "_planner",
        "_atomic_file",
        "_tensor_entry",
        "_tensor_source",
        "_safetensors_file",
        "_pickle_file",
        "_checkpoint_layers",
        "_checkpoint_factors",
        "_work_folder",
        "_destination",
        "_inspection",
        "_command_line",
        "__main__",
        "checkpoint_files",
        "_apply",
        "_batches",
        "_moments",
        "_whitening",
        "_tucker",
        "_tucker_layout",
        "_tucker_spectrum",
        "_fine_ranks",
        "_geometry",
        "_given_factors",
        "tucker",
        "_norms",
        "_traffic",
        "_calibration",
        "_finished",
        "_two_networks",
        "_refit",
        "_plan_file",
        "layer_plan",
        "plan",
        "planning",
        "report",
        "compress",
        "checkpoint",
        "batchnorm",
        "_fused_availability",
        "_fused_checks",
        "_fused_operators",
        "_triton_conv2d",
        "_triton_linear",
        "_triton_tiles",
        "fused",
    }
    shared = {"_computed", "_random_state", "_decompose", "_linalg", "_matricise", "_checks"}
    bridge = {"rank_tail"}  # penalises what a plan will cut: it stands on both halves, and nothing stands on it
    assert graph.keys() == penalty_half | compression_half | shared | bridge | WATCHING | {"_table", "__init__"}
    for name in penalty_half:
        assert reachable(graph, name) <= penalty_half | shared
    for name in compression_half:
        assert reachable(graph, name) <= compression_half | shared | {"_table"}
    assert not any(bridge & names for module, names in graph.items() if module != "__init__")


def test_penalties_are_frozen_and_hold_no_tensor():
    penalty = torchsmooth.NuclearNorm(1e-3)
    assert not any(isinstance(value, torch.Tensor) for value in vars(penalty).values())
    assert isinstance(penalty, penalties.Penalty)


def test_the_built_wheel_imports_and_compresses(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "torchsmooth/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("torchsmooth/", "torchsmooth-")) for name in names)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)  # noqa: S603
    script = f"""
import sys
sys.path.insert(0, {str(target)!r})
import torch, torchsmooth
assert torchsmooth.__file__.startswith({str(target)!r}), torchsmooth.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
report = torchsmooth.svd_compress_(model, 0.5)
assert report.ratio >= 0.5 and torchsmooth.__version__ == "0.1.0"
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
