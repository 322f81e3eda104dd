"""Texts as they lie in files: lines of UTF-8, or one JSON value a line. Knows nothing else here."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


GZIP = b"\x1f\x8b"
UTF_8, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")  # what editors put before a text


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without the blanks around it) of a file, gzipped or not; empty lines are left out.

    Raises:
        ValueError: not UTF-8, or broken gzip; names file and line.
    """
    with open(path, "rb") as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        with gzip.open(file) if packed else file as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if text := _decoded(line, f"{path}:{number}", first=number == 1).strip():
                        yield number, text
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is gzip, and broken ({error}): copy it again.") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each line of a file, as `read_lines`.

    Raises:
        ValueError: as there; a line is no JSON, or has half a character (a surrogate alone), which no text can hold.
    """
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
            if "\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"{path}:{number}: {half} is half a character, which no text can hold.") from error
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise ValueError(f"{path}:{number}: no JSON ({error}): write one object a line.") from error
        yield number, value


def _decoded(line: bytes, place: str, first: bool) -> str:
    if first and line.startswith(UTF_16):
        raise ValueError(f"{place}: the text is UTF-16: save the file as UTF-8.")
    try:
        return (line.removeprefix(UTF_8) if first else line).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: the text is not UTF-8 (byte {line[error.start]:#x}): save the file as that."
        ) from error
