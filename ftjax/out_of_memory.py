"""Recognises that memory ran out, of a device or of the host, in errors of XLA, NumPy and Python."""

import re

_MEMORY = re.compile(r"memory|allocat|\bhbm\b", re.IGNORECASE)
_BYTES = re.compile(r"allocat\w*\s+(?:of\s+)?([\d.]+)\s?(bytes|[KMGTPE]i?B?\b)", re.IGNORECASE)
_HBM = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50, "e": 2**60}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    text = str(error)
    if isinstance(error, MemoryError) or "std::bad_alloc" in text:
        return True
    return "RESOURCE_EXHAUSTED" in text and _MEMORY.search(text) is not None


def of_host(error: BaseException) -> bool:
    """Return whether it was the host's memory, not that of a device."""
    return isinstance(error, MemoryError) or "std::bad_alloc" in str(error)


def asked_for(error: BaseException) -> float | None:
    """Return the bytes that could not be had, if the error says so."""
    found = _HBM.search(str(error)) or _BYTES.search(str(error))
    return float(found[1].rstrip(".")) * _UNITS[found[2][0].lower()] if found else None
