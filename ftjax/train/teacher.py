"""The teacher of a run: another model that reads every batch, frozen, on the same mesh and sharded by the same rules.

Its parameters are among the run's frozen ones, with a prefix. It is opened as a base model is, may be of any family, and may
have an adapter, which is not merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.config import Config, ModelConfig
from ftjax.config.distill import DistillConfig
from ftjax.data.partners import Partners
from ftjax.data.pipeline import Split, load_splits
from ftjax.data.token_bytes import TokenBytes
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
from ftjax.models.composite import text_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.param import Spec
from ftjax.objectives import encoding_of, objective_of

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
    """A teacher's structure; its arrays are among the frozen ones of a run.

    Attributes:
        matches: ids of tokens that the student's vocabulary and its own share, `(student's, own)`, where the loss needs them.
    """

    place: Place
    model: Model
    matches: Sequence[tuple[int, int]] | None = None

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
        teacher = open_teacher(*given)
    except UserError as error:
        raise UserError(f"objective.teacher_model_name_or_path: {error}") from None
    if not (aligned(config) and config.objective.uld_use_hybrid_loss):
        return teacher
    texts = TokenBytes(load_tokenizer(config.model), config.model.tokenizer or config.model.path)
    matches = texts.matches(TokenBytes(tokenizer_of(given), teacher.place.name))
    if not matches:
        raise UserError(
            f"objective.uld_use_hybrid_loss: {config.model.path} and the teacher {teacher.place.name} have no token in common; "
            "leave it out"
        )
    return replace(teacher, matches=matches)


def aligned(config: Config) -> bool:
    """Return whether the teacher of a run may have another tokenizer: its texts are aligned with the student's."""
    return isinstance(config.objective, DistillConfig) and config.objective.use_uld_loss


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
    """Raise UserError if the teacher of a run does not mean the same by each token as the run's model, and has to."""
    given = objective_of(config).teacher(config.objective)
    if given is not None and not aligned(config):
        refuse_tokenizer_of(given, config.model, tokenizer)


def refuse_tokenizer_of(given: tuple[str, str | None], model: ModelConfig, tokenizer: Any) -> None:
    """Raise UserError unless the teacher of this name and revision has the tokenizer of a model."""
    refuse_other_tokenizer(tokenizer, tokenizer_of(given), model.tokenizer or model.path, given[0])


def tokenizer_of(given: tuple[str, str | None]) -> Any:
    """Return the tokenizer of the teacher of this name and revision. Raises UserError if it has none."""
    place = place_of(*given)
    own = place.adapter is not None and (place.adapter / "tokenizer_config.json").is_file()
    try:
        return load_tokenizer(
            ModelConfig(path=str(place.adapter)) if own else ModelConfig(path=place.model, revision=place.revision)
        )
    except UserError as error:
        raise UserError(f"objective.teacher_model_name_or_path: {error}") from None


def with_partners(config: Config, splits: Sequence[Split | None], tokenizer: Any) -> tuple[Split | None, ...]:
    """Return the data sets with the teacher's documents of the same rows, if the texts of both are aligned.

    Args:
        tokenizer: the student's.

    Raises UserError if they cannot be.
    """
    if not aligned(config):
        return tuple(splits)
    given = objective_of(config).teacher(config.objective)
    encoding, name, other = encoding_of(config), given[0], tokenizer_of(given)
    for split in splits:
        if split is not None and "input_ids" in split.report.formats.values():
            raise UserError(
                f"{split.report.source}: its rows are token ids (data.format: input_ids), and objective.use_uld_loss needs "
                "texts, which the teacher's tokenizer divides in its own way; give the texts, or choose a teacher with the "
                "same tokenizer"
            )
    texts = TokenBytes(tokenizer, config.model.tokenizer or config.model.path), TokenBytes(other, name)
    try:
        others = load_splits(config.data, other, seed=config.training.seed, encoding=encoding)
    except UserError as error:
        raise UserError(f"the data with the tokenizer of the teacher {name}: {error}") from None
    rows = text_of(read_hf_config(resolve_config(place_of(*given).model, place_of(*given).revision)))["vocab_size"]
    for split in others:
        if split is not None:
            split.refuse_unknown(rows, other)

    def join(split: Split | None, theirs: Split | None) -> Split | None:
        if split is None:
            return None
        return Partners.of(split.documents, theirs.documents, *texts, other, encoding.values).join(split, name)

    return tuple(map(join, splits, others))
