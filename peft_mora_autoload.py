"""Lets PEFT open the adapters of peft_mora in programs that never import it.

PyTorch calls `install` at `import torch` (entry-point group `torch.backends`). It loads nothing heavy: it only waits
for `peft.tuners` to be really imported and imports `peft_mora` right after. PEFT_MORA_AUTOLOAD=0 turns it off.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys


WAIT_FOR = "peft.tuners"  # once this has run, PEFT's registration and base classes are there


def install() -> None:
    """Import peft_mora as soon as PEFT's tuners are there: now, or when they are imported. Never raises."""
    if os.environ.get("PEFT_MORA_AUTOLOAD", "1").lower() in ("0", "false", "off", "no"):
        return
    if WAIT_FOR in sys.modules:
        _import_peft_mora()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_peft_mora() -> None:
    try:
        # Not `import_module`: it reports a deadlock where another thread imports peft_mora and waits for this PEFT.
        import peft_mora  # noqa: F401
    except Exception as error:
        import warnings

        said = (
            f"peft_mora could not load, so PEFT does not know its adapters here: {error} "
            "(PEFT_MORA_AUTOLOAD=0 turns this off.)"
        )
        try:
            warnings.warn(said, stacklevel=2)
        except Warning:  # where warnings are errors: PEFT's own import is to go on
            print(said, file=sys.stderr)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `peft.tuners` as Python would, with a loader that imports peft_mora after it has run.

    It stays in place: transformers, accelerate and trl look for PEFT's spec without importing it, which must change
    nothing, and a PEFT that is imported a second time is a new PEFT.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != WAIT_FOR:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The real loader, with one step added at the end."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        _import_peft_mora()

    def __getattr__(self, name):  # get_source, is_package, resources: as without us
        return getattr(self.loader, name)
