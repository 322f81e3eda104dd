"""A folder appears whole or not at all, with the permissions of ordinary files. Knows nothing else here."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # of file managers


@contextmanager
def whole_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it becomes `folder`, if nothing failed.

    Folders and files get the modes that `mkdir` and `open` would give them here (umask, default ACL): safetensors
    writes its files for the owner alone, and a server under another user could not read them.

    Args:
        folder: where the result belongs; its parents are made. A link stays one: what it points to is written.
        replace: whether a folder that is there already goes, if it holds files of the new one's names alone
            (`check_own`, which says so earlier). It stays as it is if the block fails.

    Raises:
        FileExistsError: `folder` exists and `replace` is false; at the start, or another process was first. At the
            end: it holds something else.
    """
    folder = Path(folder).resolve()
    if replace:
        _check_parents(folder)
    else:
        check_new(folder)
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
            check_own(folder, os.listdir(written))
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


def check_new(folder: str | Path) -> None:
    """Refuse a folder that cannot be made: before work whose result is to go there.

    Raises:
        FileExistsError: it exists, or a file is where one of its parents is to be.
        PermissionError: as `check_writable`.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it or write to another folder.")
    _check_parents(folder)


def _check_parents(folder: Path) -> None:
    there = next(parent for parent in folder.parents if parent.exists())
    if not there.is_dir():
        raise FileExistsError(f"{there} is a file, so that no folder can be written in it: give another one.")
    check_writable(there)


def check_writable(folder: str | Path) -> None:
    """Refuse a folder in which nothing can be made: before work whose result is to go there.

    Raises:
        PermissionError: it is not this user's to write to, or is mounted read-only.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: give another folder, or change its permissions.")


def check_own(folder: str | Path, names: Collection[str]) -> None:
    """Refuse a folder that is to be replaced as a whole and holds anything but files of these names.

    Raises:
        FileExistsError: naming the first such entry, or a file where a folder is to be.
    """
    folder = Path(folder).resolve()
    _check_parents(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, where a folder is to be: give another one.")
    entries = sorted(folder.iterdir()) if folder.exists() else []
    for entry in entries:
        if entry.name not in LITTER and not (entry.name in names and entry.is_file()):
            raise FileExistsError(
                f"{folder} holds {entry.name!r}, which would be deleted, as the folder is replaced as a whole: give a "
                f"folder of its own, or one that has nothing but {', '.join(sorted(names))}."
            )


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block it takes `path`'s place in one step, with the mode
    that `open` gives. Nothing changes if the block fails."""
    path = Path(path)
    path = path.parent.resolve() / path.name  # a link in its place goes, and what it points to stays: the Hub's cache
    written = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    written.touch()
    mode = written.stat().st_mode & 0o777
    try:
        yield written
        written.chmod(mode)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
