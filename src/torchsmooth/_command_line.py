"""The command line: ``python -m torchsmooth inspect FILE`` and ``python -m torchsmooth compress FILE OUT``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from ._destination import Destination
from ._inspection import inspect
from ._planner import Filter, Subject
from ._tensor_source import Checkpoint
from ._terms import checked_goal, checked_ratio, checked_terms
from .checkpoint_files import checked_device, compressed, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._terms import Allocation, Terms

_RATIOS = (0.3, 0.5, 0.7, 0.9)

_SUBJECT = Subject("checkpoint", Filter("--exclude", "Layers whose names match none of its patterns are compressed."))

_DONE, _FAILED, _STOPPED = 0, 1, 130  # argparse itself ends with 2 where it cannot read the arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line; None for those of this process.

    Returns:
        The exit status: 0 if it is done, 1 if it failed, 130 if it was stopped from the keyboard.

    Raises:
        SystemExit: with status 2, if the arguments cannot be read; with 0 after ``--help``.
    """
    asked = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tables have signs that not every encoding knows
            stream.reconfigure(errors="replace")
    try:
        result = asked.command(asked)
        print(json.dumps(result.to_dict()) if asked.json else result, flush=True)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        # What the library advises is written for its functions.
        advice = " ".join(str(error).split()).replace("with filter_fn", f"with {_SUBJECT.filter.name}")
        print(f"error: {advice}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here, if it was compress.", file=sys.stderr)
        return _STOPPED
    return _DONE


def _inspect(asked: argparse.Namespace) -> Any:
    terms = _terms(asked, "budget")
    ratios = [checked_ratio(one, "--ratios", "params") for one in asked.ratios]
    device = checked_device(asked.device)
    checkpoint, found = opened(asked.file, _filter(asked), subject=_SUBJECT)
    with torch.no_grad():
        return inspect(checkpoint, found, terms, ratios, device, _SUBJECT)


def _compress(asked: argparse.Namespace) -> Any:
    destination = Destination.of(asked.out, Checkpoint(asked.file))
    if destination.exists and not asked.force:
        raise ValueError(f"{asked.out!r} exists already: add --force to replace it.")
    terms = _terms(asked, asked.allocation)
    goal = checked_goal(asked.ratio, asked.max_error, "params")
    device = checked_device(asked.device)
    return compressed(asked.file, asked.out, goal, terms, device, filter_fn=_filter(asked), subject=_SUBJECT)


def _terms(asked: argparse.Namespace, allocation: Allocation) -> Terms:
    return checked_terms(
        scheme=asked.scheme or "auto",
        form=asked.form,
        allocation=allocation,
        target="params",
        rank_multiple=asked.rank_multiple,
        progress=asked.progress,
    )


def _filter(asked: argparse.Namespace) -> Callable[[tuple[int, ...], str], bool] | None:
    """Leave out layers whose names match a pattern; a pattern that matches none is a mistake."""
    patterns = asked.exclude
    if not patterns:
        return None
    names = [layer.name for layer in opened(asked.file, None)[1].layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"--exclude {pattern!r} matches none of the {len(names)} layers, such as {names[0]!r}."
                if names
                else f"--exclude {pattern!r} matches nothing: the file has no layers."
            )
    return lambda _, name: not any(fnmatchcase(name, pattern) for pattern in patterns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchsmooth", description="Compress checkpoint files without building the model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    look = commands.add_parser(
        "inspect",
        help="list layers, shapes and effective ranks, and what each ratio would cost",
        description="List the layers of a checkpoint, and what each ratio would cost in relative error.",
    )
    look.set_defaults(command=_inspect)
    _add_shared(look)
    look.add_argument("--ratios", type=float, nargs="+", default=_RATIOS, metavar="R", help="fractions to remove")
    make = commands.add_parser(
        "compress",
        help="write a smaller checkpoint, which load_compressed_ reads",
        description="Write a smaller checkpoint, which torchsmooth.load_compressed_ reads. A run that was stopped goes "
        "on where it was when the same command is given again.",
    )
    make.set_defaults(command=_compress)
    _add_shared(make)
    make.add_argument("out", help="a file of the same kind; with an index, a folder")
    goal = make.add_mutually_exclusive_group(required=True)
    goal.add_argument("--ratio", type=float, metavar="R", help="fraction of all parameters to remove: 0.5 leaves half")
    goal.add_argument("--max-error", type=float, metavar="E", help="the largest relative error of a layer instead")
    make.add_argument("--allocation", default="budget", help="budget (the default) or uniform")
    make.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="a .safetensors file, an index of several, a folder with one of these, or what torch.save wrote"
    )
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="S",
        help="auto (the default), channel, input, spatial or tucker; repeatable",
    )
    parser.add_argument("--form", default="auto", help="auto (the default), factored or pivoted")
    parser.add_argument("--rank-multiple", type=int, default=1, metavar="N", help="only ranks that are multiples of N")
    parser.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="leave layers dense by name, such as 'head.*'; repeatable"
    )
    parser.add_argument("--device", default="cpu", help="where weights are decomposed, such as cuda")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--quiet", dest="progress", action="store_const", const=False, default=None, help="show no progress"
    )
