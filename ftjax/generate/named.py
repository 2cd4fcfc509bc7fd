"""Resolve the model argument of a command: a run, a configuration file, an adapter or a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.config.load import Override, load_config, print_note
from ftjax.data.control import Mode
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import base_of
from ftjax.hub.adapter.peft import CONFIG as ADAPTER
from ftjax.hub.adapter.peft import read_adapter_config
from ftjax.hub.fetch import resolve_config
from ftjax.hub.run_folder import RUN, adapter_folder, refuse_missing, result_of


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a model; None means the setting of its training run, or else the model's own.

    Attributes:
        adapter: a PEFT folder or a run.
        revision: revision on the Hub.
        tokenizer, chat_template, quantization, special_tokens_in_text: see `Generator`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
    """

    adapter: Path | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    quantization: str | None = None
    special_tokens_in_text: Mode | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class Named:
    """A model that can be loaded.

    Attributes:
        name: name in messages and results.
        model: Hub id, folder or .gguf file; for an adapter, its base model.
        adapter: a PEFT folder, or None.
        config: configuration of the run, or the configuration file; or None.
        run: the run folder, or None.
        revision: revision of the base model, from the adapter's adapter_config.json.
        own_tokenizer: whether the result contains the tokenizer used in training, including added tokens and chat template,
            and no other was requested.
    """

    name: str
    model: str
    adapter: Path | None = None
    config: Config | None = None
    run: Path | None = None
    revision: str | None = None
    own_tokenizer: bool = False

    def options(self, asked: LoadOptions = LoadOptions()) -> dict[str, Any]:
        """Return the settings for `Generator`: those in `asked` (`none` turns quantization off), or else those of the run."""
        own: dict[str, Any] = {"revision": self.revision}
        if self.config is not None:
            settings = self.config.model
            own = {name: getattr(self.config.data, name) for name in ("special_tokens_in_text", "fold_system")}
            own["quantization"] = settings.quantization
            if self.model == settings.path:
                own["revision"] = settings.revision
            if not self.own_tokenizer:
                own |= {"tokenizer": settings.tokenizer, "chat_template": settings.chat_template}
        given = {name: value for name, value in vars(asked).items() if name not in ("adapter", "dtype")} | {"fold_system": None}
        chosen = {name: own.get(name) if value is None else value for name, value in given.items()}
        return {name: None if (name, value) == ("quantization", "none") else value for name, value in chosen.items()}


def find_named(
    given: str, overrides: Sequence[Override] = (), *, adapter: Path | None = None, note: Callable[[str], None] = print_note
) -> Named:
    """Resolve a run folder (or its `final/` or `best/`), a configuration file, a PEFT folder or a model.

    A configuration file means the run in its `output_dir`, or for its base model until that run has finished. A PEFT
    folder means the adapter on the base model that it names. `adapter` may also be a run folder.

    Raises UserError if the run does not exist or has no result yet, if an adapter's base model is unknown or cannot be found,
    or if two adapters are given.
    """
    refuse_missing(given)
    path = Path(given).expanduser()
    adapter = None if adapter is None else adapter_folder(adapter)
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        config = load_config(path, overrides, note=note)
        run = Path(config.output_dir)
        if adapter is None and (run / "final").is_dir():
            return _of_run(run, run / "final", config, config)
        if adapter is None:
            note(f"{run} has no final/ yet; using the base model {config.model.path}")
            return Named(config.model.path, config.model.path, None, config)
        return Named(f"{config.model.path} with {adapter}", config.model.path, adapter, config)
    found = None
    if (result := result_of(path)) is not None:
        config = load_config(result[1] / RUN, overrides, note=note, asked=False)
        trained = load_config(result[1] / RUN, note=lambda text: None, asked=False) if overrides else config
        found = _of_run(result[1], result[0], config, trained)
    elif (path / ADAPTER).is_file():
        if adapter is None:
            return _of_adapter(given, path)
        found = Named(given, given, path)
    if adapter is None:
        return Named(given, given) if found is None else found
    if found is not None and found.adapter is not None:
        raise UserError(
            f"{given}: this is an adapter, and --adapter {adapter} is a second one; give the base model and one adapter"
        )
    model = given if found is None else found.model
    return Named(f"{model} with {adapter}", model, adapter)


def _of_run(run: Path, result: Path, config: Config, trained: Config) -> Named:
    """Return the result of a run; `trained` is its configuration without this command's overrides."""
    tokenizers = [(one.model.tokenizer, one.model.chat_template) for one in (config, trained)]
    own = (result / "tokenizer_config.json").is_file() and tokenizers[0] == tokenizers[1]
    if (result / ADAPTER).is_file():
        return Named(str(result), config.model.path, result, config, run, own_tokenizer=own)
    return Named(str(result), str(result), None, config, run, own_tokenizer=own)


def _of_adapter(given: str, path: Path) -> Named:
    saved = read_adapter_config(path)
    base = base_of(path, saved)
    if not base:
        raise UserError(f"{path}: its {ADAPTER} names no base model; give the model, and this folder as --adapter")
    revision = None if Path(base).exists() else saved.get("revision")
    try:
        resolve_config(str(base), revision)
    except UserError as error:
        raise UserError(
            f"{path}: its {ADAPTER} names the base model {base}, which cannot be found ({error}). "
            f"Give the path or Hub id of the model, and this folder as --adapter"
        ) from None
    return Named(given, str(base), path, revision=revision)
