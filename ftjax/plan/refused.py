"""Why XLA did not compile a program."""

import re
from importlib.metadata import version
from importlib.util import find_spec

from ftjax.errors import UserError

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def wanted_bytes(error: Exception, topology: str) -> float:
    """Return the bytes that the program wanted, if XLA refused it for lack of memory. Raises UserError for any other reason."""
    message = str(error)
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", message)
    found = found or re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    if found is None:
        raise UserError(
            f"{topology}: XLA did not compile the step, with {_versions()}: {message.splitlines()[0]}\n"
            "If these versions do not belong together: pip install --upgrade 'jax[tpu]'"
        ) from error
    return float(found[1]) * _UNITS[found[2]]


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "libtpu") if find_spec(name))
