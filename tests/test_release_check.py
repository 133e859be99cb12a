"""What `make release-check` looks for in the archives; that it builds and installs them is seen where it is run."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import tarfile
import zipfile

import pytest

from tests.pages import ROOT


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHEEL = {"torchsmooth/__init__.py": 10, "torchsmooth/py.typed": 0, "torchsmooth-1.0.dist-info/METADATA": 10}
SDIST = {"src/torchsmooth/__init__.py": 10, "src/torchsmooth/py.typed": 0, "README.md": 10, "PKG-INFO": 10}
KNOWN = {"src/torchsmooth/__init__.py", "src/torchsmooth/py.typed", "README.md"}


def test_what_belongs_is_not_complained_of(check):
    assert check.problems_of(WHEEL, SDIST, KNOWN) == []
    assert check.problems_of(WHEEL, SDIST, None) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchsmooth/weights.pt", "does not belong"),
        ("tests/test_a.py", "does not belong"),
        ("torchsmooth/__pycache__/a.cpython-311.pyc", "does not belong"),
        ("torchsmooth/.env", "does not belong"),
    ],
)
def test_what_does_not_belong_in_a_wheel(check, name, words):
    (problem,) = check.problems_of(WHEEL | {name: 1}, SDIST, KNOWN)
    assert name in problem
    assert words in problem


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("demo/digits.png", 1, "does not belong"),
        ("data/images.npz", 1, "does not belong"),
        ("tests/.coverage", 1, "does not belong"),
        ("docs/images/large.png", 1 << 21, "2,097,152 bytes"),
        ("docs/secret.md", 1, "git does not know"),
    ],
)
def test_what_does_not_belong_in_an_sdist(check, name, size, words):
    known = KNOWN | ({name} if "git" not in words else set())
    (problem,) = check.problems_of(WHEEL, SDIST | {name: size}, known)
    assert name in problem
    assert words in problem


def test_what_is_missing(check):
    less = {name: size for name, size in WHEEL.items() if name != "torchsmooth/py.typed"}
    assert check.problems_of(less, SDIST, KNOWN) == ["the wheel lacks src/torchsmooth/py.typed"]
    assert check.problems_of(WHEEL, SDIST, KNOWN | {"CHANGELOG.md"}) == ["the sdist lacks CHANGELOG.md"]


def test_archives_are_read(check, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("torchsmooth/__init__.py", "x = 1\n")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("torchsmooth-1.0/docs/index.md")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"# A"))
    assert check.names_in_wheel(tmp_path / "a.whl") == {"torchsmooth/__init__.py": 6}
    assert check.names_in_sdist(tmp_path / "a.tar.gz") == {"docs/index.md": 3}


def test_every_file_of_the_repository_belongs_in_the_sdist(check):
    known = check.tracked()
    if not known:
        pytest.skip("not a git repository: an unpacked sdist")
    assert check.surplus(known, check.IN_SDIST) == []


def test_a_command_that_fails_stops_it(check):
    with pytest.raises(subprocess.CalledProcessError):
        check.run(["false"])
