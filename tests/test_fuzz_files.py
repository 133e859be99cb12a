"""Random state dicts in every kind of file: compressed, or refused by one of our errors, with no destination then."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchsmooth
from tests.checkpoints import KINDS, load, names, out, same, save
from tests.snapshots import Snapshot
from tests.strategies import fill_, randn, seeds
from torchsmooth import compress_checkpoint, load_compressed_

_HOME = str(Path(torchsmooth.__file__).parent)
_OWNERS = ("", "0.", "a.b.", "layers.0.", "down.", "weight.", "é ∂.", "emb.", "attn.out_proj.", "norm.", ".", "module.")
_ENDS = ("weight", "bias", "running_mean", "num_batches_tracked", "in_proj_weight", "down.weight", "up.weight",
         "merge.order", "weight_orig", "_extra_state", "", "inv_freq")  # fmt: skip
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64,
           torch.float8_e4m3fn)  # fmt: skip

_entries = st.tuples(
    st.sampled_from(_OWNERS),
    st.sampled_from(_ENDS[:2]) | st.sampled_from(_ENDS),
    st.lists(st.integers(4, 9), min_size=2, max_size=4) | st.lists(st.integers(0, 3), max_size=6),
    st.sampled_from(_DTYPES[:1]) | st.sampled_from(_DTYPES),
    st.sampled_from(["normal", "normal", "zero", "nan", "shared", "part", "transposed"]),
)


def state_of(entries: list[tuple[Any, ...]], seed: int) -> dict[str, Tensor]:
    """Make a state dict, some of its tensors over the memory of an earlier one."""
    state: dict[str, Tensor] = {}
    for number, (owner, end, shape, dtype, kind) in enumerate(entries):
        values = randn(1, *shape, seed=seed + number)[0].to(dtype)
        if kind == "zero":
            values = torch.zeros_like(values)
        elif kind == "nan" and values.numel() and dtype.is_floating_point:
            values.flatten()[0] = torch.nan
        elif kind == "transposed" and values.dim() > 1:
            values = values.transpose(0, 1)
        elif state and kind in ("shared", "part"):
            values = list(state.values())[number % len(state)]
            values = values[:1] if kind == "part" and values.dim() else values
        state[f"{owner}{end}"] = values
    return state


_states = st.builds(state_of, st.lists(_entries, min_size=1, max_size=5), seeds)
_options = st.fixed_dictionaries(
    {"ratio": st.sampled_from([0.01, 0.1, 0.3])},
    optional={"scheme": st.sampled_from(["channel", "tucker"]), "form": st.sampled_from(["factored", "pivoted"])},
)


def attempt(action: Any) -> Any:
    """Return a result, or the error if it is one of ours."""
    try:
        return action()
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = f"not one of our errors: {last}: {error}"
        result = error
    assert last.filename.startswith(_HOME), message
    return result


def check(state: dict[str, Tensor], kind: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = save(state, folder, kind)
        destination, there = out(folder, kind), names(folder)
        report = attempt(lambda: compress_checkpoint(source, destination, **options, progress=False))
        if isinstance(report, Exception):
            # What was decomposed is kept for the next attempt, with other options.
            assert set(names(folder)) - {f".{destination.name}.torchsmooth-partial"} == set(there)
        else:
            assert set(names(folder)) == {*there, destination.name}
            check_result(state, load(destination), report)
        model = fill_(nn.ModuleDict({"0": nn.Linear(4, 5), "down": nn.Linear(5, 4)}), 0)
        before = Snapshot(model)
        for path in (source, destination):
            if path.exists() and attempt(lambda path=path: load_compressed_(model, path)) is not model:
                assert not before.difference()


def check_result(state: dict[str, Tensor], small: dict[str, Tensor], report: Any) -> None:
    compressed = {one.name: one for one in report.compressed}
    assert compressed
    assert report.ratio > 0
    gone = {f"{name}.{end}" for name in compressed for end in ("weight", "bias")}
    kept = {key: value for key, value in state.items() if key not in gone}
    assert same(kept, {key: small[key] for key in kept})
    for name, one in compressed.items():
        factors = [small[key] for key in (f"{name}.{part}.weight" for part in ("up", "core", "down")) if key in small]
        assert sum(factor.numel() for factor in factors) == one.parameters_after < one.parameters_before
        assert all(factor.dtype == state[f"{name}.weight"].dtype for factor in factors)
        assert all(bool(factor.isfinite().all()) for factor in factors)


@settings(max_examples=25)
@given(_states, st.sampled_from(KINDS), _options)
def test_any_state_dict_is_compressed_or_refused(state, kind, options):
    check(state, kind, options)


@pytest.mark.slow
@settings(max_examples=1500)
@given(_states, st.sampled_from(KINDS), _options)
def test_any_state_dict_is_compressed_or_refused_many_times(state, kind, options):
    check(state, kind, options)
