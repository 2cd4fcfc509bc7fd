"""Whether two hosts have the same model: a digest of its files that takes no time, because it reads a part of the weights."""

from pathlib import Path

import xxhash

BLOCK = 1 << 16  # bytes that are read at each of the places
PLACES = 64  # of a file of weights, evenly over it


def model_digest(path: Path) -> str:
    """A digest of config.json, and of each file of weights its size and some of its bytes: all of them up to 4 MiB.

    Args:
        path: a folder in Hugging Face layout, or a .gguf file.
    """
    digest = xxhash.xxh3_128()
    files = [path] if path.is_file() else sorted([*path.glob("config.json"), *path.glob("model*.safetensors")])
    for file in files:
        size = file.stat().st_size
        step = max(BLOCK, (size - BLOCK) // (PLACES - 1))
        digest.update(f"{file.suffix}\0{size}\0".encode())
        with file.open("rb") as read:
            for start in range(0, size, step):
                read.seek(start)
                digest.update(read.read(BLOCK))
    return digest.hexdigest()
