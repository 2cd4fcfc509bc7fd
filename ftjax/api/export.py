"""Results as files for other tools."""

import os
from pathlib import Path
from typing import Literal

from ftjax.errors import UserError


def export(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None,
    merge: bool = False, portable: bool = False, gguf: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] | None = None,
    lora: bool = False, push_to_hub: str | None = None, private: bool = True, quiet: bool = False,
) -> Path:  # fmt: skip
    """Export a run as a Hugging Face or PEFT folder, or as a GGUF file; return its path.

    >>> ftjax.export("runs/first", "merged", merge=True, quiet=True).name
    'merged'

    Args:
        run: a run, its `final/` or `best/`, or an adapter folder; with `adapter`, its base model.
        out: the folder, or the file with `gguf`.
        adapter: an adapter folder.
        merge: merge the adapter into the base model.
        portable: write an adapter that vLLM and llama.cpp can load.
        gguf: write one GGUF file of this type for llama.cpp and Ollama; `auto` chooses it.
        lora: with `gguf`, write the adapter alone.
        push_to_hub: a repository to upload the folder to.
        private: whether a new repository is private.
        quiet: do not print what was written and what loads it.

    Raises UserError if the folder is none of these, or its method cannot do what is asked.
    """
    say = _nothing if quiet else print
    target, own = Path(out), None if adapter is None else Path(adapter)
    if gguf is not None:
        from ftjax.hub.export_gguf import export_gguf

        if portable or push_to_hub or (merge and lora):
            raise UserError("export: --gguf writes one file, merged or with --lora the adapter; leave the other options out")
        export_gguf(os.fspath(run), target, asked=None if gguf == "auto" else gguf, adapter=own, lora=lora, say=say)
        return target
    if lora:
        raise UserError("export: --lora belongs to --gguf; an adapter's folder is written without both")
    from ftjax.hub.export import export as write

    write(
        os.fspath(run), target, adapter=own, merge=merge, portable=portable, push_to_hub=push_to_hub, private=private, say=say
    )
    return target


def _nothing(text: str) -> None:
    """Say nothing."""
