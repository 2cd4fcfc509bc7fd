"""`ftjax export`: writes a run's result as a folder that other tools load."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.config import Config, MeshConfig, ModelConfig
from ftjax.config.load import config_of, load_config, print_note
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import base_of, publish_base
from ftjax.hub.adapter.peft import CONFIG, WEIGHTS, load_adapter, read_adapter_config
from ftjax.hub.adapter.plain_lora import read_updates, targets, write_plain
from ftjax.hub.fetch import resolve_model
from ftjax.hub.load import check_base, read_hf_config
from ftjax.hub.model_folder import from_source, model_tensors, write_folder
from ftjax.hub.open import open_adapted
from ftjax.hub.output import refuse_what_is_there, replacing
from ftjax.hub.run_folder import refuse_missing
from ftjax.hub.safetensors import Tensor
from ftjax.hub.tokenizer.files import write_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.written import describe
from ftjax.mesh import make_mesh
from ftjax.methods import method_of
from ftjax.models.composite import text_of
from ftjax.models.model import Model
from ftjax.objectives import head_of

DTYPES = ("float32", "bfloat16", "float16")


def export(
    run: Path | str, out: Path, *, adapter: Path | None = None, merge: bool = False, portable: bool = False,
    push_to_hub: str | None = None, private: bool = True, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Export a run's `final/`, `final/` or `best/` itself, or any adapter folder to `out`.

    Args:
        run: with `adapter`, its base model.
        merge: one model with the adapter's update added in float32, in the run's `model.dtype`, or else the base's dtype.
        portable: an adapter in the subset that vLLM and llama.cpp read: one rank, alpha = rank, plain LoRA keys.
        push_to_hub: a repository to upload `out` to, private unless told otherwise.
        say: called with what was written and what loads it.

    Raises UserError if the folder is none of these, or its method cannot do what is asked.
    """
    result, config = find_result(Path(run)) if adapter is None else (adapter, None)
    holds_adapter = (result / CONFIG).is_file()
    if adapter is not None:
        read_adapter_config(adapter)  # raises for a folder that is not an adapter's
    if merge and portable:
        raise UserError("export: --merge gives a whole model and --portable an adapter; choose one")
    if not holds_adapter and (merge or portable):
        raise UserError(f"{result}: it is a whole model already; leave --merge and --portable out")
    if out.resolve() == result.resolve():
        raise UserError(f"export: --out {out} is the folder to be exported; choose another")
    refuse_what_is_there(out, "export")
    with replacing(out) as folder:
        if merge:
            write_merged(result, folder, config, None if adapter is None else str(run))
        elif portable:
            write_portable(result, folder)
        else:
            shutil.copytree(result, folder, dirs_exist_ok=True)
            if holds_adapter:
                publish_base(folder)
        for extra in ("README.md",):
            if (result / extra).exists() and not (folder / extra).exists():
                shutil.copyfile(result / extra, folder / extra)
    say("\n".join(describe(out)))
    if push_to_hub:
        from ftjax.hub.push import push_folder

        push_folder(out, push_to_hub, private=private)


def find_result(run: Path) -> tuple[Path, Config | None]:
    """Return `(the folder with the weights, the run's configuration)` for a run folder, its `final/` or `best/`, or an
    adapter without a run."""
    refuse_missing(str(run))
    if (run / "final").is_dir():
        result, home = run / "final", run
    elif (run / CONFIG).is_file() or (run / "config.json").is_file():
        result, home = run, run.parent
    elif (run / "config.yaml").is_file():
        raise UserError(f"{run}: this run has no final/ yet; let it finish, or export {run / 'best'} where that exists")
    else:
        found = ", ".join(sorted(p.name for p in run.iterdir())[:10]) if run.is_dir() else "no such folder"
        raise UserError(f"{run}: expected a run folder (config.yaml, final/); found {found}")
    if (home / "config.yaml").is_file():
        return result, load_config(home / "config.yaml", asked=False)
    if not (result / CONFIG).is_file():
        raise UserError(f"{home}: expected the run's config.yaml beside {result.name}/, to find the base model")
    return result, None


def _base_alone(adapter: Path, base: str | None) -> Config:
    """Return model settings for an adapter without a run: the base model's dtype and the adapter's tokenizer."""
    base = base or base_of(adapter, read_adapter_config(adapter))
    if not base:
        raise UserError(f"{adapter}: its {CONFIG} names no base model; name it: ftjax export BASE --adapter {adapter} --merge")
    known = read_hf_config(resolve_model(base))
    dtype = known.get("dtype") or text_of(known).get("dtype")
    own = {"dtype": dtype} if dtype in DTYPES else {}
    own |= {"tokenizer": str(adapter)} if (adapter / "tokenizer_config.json").is_file() else {}
    return config_of({"model": {"path": base, **own}, "data": {"train": "-"}})


class Merged(NamedTuple):
    """One model made of a base and an adapter.

    Attributes:
        tensors: under Hugging Face names; each is read and merged when it is asked for.
        settings: those with which its tokenizer is loaded.
        path: the base model's folder or file.
    """

    model: Model
    tensors: list[Tensor]
    settings: ModelConfig
    path: Path


def merged(adapter: Path, config: Config | None, base: str | None = None, dtype: str | None = None) -> Merged:
    """Merge base and adapter.

    The base is that of the run's configuration, or without one the base that is given or that the adapter names. Its
    tensors pass through one at a time as stored, so neither the model's size nor a quantised run's rounding matters.

    Args:
        dtype: of the tensors; `model.dtype` by default.
    """
    config = config or _base_alone(adapter, base)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    named = config.model.path, config.model.revision
    (path, hf_config, source), root, method = open_adapted(*named, adapter, head=head_of(config), note=print_note)
    if reason := method_of(method).no_merge:
        raise UserError(f"export: --merge: {reason}; leave --merge out")
    model = Model.of(root, hf_config)
    trained = load_adapter(model, adapter, mesh)
    check_base(model, source, str(path))
    dtype = jnp.dtype(dtype or config.model.dtype)
    return Merged(model, model_tensors(model, from_source(source, trained), trained, method, dtype), config.model, path)


def write_merged(adapter: Path, folder: Path, config: Config | None, base: str | None = None) -> None:
    """Write base and adapter as one model."""
    model, tensors, settings, path = merged(adapter, config, base)
    write_folder(folder, model, tensors, settings.dtype, path)
    write_tokenizer(folder, load_tokenizer(settings), settings, path)


def write_portable(adapter: Path, folder: Path) -> None:
    """Write a LoRA in which every layer has the same rank and scale 1.

    Raises UserError if the adapter has parts that vLLM and llama.cpp do not read.
    """
    saved, updates = read_updates(adapter, "vLLM and llama.cpp read plain LoRA only")
    write_plain(folder, saved, updates, targets(saved, updates))
    for path in adapter.iterdir():
        if path.name not in (CONFIG, WEIGHTS) and path.is_file():
            shutil.copyfile(path, folder / path.name)
