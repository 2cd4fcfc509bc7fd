"""Fine-tuning methods: one file per method, each with a `METHOD` record of what it offers."""

import importlib

from ftjax.config import MethodConfig
from ftjax.methods.method import Method

# name in the configuration -> (file, name of the record in it)
METHODS = {name: (name, "METHOD") for name in ("full", "lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning")}
METHODS |= {name: ("bottleneck", name.upper()) for name in ("seq_bn", "double_seq_bn", "par_bn")}


def method_named(name: str) -> Method:
    """Return the record of a method, by its name in the configuration."""
    file, record = METHODS[name]
    return getattr(importlib.import_module(f"ftjax.methods.{file}"), record)


def method_of(config: MethodConfig) -> Method:
    """Return the record of a configuration's method."""
    return method_named(config.name)
