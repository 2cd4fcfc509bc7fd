"""Runs under a Python with transformers 4.57: writes base models as users have them, and converts folders with llama.cpp's
converter. Arguments: llama.cpp's source, the request as JSON, and the file for the answers."""

import json
import logging
import sys
from pathlib import Path

source, asked, out = map(Path, sys.argv[1:])
sys.path[:0] = [str(source), str(source / "gguf-py")]

import convert_hf_to_gguf as converter  # noqa: E402
from conversion.base import TextModel  # noqa: E402
from gguf import GGUFReader  # noqa: E402
from older_config import write_config  # noqa: E402

# The converter recognises pre-tokenizers by a hash of ids, and does not know those of tiny vocabularies.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


NAMES = "general.basename", "general.version"  # guessed from the folder's name


def convert(folder: Path) -> str | None:
    """Convert a folder to `model.gguf`; return the error, or None."""
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(folder / "model.gguf"), "--outtype", "f32"]
    sys.argv += ["--model-name", "tiny"]
    logged = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: logged.append(record.getMessage())
    converter.logger.addHandler(listener)
    try:
        converter.main()
    except (Exception, SystemExit) as error:
        return " ".join([f"{type(error).__name__}: {error}", *logged])
    finally:
        converter.logger.removeHandler(listener)
    return None


def contents(file: Path) -> dict:
    reader = GGUFReader(file)
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(("GGUF.", *NAMES))}
    return found | {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data) for tensor in reader.tensors}


def with_defaults(found: dict) -> dict:
    """Write out the defaults that llama.cpp uses for missing keys."""
    kind = found["general.architecture"]
    size = found[f"{kind}.embedding_length"] // found[f"{kind}.attention.head_count"]
    defaults = {f"{kind}.attention.key_length": size, f"{kind}.attention.value_length": size}
    if kind == "olmo2":
        defaults["olmo2.rope.freq_base_swa"] = found["olmo2.rope.freq_base"]
    return defaults | found


def same(one, other) -> bool:
    if isinstance(one, tuple):
        return one[:2] == other[:2] and bool((one[2] == other[2]).all())
    return one == other


def compare(base: str, folder: str) -> dict:
    failed = {"base": convert(Path(base)), "folder": convert(Path(folder))}
    if any(failed.values()):
        return failed
    want, got = (with_defaults(contents(Path(place) / "model.gguf")) for place in (base, folder))
    apart = [name for name in sorted({*want, *got}) if name not in want or name not in got or not same(want[name], got[name])]
    vocabulary = {name: got.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "tokens", "scores", "token_type")}
    return failed | {"apart": apart, "tensors": sum(isinstance(one, tuple) for one in want.values()), "vocabulary": vocabulary}


def answer(one: dict) -> dict | str | None:
    if "model_type" in one:
        return write_config(**one)
    return compare(**one) if "base" in one else convert(Path(one["folder"]))


answers = []
for one in json.loads(asked.read_text()):
    try:
        answers.append(answer(one))
    except Exception as error:  # the test lists those that are refused
        answers.append({"error": f"{type(error).__name__}: {error}"})
out.write_text(json.dumps(answers))
