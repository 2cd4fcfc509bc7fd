"""The version of ftjax; in a file of its own, because `ftjax` itself imports everything else on demand."""

__version__ = "0.1.0"
