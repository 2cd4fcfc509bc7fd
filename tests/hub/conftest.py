"""Provides an environment with transformers 4.57, in which tests of `make test-all` read ftjax's folders."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGES = ("transformers==4.57.6", "peft==0.13.2", "numpy", "sentencepiece", "protobuf", "gguf")


@pytest.fixture(scope="session")
def older() -> Path:
    """Return the Python of an environment with transformers 4.57; the environment is kept between runs."""
    place = Path(__file__).parents[2] / ".cache" / "transformers4"
    python = place / "bin" / "python"
    complete = place / ".complete"
    if not complete.exists() or complete.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        torch = f"torch=={version('torch').partition('+')[0]}"
        done = subprocess.run([*pip, torch, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {PACKAGES[0]} here: {done.stderr.strip().splitlines()[-1]}")
        complete.write_text(" ".join(PACKAGES))
    return python
