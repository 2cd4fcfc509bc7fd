"""ftjax fine-tunes Hugging Face language models in JAX.

Everything here is imported on first use, so that `import ftjax` takes no time.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ftjax.errors import Interrupted, OutOfMemory, UserError
from ftjax.version import __version__

if TYPE_CHECKING:
    from ftjax.api.export import export
    from ftjax.api.look import plan, preview
    from ftjax.api.measure import check, evaluate
    from ftjax.api.model import Chat, Model, load
    from ftjax.api.run import Run, train
    from ftjax.tune.tune import tune

__all__ = [
    "Chat", "Interrupted", "Model", "OutOfMemory", "Run", "UserError", "__version__", "check", "evaluate", "export", "load",
    "plan", "preview", "train", "tune",
]  # fmt: skip

_HOMES = {
    "export": "ftjax.api.export",
    **dict.fromkeys(("plan", "preview"), "ftjax.api.look"),
    **dict.fromkeys(("check", "evaluate"), "ftjax.api.measure"),
    **dict.fromkeys(("Chat", "Model", "load"), "ftjax.api.model"),
    **dict.fromkeys(("Run", "train"), "ftjax.api.run"),
    "tune": "ftjax.tune.tune",
}
_PACKAGES = ("evaluate", "plan", "train", "tune")  # functions of the API that share their name with a package of ftjax


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name in _PACKAGES:
        return importlib.import_module(f"ftjax.{name}")
    if name in _HOMES:
        return _function(name)
    raise AttributeError(f"module 'ftjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _function(name: str) -> Any:
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Callable(ModuleType):
    """A package that can be called as the function of its name: `ftjax.train(...)` beside `import ftjax.train.loop`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)

    @property
    def _called(self) -> Any:
        return _function(self.__name__.removeprefix("ftjax."))

    @property
    def __signature__(self) -> Any:
        return importlib.import_module("inspect").signature(self._called)


class _Package(ModuleType):
    """Python puts a package that it imports into its parent's namespace, where the function of that name would be."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
