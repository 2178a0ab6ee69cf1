"""Packages that only some exports and engines need: each is an extra of pyproject.toml."""

import importlib
from types import ModuleType

from stages.files.artifacts import Refusal


def extra(name: str, *modules: str) -> list[ModuleType]:
    """The modules of this extra; where one cannot be imported, one line says how to install it."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise Refusal(
            f"{error.name or modules[0]} is not installed: .venv/bin/pip install -c constraints.txt -e '.[{name}]'"
        ) from None
