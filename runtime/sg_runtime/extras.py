"""Optional dependencies, imported where they are used."""

from importlib import import_module
from types import ModuleType

from sg_runtime.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of sg-export installs.

    Raises MissingExtraError with the pip command when the module, or a package it stands in, is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(f"{error.name} is not installed: pip install 'sg-export[{extra}]'") from None
