"""Settings that every test runs under."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from testbed.cifar import shared_data

settings.register_profile(
    "torchsmooth",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("torchsmooth")

# Test processes side by side (pytest -n) share the cores among them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# Warnings are errors here; those that torch gives only once would fail just the first test that meets them.
torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def _untouched_random_state():
    """No test may lean on the global generator: it is put back after each."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def shared_data_folder():
    folder = shared_data()
    if not (folder / "resnet18_w16" / "plain.pt").exists() or not (folder / "cifar10_jpeg.npz").exists():
        pytest.skip(f"the trained networks and images are not there (looked in {folder})")
    return folder
