"""What trains: one file a method, each of which says in a `METHOD` what it offers."""

import importlib

from ftjax.config import MethodConfig
from ftjax.methods.method import Method

# name in the configuration -> (file, the name of the record in it)
METHODS = {name: (name, "METHOD") for name in ("full", "lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning")}
METHODS |= {name: ("bottleneck", name.upper()) for name in ("seq_bn", "double_seq_bn", "par_bn")}


def method_named(name: str) -> Method:
    """What a method offers, by its name in the configuration."""
    file, record = METHODS[name]
    return getattr(importlib.import_module(f"ftjax.methods.{file}"), record)


def method_of(config: MethodConfig) -> Method:
    """What the method of a configuration offers."""
    return method_named(config.name)
