"""Real models and data sets, which may stand beside the project in a folder `shared`.

The suite makes the models and data sets that it needs. The real ones are further parameters of the tests in which they matter;
each list here is empty where they are missing.
"""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _found(name: str) -> list[Path]:
    return [SHARED / name] if (SHARED / name).is_dir() else []


LLAMAS = _found("models/stories260k")  # 260 thousand weights, trained on TinyStories
PIECES = _found("models/tokenizer_mistral_v1")  # 32 thousand SentencePiece pieces
SETS = _found("data")
