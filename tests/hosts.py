"""What of peft, transformers and trl this project stands on, by name, and what another release has taken away.

python tests/hosts.py                                # the names, private ones marked, with their signatures
python tests/hosts.py --write tests/hosts.json       # keep them: for a release that the suite has passed with
python tests/hosts.py --against tests/hosts.json     # what has gone or changed here since; status 1 if anything has
make hosts WITH="peft==0.21.0"                       # the same over another release

Three kinds, read from our sources without importing them: names that are imported (also modules' attributes), methods
of a host's classes that ours override, and private attributes (`model._hf_hook`) that a host's sources know.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
HOSTS = ("peft", "transformers", "trl")
OURS = [p for part in ("peft_mora", "trl_callbacks", "recipes") for p in (ROOT / part).rglob("*.py") if p.is_file()]
OURS += sorted(ROOT.glob("peft_mora_*.py"))


def is_host(module: str | None) -> bool:
    return (module or "").partition(".")[0] in HOSTS


class Names(ast.NodeVisitor):
    """Of one file: imported names, classes with their bases and methods, private attributes."""

    def __init__(self) -> None:
        self.imported: dict[str, str] = {}  # name here -> where it is from
        self.used: set[str] = set()
        self.classes: dict[str, tuple[list[str], set[str]]] = {}
        self.private: set[str] = set()
        self.own: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_host(alias.name):
                self.imported[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else ""
                self.used.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and is_host(node.module):
            for alias in node.names:
                self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self.used.add(f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [ast.unparse(base) for base in node.bases]
        methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        self.classes[node.name] = bases, methods
        self.own.add(node.name)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.own.add(node.name)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        whole = ast.unparse(node)
        first, _, rest = whole.partition(".")
        if first in self.imported and re.fullmatch(r"[\w.]+", whole):
            self.used.add(f"{self.imported[first]}.{rest}" if self.imported[first] else whole)
        if re.fullmatch(r"_[a-z]\w*", node.attr):
            (self.own if isinstance(node.ctx, ast.Store) else self.private).add(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.own.add(node.id)


def read_ours() -> tuple[set[str], dict[str, set[str]], set[str]]:
    """Names that are used; host class -> methods of it that ours have; private attributes that are none of ours."""
    files = []
    for path in OURS:
        names = Names()
        names.visit(ast.parse(path.read_text("utf-8")))
        files.append(names)
    classes = {name: entry for names in files for name, entry in names.classes.items()}
    imported = {here: there for names in files for here, there in names.imported.items() if there}
    overridden: dict[str, set[str]] = {}

    def above(name: str) -> set[str]:
        if name in classes:
            return {host for base in classes[name][0] for host in above(base)}
        return {imported[name]} if name in imported else set()

    for name, (_, methods) in classes.items():
        for host in above(name):
            overridden.setdefault(host, set()).update(methods)
    private = {name for names in files for name in names.private} - {name for names in files for name in names.own}
    return {name for names in files for name in names.used}, overridden, private


def look_up(name: str) -> Any:
    """The object of a dotted name.

    Raises:
        ImportError, AttributeError: there is none.
    """
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def signature(thing: Any) -> str:
    """Parameters with plain defaults; of what is not called, its kind."""
    if not callable(thing):
        return "module" if inspect.ismodule(thing) else type(thing).__name__
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "class" if inspect.isclass(thing) else "callable"
    plain = (type(None), bool, int, float, str)
    shown = []
    for p in parameters:
        default = "" if p.default is p.empty else f"={p.default!r}" if isinstance(p.default, plain) else "=..."
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**", p.KEYWORD_ONLY: "kw "}.get(p.kind, "")
        shown.append(f"{star}{p.name}{default}")
    return f"({', '.join(shown)})"


def names_here() -> dict[str, str]:
    """Name -> signature, "gone" where this release has none."""
    used, overridden, _ = read_ours()
    names = {}
    for name in sorted(used):
        try:
            names[name] = signature(look_up(name))
        except (ImportError, AttributeError):
            names[name] = "gone"
    for host, methods in sorted(overridden.items()):
        try:
            cls = look_up(host)
        except (ImportError, AttributeError):
            continue  # it is "gone" above
        for method in sorted(methods):
            mine = [base for base in cls.__mro__ if method in vars(base) and is_host(base.__module__)]
            if mine:
                names[f"{host}.{method} (overridden)"] = signature(getattr(cls, method))
    return names


def attributes_here() -> dict[str, str]:
    """Private attributes that this release's sources have, those of single models left out."""
    known = "\n".join(
        path.read_text("utf-8", errors="ignore")
        for host in HOSTS
        for path in sorted(Path(find_spec(host).origin).parent.rglob("*.py"))
        if "models" not in path.parts
    )
    words = set(re.findall(r"\b_[a-z]\w*", known))
    return {f".{name} (attribute)": "known" for name in sorted(read_ours()[2]) if name in words}


def compare(kept: dict[str, str], here: dict[str, str]) -> list[str]:
    """A line for each name that is kept and still used, and has gone or has another signature here."""
    used, overridden, private = read_ours()
    still = used | {f"{host}.{name} (overridden)" for host, names in overridden.items() for name in names}
    still |= {f".{name} (attribute)" for name in private}
    lines = []
    for name, before in kept.items():
        now = here.get(name, "gone")
        if now != before and name in still:
            lines.append(f"{name}: gone" if now == "gone" else f"{name}:\n    was {before}\n    now {now}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the names")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with names that were kept")
    args = parser.parse_args()
    here, versions = names_here() | attributes_here(), {host: version(host) for host in HOSTS}
    if args.write:
        args.write.write_text(json.dumps({"versions": versions, "names": here}, indent=1) + "\n", "utf-8")
    elif args.against:
        kept = json.loads(args.against.read_text("utf-8"))
        lines = compare(kept["names"], here)
        print(
            "\n".join([*lines, f"{len(lines)} of {len(kept['names'])} names differ: {kept['versions']} -> {versions}"])
        )
        return bool(lines)
    else:
        for name, how in here.items():
            mark = "private" if re.search(r"(^|\.)_[a-z]", name) else ""
            print(f"{mark:8}{name} {how}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
