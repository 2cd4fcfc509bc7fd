"""What trains: one file a method, each with `attach(root, config)`."""

import importlib
from types import ModuleType

from ftjax.config import MethodConfig

METHODS = {"full": "full", "lora": "lora"}


def method_module(config: MethodConfig) -> ModuleType:
    """The file that implements a method's configuration."""
    return importlib.import_module(f"ftjax.methods.{METHODS[config.name]}")
