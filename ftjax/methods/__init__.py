"""What trains: one file a method, each of which says in a `METHOD` what it offers."""

import importlib

from ftjax.config import MethodConfig
from ftjax.methods.method import Method

# name in the configuration -> file
METHODS = {
    name: name
    for name in (
        "full",
        "lora",
        "ia3",
        "prefix_tuning",
        "prompt_tuning",
        "p_tuning",
        "seq_bn",
        "double_seq_bn",
        "par_bn",
    )
}


def method_named(name: str) -> Method:
    return importlib.import_module(f"ftjax.methods.{METHODS[name]}").METHOD


def method_of(config: MethodConfig) -> Method:
    """What the method of a configuration offers."""
    return method_named(config.name)
