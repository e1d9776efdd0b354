"""Bridges to other libraries, each loaded only when that library is.

`register_on_import` makes diffusers know orbitdit without importing it: if diffusers' table of quantizers is
loaded already, orbitdit is entered now, else right after the table is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "diffusers.quantizers.auto"


def register_on_import() -> None:
    """Enter orbitdit in diffusers' table of quantizers, now or when diffusers is first imported. Idempotent."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    importlib.import_module("orbitdit.integrations.diffusers")  # registers itself when it has run


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds `diffusers.quantizers.auto` as Python would, and registers orbitdit once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
