"""Fronts of packages: names that are imported from their modules when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package needs to offer names of its modules without importing these modules first.

        if TYPE_CHECKING:
            from .command import bench as bench
        else:
            __getattr__, __dir__, __all__ = lazy(__name__, {"command": ["bench"]})

    Type checkers read the imports, and Python reads the table. So whoever wants a light name of a package does not load
    what its heavy names need, such as torch.

    Args:
        package: the package's `__name__`.
        modules: a module's name in the package -> the names that it gives.

    Returns:
        The package's `__getattr__`, `__dir__` and `__all__`.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        # Kept in the package, so that the next access is an ordinary one.
        setattr(sys.modules[package], name, value)
        return value

    return load, shown_names(package), sorted(homes)


def shown_names(package: str) -> Callable[[], list[str]]:
    """The `__dir__` of a package: its `__all__` and Python's own names, without modules and what they import."""

    def names_of_package() -> list[str]:
        module = sys.modules[package]
        return sorted({*module.__all__, *(name for name in vars(module) if name.startswith("__"))})

    return names_of_package
