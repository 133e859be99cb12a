"""Starting the same Python module on several processes with torchrun, and what its checks have found.

A worker is a module with a list of checks, each a function that every rank calls, which ends in :func:`run_checks`::

    CHECKS = []

    @CHECKS.append
    def ranks_agree():
        assert len(set(everywhere(1))) == 1

    if __name__ == "__main__":
        run_checks(CHECKS)

Starting processes takes seconds, so a worker has many checks, and a test file starts it once and looks up one check in
each test::

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        return launch_once("tests.distributed.worker", tmp_path_factory)

    @pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
    def test_on_two_ranks(check, results):
        results.assert_passed(check)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parents[2]

# Seconds: for one collective, and for a whole worker, on a slow machine.
_COLLECTIVE, _WORKER = 60, 300


@dataclass
class Results:
    """What the checks of a worker have found on each rank, and all that it printed."""

    by_rank: list[dict[str, str]]
    output: str

    def assert_passed(self, check: str) -> None:
        found = [there.get(check, f"was not reached:\n{self.output[-4000:]}") for there in self.by_rank]
        failures = [f"{check} on rank {rank}: {failure}" for rank, failure in enumerate(found) if failure]
        assert not failures, "\n".join(failures)


def launch(module: str, folder: Path, processes: int = 2) -> Results:
    """Run a module with torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the processes share the machine
    try:
        done = subprocess.run(  # noqa: S603
            [*torchrun, "-m", module, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=_WORKER,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = f"{error.stdout!r}\nended after {_WORKER} s"
    by_rank = []
    for rank in range(processes):
        path = folder / f"rank{rank}.json"
        by_rank.append(json.loads(path.read_text()) if path.exists() else {})
    return Results(by_rank, output)


def launch_once(module: str, tmp_path_factory: pytest.TempPathFactory, processes: int = 2) -> Results:
    """Run a module with torchrun, once for all test processes of ``pytest -n``."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no torch.distributed, or no gloo")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which they share
    folder /= module
    kept = folder / "results.json"
    try:
        folder.mkdir()
    except FileExistsError:  # somebody else is at it
        end = time.monotonic() + _WORKER + 30
        while not kept.exists() and time.monotonic() < end:
            time.sleep(0.2)
        return Results(**json.loads(kept.read_text()))
    results = launch(module, folder, processes)
    written = folder / "written.json"
    written.write_text(json.dumps(vars(results)))
    written.rename(kept)
    return results


def run_checks(checks) -> None:
    """Call each check on this rank, and write down what it raises; the folder is the worker's only argument."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=_COLLECTIVE))
    torch.set_warn_always(True)
    found: dict[str, str] = {}
    path = Path(sys.argv[1]) / f"rank{dist.get_rank()}.json"
    for check in checks:
        start = time.monotonic()
        try:
            check()
            failure = ""
        except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
            failure = traceback.format_exc()
        print(f"{check.__name__}: {time.monotonic() - start:.2f} s, {'failed' if failure else 'passed'}")
        found[check.__name__] = failure
        path.write_text(json.dumps(found))
        # The ranks go on together: one that failed may be anywhere.
        dist.monitored_barrier(timeout=timedelta(seconds=_COLLECTIVE))
    with suppress(RuntimeError):
        dist.destroy_process_group()


def everywhere(value):
    """Return what every rank has, in order of rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
