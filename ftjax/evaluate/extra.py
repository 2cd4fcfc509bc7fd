"""Packages of the `eval` extra, which not every installation has."""

import importlib
from types import ModuleType

from ftjax.errors import UserError


def need(module: str, what: str) -> ModuleType:
    """The module; UserError that says how to install it where it is missing. `what` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed ({error}); pip install 'ftjax[eval]'"
        ) from None
