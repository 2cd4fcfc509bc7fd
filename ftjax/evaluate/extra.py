"""Import of packages of the `eval` extra, which may not be installed."""

import importlib
from types import ModuleType

from ftjax.errors import UserError


def need(module: str, what: str) -> ModuleType:
    """Import a module that `what` needs. Raises UserError, with how to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed ({error}); pip install 'ftjax[eval]'"
        ) from None
