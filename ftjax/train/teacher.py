"""The teacher of a run: another model that reads every batch, frozen, on the same mesh and sharded by the same rules.

Its parameters are among the run's frozen ones, with a prefix. It is opened as a base model is, may be of any family, and may
have an adapter, which is not merged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.config import Config, ModelConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import base_of
from ftjax.hub.adapter.peft import CONFIG as ADAPTER
from ftjax.hub.adapter.peft import load_adapter, read_adapter_config
from ftjax.hub.fetch import resolve_config
from ftjax.hub.load import load_base, read_hf_config, stored
from ftjax.hub.open import open_adapted, open_base
from ftjax.hub.run_folder import RUN, refuse_missing, result_of
from ftjax.hub.same_model import model_facts
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.tokenizer.same import refuse_other_tokenizer
from ftjax.models.classifier import classes_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.param import Spec
from ftjax.objectives import objective_of

PREFIX = "teacher."  # of the path of a parameter, among the frozen ones of a run


@dataclass(frozen=True)
class Place:
    """Where a teacher is.

    Attributes:
        name: as the configuration has it.
        model: Hub id, folder or .gguf file; for an adapter, its base model.
        adapter: a PEFT folder, or None.
    """

    name: str
    model: str
    revision: str | None = None
    adapter: Path | None = None

    def facts(self) -> dict[str, str]:
        """Return digests of its files, by what they are of."""
        found = model_facts(self.model, self.revision, self.adapter)
        return {name.replace("the ", "the teacher's ", 1): value for name, value in found.items()}


@dataclass(frozen=True)
class Teacher:
    """A teacher's structure; its arrays are among the frozen ones of a run."""

    place: Place
    model: Model

    def specs(self, dtype: Any) -> dict[str, Spec]:
        """Return the specs of its parameters by path, in the dtype in which they are held; an adapter's keep their own."""
        return {f"{PREFIX}{path}": stored(spec, dtype) for path, spec in self.model.specs.items()}

    def params(self, frozen: dict[str, Any]) -> dict[str, Any]:
        """Return its parameters from the frozen ones of a run."""
        return {path: frozen[f"{PREFIX}{path}"] for path in self.model.specs}

    def load(self, mesh: Mesh, dtype: Any) -> dict[str, jax.Array]:
        """Load its parameters, by path among the frozen ones. Raises UserError if a file is missing or damaged."""
        place = self.place
        path, _, source = open_base(place.model, place.revision, place.adapter)
        found = load_base(self.model, source, mesh, jnp.dtype(dtype), str(path))
        if place.adapter is not None:
            found |= load_adapter(self.model, place.adapter, mesh)
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    def line(self) -> str:
        """Describe it."""
        count = sum(spec.size for spec in self.model.specs.values())
        return f"teacher: {self.place.name}, {self.model.config['model_type']}, {count:,} params, frozen"


def place_of(name: str, revision: str | None = None) -> Place:
    """Find a teacher: a run (or its `final/` or `best/`), a PEFT folder or a model.

    Raises UserError if there is no such run, or an adapter does not name its base model.
    """
    refuse_missing(name)
    path = Path(name).expanduser()
    found = None if (path / ADAPTER).is_file() and not (path / RUN).is_file() else result_of(path)
    folder = path if found is None else found[0]
    if not (folder / ADAPTER).is_file():
        return Place(name, name if found is None else str(folder), None if path.exists() else revision)
    base = base_of(folder, read_adapter_config(folder))
    if not base:
        raise UserError(f"{name}: its {ADAPTER} names no base model; export it as a whole model first (ftjax export --merge)")
    own = read_adapter_config(folder).get("revision")
    return Place(name, str(base), None if Path(str(base)).exists() else own, folder)


def teacher_of(config: Config) -> Teacher | None:
    """Return the teacher of a run as shapes; None if its objective has none. Reads no weights, except an adapter's."""
    given = objective_of(config).teacher(config.objective)
    if given is None:
        return None
    try:
        return open_teacher(*given)
    except UserError as error:
        raise UserError(f"objective.teacher_model_name_or_path: {error}") from None


def open_teacher(name: str, revision: str | None = None) -> Teacher:
    """Return a teacher as shapes. Raises UserError if it is missing, damaged, not supported or no language model."""
    place = place_of(name, revision)
    if place.adapter is None:
        hf_config = read_hf_config(resolve_config(place.model, place.revision))
        root = build_module(hf_config)
    else:
        (_, hf_config, _), root, _ = open_adapted(place.model, place.revision, place.adapter, note=lambda text: None)
    if classes_of(hf_config):
        raise UserError(f"{name}: it is a classifier and predicts no tokens; choose a language model")
    return Teacher(place, Model.of(root, hf_config))


def refuse_other_vocabulary(config: Config, tokenizer: Any) -> None:
    """Raise UserError if the teacher of a run does not mean the same by each token as the run's model."""
    given = objective_of(config).teacher(config.objective)
    if given is not None:
        refuse_tokenizer_of(given, config.model, tokenizer)


def refuse_tokenizer_of(given: tuple[str, str | None], model: ModelConfig, tokenizer: Any) -> None:
    """Raise UserError unless the teacher of this name and revision has the tokenizer of a model."""
    place = place_of(*given)
    own = place.adapter is not None and (place.adapter / "tokenizer_config.json").is_file()
    where = ModelConfig(path=str(place.adapter)) if own else ModelConfig(path=place.model, revision=place.revision)
    try:
        other = load_tokenizer(where)
    except UserError as error:
        raise UserError(f"objective.teacher_model_name_or_path: {error}") from None
    refuse_other_tokenizer(tokenizer, other, model.tokenizer or model.path, place.name)
