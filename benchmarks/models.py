"""Does it work on real architectures? Each is compressed, run in both modes, loaded again and copied.

All models of torchvision, and tiny ones of ``transformers`` built from a configuration, with random weights: what
matters is not the accuracy but that everything works. Each outcome is a line of JSON in a folder as soon as it is
there, so the work can be interrupted between models and gone on with; ``--again`` examines also what has one.

    python benchmarks/models.py --output runs --write
    python benchmarks/models.py --output runs --only 'transformers/*' torchvision/resnet18
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from harness import make_parser, publish, read_arguments
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # testbed is not installed

from testbed.zoo import CHECKS, Outcome, entries, examine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.zoo import Entry

# Why a layer of a kind that is supported may stay dense in any plan; the table shows the other reasons.
_ORDINARY = ("worth its parameters", "no rank makes it smaller")


def read_lines(path: Path) -> dict[str, Outcome]:
    """Read the outcomes that are there; a line that was cut off by an interruption is left out."""
    found: dict[str, Outcome] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[outcome.name] = outcome
    return found


def examined(entry: Entry) -> Outcome:
    """Examine one model; that it cannot be built or fed here is an outcome too."""
    try:
        return examine(entry)
    except Exception as error:  # noqa: BLE001 - the rest of the zoo goes on
        problem = f"dense: {type(error).__name__}: {error}".splitlines()[0]
        return Outcome(entry.name, entry.family, entry.ratio, entry.note, problems={CHECKS[0]: problem})


def row(outcome: Outcome) -> list[str]:
    """Lay out one outcome."""
    unusual = [f"{count} × {why}" for why, count in outcome.dense.items() if not why.startswith(_ORDINARY)]
    remarks = [*([outcome.note] if outcome.note else []), *unusual]
    removed = f"{1 - outcome.after / outcome.before:.2%}" if outcome.after else "–"
    return [
        outcome.name,
        f"{outcome.before:,} → {outcome.after:,}",
        removed,
        f"{outcome.low_rank} / {sum(outcome.dense.values())}",
        *(mark(outcome.problems.get(name)) for name in CHECKS),
        "; ".join(remarks),
    ]


def mark(problem: str | None) -> str:
    """Show a check: not made, passed, or what was found."""
    return "–" if problem is None else "✗ " + problem.replace("|", "/") if problem else "✓"


def table(outcomes: Sequence[Outcome]) -> tuple[str, list[str], list[list[str]]]:
    """Lay out title, header and rows."""
    passed = Counter(one.family for one in outcomes if one.passed)
    whole = Counter(one.family for one in outcomes)
    counts = ", ".join(f"{family} {passed[family]} of {count}" for family, count in whole.items())
    title = f"Real architectures, compressed without data: {sum(passed.values())} of {len(outcomes)} pass ({counts})"
    header = ["model", "parameters", "removed", "layers low-rank / dense", *CHECKS, "remarks"]
    return title, header, [row(one) for one in outcomes]


def main() -> None:
    """Examine what is missing, and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the outcomes")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="such as 'torchvision/resnet*'")
    parser.add_argument("--again", action="store_true", help="examine also what has an outcome already")
    parser.set_defaults(device="cpu")
    arguments = read_arguments(parser)
    if arguments.device != "cpu":
        parser.error("the zoo is built and fed on the CPU")
    wanted = {name: entry for pattern in arguments.only for name, entry in entries(pattern).items()}
    path = arguments.output / "models.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {} if arguments.again else read_lines(path)
    warnings.simplefilter("ignore")  # of the models' own, such as the slow initialisation of GoogLeNet
    with path.open("a", encoding="utf-8") as file:
        for name in tqdm([name for name in wanted if name not in found], desc="models", disable=None):
            tqdm.write(name, file=sys.stderr)
            found[name] = examined(wanted[name])
            file.write(json.dumps(asdict(found[name])) + "\n")
            file.flush()
    title, header, rows = table([found[name] for name in wanted])
    publish("models", title, header, rows, arguments)


if __name__ == "__main__":
    main()
