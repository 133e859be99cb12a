"""Build wheel and sdist, look into them, and test the wheel where nothing else is: `make release-check`.

1. Both archives are built into `dist/`.
2. Every file in them must be one that belongs there, and one that git knows where there is a repository; nothing may be
   missing.
3. The wheel is installed in an empty virtual environment, with the versions of `constraints.txt`: torch and what torch
   needs, nothing more. The library has to work there.
4. What the tests need is installed beside it, and the fast tests of the unpacked sdist run against the installed wheel.

`--only` chooses test files instead of all of them; `--slow` runs the slow tests as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1 << 20  # bytes of a file in the sdist; pictures stay well below
IN_WHEEL = re.compile(r"torchsmooth/(\w+\.py|py\.typed)|torchsmooth-[^/]+\.dist-info/[\w./]+")
IN_SDIST = re.compile(
    r"(src/torchsmooth|tests|testbed|tools|examples|benchmarks)/([\w-]+/)*[\w-]+\.py|src/torchsmooth/py\.typed"
    r"|docs/[\w-]+\.md|docs/site\.css|docs/images/[\w-]+\.(png|md)|benchmarks/results/[\w-]+\.(png|md)"
    r"|(tests|testbed)/([\w-]+/)*[\w-]+\.txt"
    r"|README\.md|CHANGELOG\.md|CONTRIBUTING\.md|LICENSE|Makefile|constraints\.txt|pyproject\.toml|zensical\.toml"
    r"|PKG-INFO|\.gitignore|\.ci/run"
)
# What is made when the archive is.
MADE = {"PKG-INFO"}
WORKS = """
import torch, torchsmooth
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Conv1d(64, 64, 1))
report = torchsmooth.svd_compress_(torchsmooth.smooth_(model, torchsmooth.NuclearNorm()), 0.5)
assert report.ratio >= 0.5
print(torchsmooth.__version__, torchsmooth.__file__)
"""


def surplus(names: Collection[str], allowed: re.Pattern[str]) -> list[str]:
    """Return the names that do not belong."""
    return sorted(name for name in names if not allowed.fullmatch(name))


def names_in_wheel(path: Path) -> dict[str, int]:
    """Return the files of a wheel and their sizes."""
    return {one.filename: one.file_size for one in zipfile.ZipFile(path).infolist() if not one.is_dir()}


def names_in_sdist(path: Path) -> dict[str, int]:
    """Return the files of an sdist, without the folder that all of them are in, and their sizes."""
    with tarfile.open(path) as archive:
        return {str(PurePosixPath(*PurePosixPath(one.name).parts[1:])): one.size for one in archive if one.isfile()}


def tracked() -> set[str] | None:
    """Return the files that git knows; None where this is no repository."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    return set(done.stdout.split("\0")) - {""} if done.returncode == 0 else None


def problems_of(wheel: dict[str, int], sdist: dict[str, int], known: set[str] | None) -> list[str]:
    """Say what is wrong with the files of the two archives."""
    found = [f"the wheel holds {name}, which does not belong there" for name in surplus(wheel, IN_WHEEL)]
    found += [f"the sdist holds {name}, which does not belong there" for name in surplus(sdist, IN_SDIST)]
    found += [f"the sdist holds {name}, of {size:,} bytes" for name, size in sdist.items() if size > LARGEST]
    if known is None:
        return found
    found += [f"the sdist holds {name}, which git does not know" for name in sorted(sdist.keys() - known - MADE)]
    sources = {name for name in known if name.startswith("src/torchsmooth/")}
    found += [f"the sdist lacks {name}" for name in sorted(known - sdist.keys())]
    found += [f"the wheel lacks {name}" for name in sorted(sources) if name.removeprefix("src/") not in wheel]
    return found


def build(folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist; return their paths."""
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def run(command: Sequence[str], cwd: Path = ROOT) -> None:
    """Run a command; stop where it fails."""
    print("$", *command, flush=True)
    # Nothing of this checkout may be found by way of the environment.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    subprocess.run(command, cwd=cwd, env=environment, check=True)  # noqa: S603


def test_in_empty_environment(wheel: Path, sdist: Path, options: argparse.Namespace) -> None:
    """Install the wheel where nothing else is, and test it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run([sys.executable, "-m", "venv", str(place / "venv")])
        python = str(place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
        run([python, "-m", "pip", "install", "--quiet", str(wheel)])
        # torch says of itself that it found no numpy.
        numpy = "ignore:Failed to initialize NumPy:UserWarning"
        run([python, "-I", "-W", "error", "-W", numpy, "-c", WORKS], cwd=place)
        run([python, "-m", "pip", "install", "--quiet", f"{wheel}[dev]"])
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        (unpacked,) = (one for one in place.iterdir() if one.name.startswith("torchsmooth-"))
        # The installed library, not the sources beside the tests.
        installed = "import sys, torchsmooth; assert torchsmooth.__file__.startswith(sys.prefix), torchsmooth.__file__"
        run([python, "-c", installed], cwd=unpacked)
        chosen = [] if options.slow else ["-m", "not slow"]
        run(
            [python, "-m", "pytest", "-q", "-n", options.processes, *chosen, *(options.only or ["tests"])], cwd=unpacked
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, look, install, test; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", help="test files to run, instead of all")
    parser.add_argument("--slow", action="store_true", help="run the slow tests, too")
    parser.add_argument("--processes", default="auto", help="test processes side by side")
    parser.add_argument("--no-tests", action="store_true", help="only build and look")
    options = parser.parse_args(arguments)
    wheel, sdist = build(ROOT / "dist")
    problems = problems_of(names_in_wheel(wheel), names_in_sdist(sdist), tracked())
    print(*problems, sep="\n")
    if problems:
        return 1
    if not options.no_tests:
        try:
            test_in_empty_environment(wheel, sdist, options)
        except subprocess.CalledProcessError as error:
            print(f"not to be released: this failed: {' '.join(error.cmd)}", file=sys.stderr)
            return 1
    print(f"{wheel.name} and {sdist.name} can be released: they are in dist/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
