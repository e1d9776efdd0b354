"""Bridges to other libraries, each loaded only when that library is.

`register_on_import` makes diffusers know orbitdit without importing it: what concerns a module of diffusers is done now
if that module is loaded already, else right after it is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AFTER = {
    "diffusers.quantizers.auto": "orbitdit.integrations.diffusers",  # enters orbitdit in the table of quantizers
    "diffusers.models.modeling_utils": "orbitdit.integrations.saving",  # extends save_pretrained
    "diffusers.loaders.single_file_model": "orbitdit.integrations.single_file",  # extends from_single_file
}
"""Modules of diffusers, and which of ours registers itself there when it is imported."""


def register_on_import() -> None:
    """Register with diffusers, now or when its modules are first imported. Idempotent."""
    waiting = {finder.module for finder in sys.meta_path if isinstance(finder, _AfterImport)}
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        elif theirs not in waiting:
            sys.meta_path.insert(0, _AfterImport(theirs))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module of diffusers as Python would, and imports ours once it has run."""

    def __init__(self, module: str):
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_AFTER[self.module])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
