"""A folder appears whole or not at all, with the permissions of ordinary files. Knows nothing else here."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it becomes `folder`, if nothing failed.

    Folders and files get the modes that `mkdir` and `open` would give them here (umask, default ACL): safetensors
    writes its files for the owner alone, and a server under another user could not read them.

    Args:
        folder: where the result belongs; its parents are made. A link stays one: what it points to is written.
        replace: whether a folder that is there already goes, all of it. It stays as it is if the block fails.

    Raises:
        FileExistsError: `folder` exists and `replace` is false; at the start, or another process was first.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} exists: delete it or write to another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    written, old = (folder.with_name(f".{folder.name}-{unique}{end}") for end in ("", "-old"))
    written.mkdir()
    file_mode = written.stat().st_mode & 0o666
    try:
        yield written
        for path in written.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(file_mode)
        if folder.exists():
            if not replace:
                raise FileExistsError(f"{folder} exists: another process wrote it meanwhile.")
            folder.rename(old)
        try:
            written.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block it takes `path`'s place in one step, with the mode
    that `open` gives. Nothing changes if the block fails."""
    path = Path(path).resolve()
    written = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    written.touch()
    mode = written.stat().st_mode & 0o777
    try:
        yield written
        written.chmod(mode)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
