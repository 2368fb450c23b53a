"""Has PyTorch, and so vLLM, take this CPU for one with AVX2 alone.

Python imports this file when it starts with its folder on PYTHONPATH; ``make test
CPU=avx2`` does that, and limits the libraries that multiply as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

BEYOND_AVX2 = ("avx512", "amx", "avx10")


class _Limiting(Loader):
    """Loads ``torch.cpu`` and takes out of it what AVX2 alone does not have."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        everything = module.get_capabilities

        def get_capabilities() -> Mapping[str, Any]:
            return {
                name: False if name.startswith(BEYOND_AVX2) else able
                for name, able in everything().items()
            }

        module.get_capabilities = get_capabilities  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Limiting(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
