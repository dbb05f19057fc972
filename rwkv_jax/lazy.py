"""Packages that import their public names when these are first used, so that importing a package loads little."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; what they import stands there under TYPE_CHECKING, too.

    Args:
      package: its `__name__`.
      modules: the names that each of its modules has, by the module's name within the package.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def import_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return import_name, lambda: sorted({*vars(sys.modules[package]), *module_of})
