"""Files that are written whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.checkpoints import names, save
from tests.networks import mlp
from torchsmooth._atomic_file import whole_file

FULL = """
import resource, sys, torchsmooth
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    torchsmooth.compress_checkpoint(sys.argv[1], sys.argv[2], 0.3, progress=False)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on the size of files here")
@pytest.mark.parametrize(
    ("suffix", "kind", "limit", "where"),
    [("pt", "pickle", 40_000, "files"), ("safetensors", "safetensors", 8_000, "factors")],
)
def test_a_full_disk_is_an_os_error_with_the_path(tmp_path, suffix, kind, limit, where):
    source = save(mlp(sizes=(64,) * 5).state_dict(), tmp_path, kind)
    target = tmp_path / f"small.{suffix}"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FULL, str(source), str(target), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    place = tmp_path / f".small.{suffix}.torchsmooth-partial" / where
    assert re.fullmatch(rf"\[Errno {errno.EFBIG}\] .+: '{re.escape(str(place))}/[\w.]+'\n", done.stdout)
    assert not target.exists()


@pytest.mark.parametrize("step", ["torchsmooth._atomic_file._Draft", "os.fsync", "pathlib.Path.replace"])
def test_an_error_of_the_system_names_the_file_and_no_draft(tmp_path, monkeypatch, step):
    target = tmp_path / "small.pt"
    target.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(step, full)
    message = rf"^\[Errno {errno.ENOSPC}\] .+: {re.escape(repr(str(target)))}$"
    with pytest.raises(OSError, match=message), whole_file(target) as file:
        torch.save({"a": torch.ones(3)}, file)
    monkeypatch.undo()
    assert target.read_bytes() == b"before"
    assert names(tmp_path) == ["small.pt"]


def test_an_error_of_whoever_writes_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="^of another file$"), whole_file(tmp_path / "small.pt"):
        raise OSError("of another file")
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe' is no regular file, and would be replaced by one"), whole_file(pipe):
        pass
    assert pipe.is_fifo()
