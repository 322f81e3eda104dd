"""The arguments that programs share, and the folder of a run."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import peft_mora_command as command

from .base_model import EMBEDDED


# Types of arguments.
number, count, several = command.number, command.count, command.several
finite, rate, bound, share, below_one = command.finite, command.rate, command.bound, command.share, command.below_one
merged_rank = command.merged_rank


def device(text: str) -> str:
    """As the type of an argument."""
    try:
        command.check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--device ")) from error
    return text


def folder(text: str) -> str:
    """Where results go, there or to be made; as the type of an argument."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, and results go into a folder")
    return text


def fields(text: str) -> dict[str, Any]:
    """Of a JSON object; as the type of an argument."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object: write {{"NAME": VALUE}}')
    return found


ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "NAME_OR_DIR", "help": "base (%(default)s: SmolLM2-135M from PyPI)"},
    "device": {"type": device, "help": "cpu, cuda, cuda:1, … (%(default)s)"},
    "data": {"metavar": "DIR", "help": "a task is DIR/TASK/{train,test}.jsonl where that is, else an embedded one"},
    "r": {"type": count, "help": "rank; MORA: experts a task; LORI and FLYLORA: see shared/training.py (%(default)s)"},
    "steps": {"type": count, "help": "optimizer steps of each training (%(default)s)"},
    "batch_size": {"type": count, "help": "samples a step (%(default)s)"},
    "lr": {"type": rate, "help": "peak learning rate (%(default)s)"},
    "limit": {"type": count, "help": "test samples to score (all)"},
    "seed": {"type": number, "help": "of the adapter, the order, an embedded task's records (%(default)s)"},
    "output": {"type": folder, "metavar": "DIR", "help": "where it all goes (%(default)s)"},
}


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """With --model, --device (a GPU where there is one), and those of ARGUMENTS that have a default here.

    model=None: the base is the one that an adapter names. device=None: the program has none.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = {"model": EMBEDDED, "device": "cuda" if torch.cuda.is_available() else "cpu", **defaults}
    for name, default in here.items():
        if (name, default) == ("device", None):
            continue
        own = {"help": "base (the one that the adapter names)"} if (name, default) == ("model", None) else {}
        made.add_argument("--" + name.replace("_", "-"), default=default, **{**ARGUMENTS[name], **own})
    return made


def add_records(parser: argparse.ArgumentParser) -> None:
    """What has to be as it was in training, where an adapter of any run is asked a task's records."""
    parser.add_argument(
        "--passage_words", type=number, default=0, metavar="N",
        help="cut passages of --data tasks to N words, as demo.py trains (48); 0: not at all, as sft.py (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=number,
        default=0,
        help="of the run that an embedded task was learnt in: its records (%(default)s)",
    )


def names(text: str) -> list[str]:
    """Of "a, b": ["a", "b"]; as the type of an argument."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing: write A, or A,B")
    for name in found:
        if found.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is there twice")
    return found


def wait(device: str) -> None:
    """Until the device has done all that it was given: time is measured then."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def claim(output: Path, args: argparse.Namespace, *free: str, **content: str) -> None:
    """Make the folder of a run that goes on where it was stopped, or refuse one that was begun with other arguments:
    what it holds would be taken for what these give. Those in `free` may differ; `content` says what is behind a name
    (`digest`, `files`), and a name that the run did not have joins it, as does a switch that is off.
    """
    output.mkdir(parents=True, exist_ok=True)
    given = {key: value for key, value in vars(args).items() if key not in free}
    there = check_program(output) or given
    content["program"] = program()
    differs = {
        key: (there.get(key), value)
        for key, value in given.items()
        if there.get(key) != value and not (value is False and key not in there)
    }
    differs |= {key: (there[key], value) for key, value in content.items() if there.get(key, value) != value}
    if differs:
        raise SystemExit(f"{output} is a run with other arguments (there, here): {differs}; give another --output")
    write_json(output / "run.json", there | given | content)


def check_program(output: Path) -> dict[str, Any]:
    """What a run's `run.json` says, {} where there is none; refuse another program's, which could not go on then."""
    path = output / "run.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(there, dict):
            raise ValueError(f"a {type(there).__name__}")
    except ValueError as error:  # JSON's and Unicode's are
        raise SystemExit(f"{path} is damaged ({error}): delete the run, or give another --output") from error
    if there.get("program", program()) != program():
        raise SystemExit(f"{output} is a run of {there['program']}, not of {program()}; give another --output")
    return there


def program() -> str:
    return Path(sys.argv[0]).name


def resident_mib() -> float:
    """The most memory that this process has had, in MiB. On Linux `ru_maxrss` is its parent's too."""
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        return int(text.split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def digest(what: Any) -> str:
    """12 hex digits of records, or of what is in a file (a Path)."""
    data = what.read_bytes() if isinstance(what, Path) else json.dumps(what).encode()
    return sha256(data).hexdigest()[:12]


def files(args: argparse.Namespace, *names: str) -> dict[str, str]:
    """What is in the files that arguments name, as `content` of `claim`."""
    paths = {name: Path(getattr(args, name) or "") for name in names}
    return {f"{name} content": digest(path) for name, path in paths.items() if path.is_file()}


def write_json(path: Path, value: Any) -> None:
    """In one step, so that a run that is killed here leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row a dict, under the keys of the first; in one step, as `write_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_csv` wrote; none where it is not there."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


class Rows:
    """A CSV file of a run's results: a row is there once it is complete, and is not made again.

    Args:
        path: of the file.
        key: columns that say which row it is.
        shown: columns with numbers, which are printed as a row comes.
        others: further columns.
        reuse: whether rows of a file that is there count.
    """

    def __init__(
        self, path: Path, key: Sequence[str], shown: Sequence[str], others: Sequence[str] = (), reuse: bool = True
    ) -> None:
        self.path, self.key, self.shown = path, key, shown
        self.columns, self.rows = [*key, *shown, *others], read_csv(path) if reuse else []
        if self.rows and list(self.rows[0]) != self.columns:
            raise SystemExit(f"{path} has other columns than a run with these tasks: give another --output")

    def find(self, key: Mapping[str, Any], columns: Iterable[str] = ()) -> dict[str, Any] | None:
        """The row of a key, if it has something in all of these columns."""
        row = next((row for row in self.rows if all(row[n] == str(key.get(n, "")) for n in self.key)), None)
        return row if row is not None and all(row[name] for name in columns) else None

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """A row, at the end; what was there of its key goes."""
        row = {name: str({**key, **values}.get(name, "")) for name in self.columns}
        before = self.find(key)
        self.rows[:] = [*(other for other in self.rows if other is not before), row]
        write_csv(self.path, self.rows)
        print("  ".join(row[name] for name in self.key if row[name]), "->", *(
            f"{name} {float(row[name]):.3f}" for name in self.shown if row[name]
        ), flush=True)  # fmt: skip
