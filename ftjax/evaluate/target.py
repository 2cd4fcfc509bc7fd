"""What `ftjax evaluate` is given: a run, a configuration, a model or an adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.config.load import config_of, load_config, print_note
from ftjax.errors import UserError
from ftjax.generate.session import Generator
from ftjax.hub.peft import CONFIG as ADAPTER
from ftjax.hub.peft import read_adapter_config
from ftjax.mesh import make_mesh


@dataclass(frozen=True)
class Target:
    """A model to be measured.

    Attributes:
        name: how it is called in results.
        model: Hub id, folder or .gguf file.
        adapter: a PEFT folder, or None.
        config: evaluation, data and tokenizer; that of the run where there is one.
        run: the run folder, or None.
    """

    name: str
    model: str
    adapter: Path | None
    config: Config
    run: Path | None = None

    def base(self) -> "Target":
        """What was fine-tuned. Raises UserError where that is this model itself."""
        if self.adapter is None and self.run is None:
            raise UserError(f"{self.name}: there is no base model to compare with; give a run, or --adapter with its model")
        return replace(self, name=self.config.model.path, model=self.config.model.path, adapter=None)

    def load(self, tokenizer: Any = None) -> Generator:
        """The model in memory; `tokenizer` where it is another's, so that both see the same prompts."""
        settings = self.config.model
        return Generator(
            self.model, self.adapter, revision=settings.revision if self.model == settings.path else None,
            dtype=self.config.evaluate.dtype, mesh=make_mesh(self.config.mesh),
            tokenizer=settings.tokenizer if tokenizer is None else tokenizer, chat_template=settings.chat_template,
            quantization=settings.quantization,
        )  # fmt: skip


def find_target(
    given: str, overrides: Sequence[str] = (), *, adapter: Path | None = None, note: Callable[[str], None] = print_note
) -> Target:
    """Tell a run folder (or its `final/` or `best/`), a configuration file, a PEFT folder, and a model.

    A configuration file means the run in its `output_dir`, and before that has ended its base model. A PEFT folder means
    itself on the base model that it names.

    Raises UserError where it is none of them.
    """
    place = Path(given).expanduser()
    if place.suffix in (".yaml", ".yml") and not place.is_dir():
        config = load_config(place, overrides, note=note)
        run = Path(config.output_dir)
        if (run / "final").is_dir():
            return _of_run(run, run / "final", config)
        note(f"{run} holds no final/ yet, so that the base model {config.model.path} is evaluated")
        return Target(config.model.path, config.model.path, None, config)
    if adapter is None:
        for run, result in ((place, place / "final"), (place.parent, place)):
            if (run / "config.yaml").is_file() and _is_result(result):
                return _of_run(run, result, load_config(run / "config.yaml", overrides, note=note))
        if (place / "config.yaml").is_file():
            raise UserError(
                f"{given}: this run has no final/ yet; let it finish, or evaluate {place / 'best'} where that exists"
            )
        if (place / ADAPTER).is_file():
            base = read_adapter_config(place).get("base_model_name_or_path")
            if not base:
                raise UserError(f"{place}: its {ADAPTER} names no base model; give the model, and this folder as --adapter")
            return Target(given, base, place, _config_for(base, overrides, note))
    name = f"{given} with {adapter}" if adapter else given
    return Target(name, given, adapter, _config_for(given, overrides, note))


def _is_result(folder: Path) -> bool:
    return (folder / ADAPTER).is_file() or (folder / "config.json").is_file()


def _of_run(run: Path, result: Path, config: Config) -> Target:
    if (result / ADAPTER).is_file():
        return Target(str(result), config.model.path, result, config, run)
    return Target(str(result), str(result), None, config, run)


def _config_for(model: str, overrides: Sequence[str], note: Callable[[str], None]) -> Config:
    """A model without a run has the default settings, and the overrides."""
    return config_of({"model": {"path": model}, "data": {"train": "-"}}, overrides, note=note)
