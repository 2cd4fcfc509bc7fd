"""Checks whether hosts have the same model: a fast digest that reads only a part of the weights."""

from pathlib import Path

import xxhash

from ftjax.hub.fetch import resolve_model

BLOCK = 1 << 16  # bytes read at each place
PLACES = 64  # places per weight file, evenly spaced


def model_facts(path: str, revision: str | None = None, adapter: str | Path | None = None) -> dict[str, str]:
    """Return labelled digests of a model's files and its adapter's, which hosts compare."""
    facts = {"digest of the model's files": model_digest(resolve_model(path, revision))}
    return facts | ({"digest of the adapter's files": model_digest(Path(adapter))} if adapter else {})


def model_digest(path: Path) -> str:
    """Return a digest of the configuration and of each weight file's size and a sample of its bytes (all of them up to 4
    MiB).

    Args:
        path: a folder of a model or an adapter, or a .gguf file.
    """
    digest = xxhash.xxh3_128()
    names = ("config.json", "adapter_config.json", "model*.safetensors", "adapter*.safetensors")
    files = [path] if path.is_file() else sorted(file for name in names for file in path.glob(name))
    for file in files:
        size = file.stat().st_size
        step = max(BLOCK, (size - BLOCK) // (PLACES - 1))
        digest.update(f"{file.suffix}\0{size}\0".encode())
        with file.open("rb") as read:
            for start in range(0, size, step):
                read.seek(start)
                digest.update(read.read(BLOCK))
    return digest.hexdigest()
