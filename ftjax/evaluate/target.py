"""Target of `ftjax evaluate`: a run, a configuration, a model or an adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from ftjax.config import Config
from ftjax.config.load import Override, config_of, load_config, print_note
from ftjax.errors import UserError
from ftjax.generate.named import LoadOptions, Named, find_named
from ftjax.generate.session import Generator
from ftjax.hub.fetch import resolve_config
from ftjax.mesh import make_mesh
from ftjax.models.classifier import SINGLE, classes_of, problem_of
from ftjax.models.facts import read_config
from ftjax.objectives import head_of


@dataclass(frozen=True)
class Target(Named):
    """A model to evaluate; its `config` has evaluation, data and tokenizer."""

    def base(self) -> "Target":
        """Return the base model that was fine-tuned. Raises UserError if this model is itself the base model."""
        if self.adapter is None and self.run is None:
            raise UserError(f"{self.name}: there is no base model to compare with; give a run, or --adapter with its model")
        head, path = head_of(self.config), self.config.model.path
        if head is not None and head.problem_type != SINGLE and not classes_of(_hf_config(path, self.config.model.revision)):
            raise UserError(
                f"--compare-base: several labels and numbers need a head, and {path} has none; leave --compare-base out"
            )
        return replace(self, name=path, model=path, adapter=None, own_tokenizer=False)

    def load(self, tokenizer: Any = None, devices: Sequence[jax.Device] | None = None) -> Generator:
        """Load the model on the configured mesh.

        Args:
            tokenizer: another model's, so that both see the same prompts.
            devices: devices to use, of all processes; None uses all.

        Raises UserError as `Generator` does, or if the mesh does not fit the devices.
        """
        own, mesh = self.options(LoadOptions(tokenizer=tokenizer)), make_mesh(self.config.mesh, devices)
        return Generator(self.model, self.adapter, dtype=self.config.evaluate.dtype, mesh=mesh, **own)


def find_target(
    given: str, overrides: Sequence[Override] = (), *, adapter: Path | None = None, note: Callable[[str], None] = print_note
) -> Target:
    """Find a model as `find_named`, with a configuration: for a model without a run the defaults and the overrides.

    Raises UserError as `find_named` does.
    """
    found = find_named(given, overrides, adapter=adapter, note=note)
    return Target(**{**vars(found), "config": _settings(found, overrides, note)})


def _settings(found: Named, overrides: Sequence[Override], note: Callable[[str], None]) -> Config:
    """Return a run's configuration, with the labels found in its data; for a model without a run the defaults, the overrides,
    and a classifier's own objective."""
    config = found.config
    if config is None:
        tree: dict[str, Any] = {"model": {"path": found.model, "revision": found.revision}, "data": {"train": "-"}}
        hf_config = _hf_config(found.model, found.revision)
        if classes := classes_of(hf_config):
            own = {"name": "classification", "head": True, "problem_type": problem_of(hf_config), "labels": list(classes)}
            tree["objective"] = own
        return config_of(tree, overrides, note=note)
    if config.objective.name != "classification" or config.objective.labels or found.run is None:
        return config
    if not (found.run / "config.yaml").is_file():
        return config
    saved = load_config(found.run / "config.yaml", note=note, asked=False).objective
    if saved.name != "classification":
        return config
    labels = {"labels": saved.labels, "label_format": saved.label_format}
    return config.model_copy(update={"objective": config.objective.model_copy(update=labels)})


def _hf_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Return the config.json of a model; empty for a .gguf file, which is never a classifier."""
    folder = resolve_config(model, revision)
    return {} if folder.is_file() else read_config(folder)
