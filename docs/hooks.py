"""What mkdocs makes besides the pages: their order, the reference of every public name, pages from the root folder.

A new page needs no entry anywhere: that of a method or a callback is found by the module of its name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ABOUT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
START = ["index.md", "demo.md", "second-task.md", "command.md", "programs.md", "sft.md"]
ADAPTERS = ["merging.md", "merging-measured.md", "serving.md", "routing.md"]
LEARNING = ["projection.md", "budget.md", "penalties.md"]
REFERENCE = {  # package -> what it is; its names, where they are not its __all__
    "peft_mora": ("The adapters, and what is done with them", ""),
    "trl_callbacks": ("Callbacks for trainers", ""),
    "peft_mora.merging": ("Several adapters into one", ""),
    "peft_mora.export": (
        "A plain LoRA of an adapter",
        "exact_lora fit_lora lora_errors Effect effect_error save_lora save_base save_with_base",
    ),
    "peft_mora.lora_file": ("Adapter folders without a model", "Lora LoraFile read_lora write_lora check_plain"),
    "peft_mora.info": ("What a folder holds", "adapter_info AdapterInfo"),
}


def pages() -> dict[str, list[str]]:
    """Section -> its pages. One that no list names is put by the module of its name, or under "More"."""
    there = sorted(path.name for path in DOCS.glob("*.md"))
    named = {*START, *ADAPTERS, *LEARNING, "methods.md"}
    rest = [name for name in there if name not in named]

    def of(package: str) -> list[str]:
        return [name for name in rest if (ROOT / package / f"{name[:-3].replace('-', '_')}.py").is_file()]

    methods, callbacks = of("peft_mora"), of("trl_callbacks")
    sections = {
        "Start": START,
        "Methods": ["methods.md", *methods],
        "Learning": [*LEARNING, *callbacks],
        "Using": ADAPTERS,
        "More": [name for name in rest if name not in (*methods, *callbacks)],
    }
    return {title: [name for name in names if name in there] for title, names in sections.items()}


def on_config(config: Any) -> Any:
    sys.path.insert(0, str(ROOT))
    sections: list[Any] = [{title: list(names)} for title, names in pages().items()]
    sections.append({"Reference": [f"reference/{name}.md" for name in REFERENCE]})
    sections.append({"About": [name.lower() for name in ABOUT]})
    config.nav = sections
    return config


def on_files(files: Any, config: Any) -> Any:
    for name in ABOUT:
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for name, (title, names) in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name, title, names.split())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link that shows a file's name shows the page's title."""

    def titled(match: re.Match[str]) -> str:
        path = DOCS / f"{match[1]}.md"
        if not path.is_file():
            return match[0]
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ").partition(":")[0]
        return f"[{title}]("

    return re.sub(r"\[(?:docs/)?([\w-]+)\.md\]\(", titled, markdown)


def reference(package: str, title: str, names: list[str]) -> str:
    """A page of the public names of a package: of a config its fields, else what the docstring says."""
    module = importlib.import_module(package)
    parts = [f"# {package}\n\n{title}.\n"]
    for name in names or module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        options = ["members: false"]
        if inspect.isclass(value) and name == "TaskRouter":
            own = [key for key, method in vars(value).items() if not key.startswith("_") and method.__doc__]
            options = [f"members: [{', '.join(own)}]"]
        lines = "\n".join(f"      {option}" for option in options)
        parts.append(f"::: {value.__module__}.{name}\n    options:\n{lines}\n")
        if dataclasses.is_dataclass(value) and name.endswith("Config"):
            parts.append(fields(value))
    return "\n".join(parts)


def fields(config: Any) -> str:
    """A table of a config's fields, PEFT's bookkeeping left out, with the help that the dataclass has for them."""
    from peft import PeftConfig

    pefts = {field.name for field in dataclasses.fields(PeftConfig)}
    rows = ["| field | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in pefts or "help" not in field.metadata:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = "" if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = re.sub(r"\s+", " ", field.metadata["help"]).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{default!r}` | {text} |")
    return "\n".join(rows) + "\n"
