"""Starts transformers and tensorboardX without PyTorch, which they otherwise import with themselves wherever it is installed.

ftjax uses them for configurations, tokenizers, chat templates and curves; PyTorch, which none of these needs, takes seconds of
a start.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def names_python_file(settings: Any) -> bool:
    """Return whether settings name a Python file of the user's, such as a reward or a metric; it may use PyTorch."""
    if isinstance(settings, Mapping):
        return any(map(names_python_file, settings.values()))
    if isinstance(settings, list | tuple):
        return any(map(names_python_file, settings))
    return isinstance(settings, str) and ".py" in settings


def start_transformers() -> None:
    """Import the base of transformers as where PyTorch is not installed, so that its further modules do not import it either.

    This is for commands, whose process is theirs alone: afterwards transformers' own PyTorch models cannot be used in it. It
    does nothing if transformers is imported already.
    """
    if "transformers" in sys.modules:
        return
    told = os.environ.get(QUIET)
    os.environ[QUIET] = "1"  # or else transformers says that there is no PyTorch
    try:
        with hidden_torch():
            import transformers.configuration_utils
            import transformers.tokenization_utils_base  # noqa: F401
    finally:
        if told is None:
            del os.environ[QUIET]


@contextmanager
def hidden_torch() -> Iterator[None]:
    """Let modules that are imported here find no PyTorch, unless it is imported already."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # as Python itself marks what cannot be imported
    try:
        yield
    finally:
        del sys.modules["torch"]
