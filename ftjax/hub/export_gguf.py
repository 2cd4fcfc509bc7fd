"""`ftjax export --gguf`: writes a run's result, or any model, as a GGUF file for llama.cpp, with a Modelfile for Ollama."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ftjax.config import FullConfig, ModelConfig
from ftjax.config.load import print_note
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import base_of
from ftjax.hub.adapter.peft import CONFIG, read_adapter_config
from ftjax.hub.export import Merged, find_result, merged
from ftjax.hub.fetch import resolve_config, resolve_model
from ftjax.hub.gguf.adapter import write_adapter
from ftjax.hub.gguf.families import family_of
from ftjax.hub.gguf.modelfile import write_modelfile
from ftjax.hub.gguf.write import TYPES, write_model
from ftjax.hub.load import check_base, open_model, read_hf_config
from ftjax.hub.model_folder import from_source, model_tensors
from ftjax.hub.public import public_name
from ftjax.hub.run_folder import RUN, refuse_missing
from ftjax.hub.tokenizer.ends import end_ids, generation_config
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.written import readable
from ftjax.models.classifier import classes_of
from ftjax.models.model import Model, build_module


def export_gguf(
    run: str, out: Path, *, asked: str | None, adapter: Path | None = None, lora: bool = False,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Write a GGUF file and a Modelfile.

    Args:
        run: a run, its `final/` or `best/`, an adapter folder, or a model; with `adapter`, that adapter's base model.
        asked: one of `TYPES`; f16 by default, f32 for an adapter.
        lora: an adapter's update alone, for `llama-cli --lora`.
        say: called with what was written and what loads it.

    Raises UserError if llama.cpp cannot compute the model as it is, or its tokenizer gives other ids.
    """
    asked = asked or ("f32" if lora else "f16")
    if asked not in TYPES:
        raise UserError(f"export: --gguf {asked}: expected one of {', '.join(TYPES)}")
    if out.is_dir() or out.suffix != ".gguf":
        raise UserError(f"export: --gguf writes one file: --out NAME.gguf, not {out}")
    modelfile = out.with_suffix(".Modelfile")
    for there in (out, modelfile):
        if there.exists():
            raise UserError(f"export: --out {out}: {there} exists already; choose another file, or remove it first")
    result = _adapter_folder(run, adapter)
    if lora:
        if result is None:
            raise UserError(f"{run}: it is a whole model and no adapter; leave --lora out")
        base, revision = (run, None) if adapter is not None else _base(result)
        config = read_hf_config(resolve_config(base, revision))
        write_adapter(out, result, config, asked, out.stem)
        write_modelfile(modelfile, out)
        say(_described(out, modelfile, f"an adapter for {public_name(base)}", f"llama-cli -m BASE.gguf --lora {out}"))
        return
    made = _whole(run) if result is None else _merged(result, run if adapter is not None else None)
    _write(out, modelfile, made, asked)
    say(_described(out, modelfile, f"a whole model ({asked})", f"llama-cli -m {out}"))


def _adapter_folder(run: str, adapter: Path | None) -> Path | None:
    """Return the folder of the adapter; None for a whole model."""
    if adapter is not None:
        read_adapter_config(adapter)
        return adapter
    path = Path(run).expanduser()
    if not path.is_dir() or not any((path / name).exists() for name in ("final", RUN, CONFIG)):
        return None
    result, _ = find_result(path)
    return result if (result / CONFIG).is_file() else None


def _base(adapter: Path) -> tuple[str, str | None]:
    """Return name and revision of an adapter's base model."""
    config = find_result(adapter)[1]
    if config is not None:
        return config.model.path, config.model.revision
    base = base_of(adapter, read_adapter_config(adapter))
    if not base:
        raise UserError(f"{adapter}: its {CONFIG} names no base model; name it: ftjax export BASE --adapter {adapter} ...")
    return base, None


def _merged(adapter: Path, base: str | None) -> Merged:
    config = find_result(adapter)[1] if base is None else None
    return merged(adapter, config, base, dtype="float32")


def _whole(run: str) -> Merged:
    refuse_missing(run)
    path = Path(run).expanduser()
    settings = ModelConfig(path=str(find_result(path)[0]) if (path / "final").is_dir() or (path / RUN).is_file() else run)
    path = resolve_model(settings.path)
    config, source = open_model(path)
    model = Model.of(build_module(config), config)
    check_base(model, source, str(path))
    read = from_source(source, {})
    tensors = model_tensors(model, read, {}, FullConfig(), jnp.dtype(np.float32))
    return Merged(model, tensors, settings, path)


def _write(out: Path, modelfile: Path, made: Merged, asked: str) -> None:
    model = made.model
    family_of(model.config)
    if classes_of(model.config):
        raise UserError("export: --gguf: this model classifies with a head, and llama.cpp has no such model of this kind")
    tokenizer = load_tokenizer(made.settings)
    folder = made.path if made.path.is_dir() else None
    settings = generation_config(folder)
    ends = end_ids(model.config, settings, tokenizer)
    source = Path(made.settings.tokenizer or made.path)
    write_model(
        out, model, made.tensors, asked, tokenizer, ends=ends, folder=source if source.is_dir() else None, name=out.stem,
        note=print_note,
    )  # fmt: skip
    stops = [tokenizer.convert_ids_to_tokens(index) for index in sorted(ends)]
    write_modelfile(modelfile, out, tokenizer=tokenizer, stops=stops, settings=settings)


def _described(out: Path, modelfile: Path, what: str, command: str) -> str:
    return (
        f"wrote {what} to {out}: {readable(out.stat().st_size)}, and {modelfile.name}\n"
        f"  llama.cpp: {command}\n  Ollama:    ollama create {out.stem} -f {modelfile}"
    )
