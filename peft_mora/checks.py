"""Refuse a value by name. Knows nothing of anything else here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def check_field(ok: bool, name: str, value: Any, rule: str) -> None:
    """Refuse a config value.

    Raises:
        ValueError: `ok` is false; the message names the field, the value and the rule it breaks.
    """
    if not ok:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def as_float(value: Any) -> float:
    """The number that a value is, numpy's and torch's too; NaN where it is none."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


def is_indices(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(is_int(index) and index >= 0 for index in value)


def task_names(value: Any) -> Any:
    """The field `tasks`: a list of names, each once; a tuple becomes one.

    Raises:
        ValueError: it is something else.
    """
    tasks = list(value) if isinstance(value, tuple) else value
    ok = isinstance(tasks, list) and bool(tasks) and is_names(tasks) and all(tasks)
    check_field(ok, "tasks", tasks, "a list of at least one name")
    check_field(len(set(tasks)) == len(tasks), "tasks", tasks, "a list without repeats")
    return tasks


def listed(names: Iterable[str], last: str = "or") -> str:
    """For a sentence: "a", "a or b", "a, b or c"."""
    *most, end = names
    return f"{', '.join(most)} {last} {end}" if most else end
