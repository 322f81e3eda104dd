"""The part of an adapter's README.md that says how to load it.

PEFT writes the card first and the adapter's config last, into the same folder (or, for adapters not named "default", a
folder below it). So the config completes the card, and PEFT stays as it is.
"""

from __future__ import annotations

from pathlib import Path


HEADING = "## How to Get Started with the Model"  # PEFT's template has it, with a placeholder below
PLACEHOLDER = "[More Information Needed]"
INSTALL = "pip install peft-mora"


def complete_card(folder: Path, method: str, base_model: str | None) -> None:
    """Add what a reader needs to load the adapter to the card that PEFT wrote, once; no card, nothing to do.

    Args:
        folder: where the adapter's config is.
        method: name of the PeftType.
        base_model: name or path of the base model, None if it has none.
    """
    card = folder / "README.md"
    if not _is_peft_card(card):
        card = folder.parent / "README.md"  # PEFT's own only if its placeholder is still there
        if not _is_peft_card(card) or PLACEHOLDER not in card.read_text(encoding="utf-8"):
            return
    text = card.read_text(encoding="utf-8")
    if INSTALL in text:
        return
    where = "path/to/this/folder" if card.parent == folder else f"path/to/this/folder/{folder.name}"
    base = f"`base_model` is `{base_model}`" if base_model else "`base_model` is the model that it was trained on"
    usage = f"""This is a {method} adapter: `{INSTALL}`, then ({base})

```python
import peft_mora  # makes PEFT know {method}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{where}")
```"""
    before, heading, after = text.partition(f"{HEADING}\n")
    if heading and PLACEHOLDER in after.partition("\n#")[0]:
        text = before + heading + after.replace(PLACEHOLDER, usage, 1)
    else:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n{usage}\n"
    card.write_text(text, encoding="utf-8")


def _is_peft_card(file: Path) -> bool:
    return file.is_file() and "library_name: peft" in file.read_text(encoding="utf-8", errors="replace")
