"""Where a text model is in a checkpoint that also has other parts, such as an image encoder.

Only the text model is built and trained (`ftjax.models.inside`). config.json stays nested, and the tensors of the other parts
are carried from the base model's folder into an exported one, bit for bit (`ftjax.hub.model_folder`).

`Composite`, in the family's line of the registry, is the only place that says where things are. `text_of` and `with_text` read
and change the fields of config.json that belong to the text model, for models of either kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text_config"
TIED = "tie_word_embeddings"  # a field of the whole model, which transformers reads there


@dataclass(frozen=True)
class Composite:
    """Where the parts of a composite checkpoint are.

    Attributes:
        carried: prefixes of the names of the other parts' tensors.
        inert: fields of config.json about the other parts, besides `text_config`.
        name: the text model's name: in `model`, where it is without its output, or with `whole` of all of it.
        whole: whether the text model is there with its output, as `language_model.model` and `language_model.lm_head`.
        clashing: whether layers of the other parts have names of the text's; adapters then say that they leave them out
            (`exclude_modules`), because PEFT would adapt them, or fail to, under the same names.
        stored: `(prefix of names in the model, prefix in files)`, where files have other names than the class that loads them.
    """

    carried: tuple[str, ...]
    inert: tuple[str, ...]
    name: str = "language_model"
    whole: bool = False
    clashing: bool = False
    stored: tuple[tuple[str, str], ...] = ()

    def in_model(self, name: str) -> str:
        """Return the name in the model of a tensor of a file."""
        return next((own + name.removeprefix(file) for own, file in self.stored if name.startswith(file)), name)

    def in_file(self, name: str) -> str:
        """Return the name in files of a tensor of the model."""
        return next((file + name.removeprefix(own) for own, file in self.stored if name.startswith(own)), name)


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of the text model in a completed config.json; all of them if the model is nothing else."""
    own = config.get(TEXT)
    return {**own, TIED: config[TIED]} if isinstance(own, Mapping) else config


def with_text(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return config.json with these fields of the text model changed."""
    if not isinstance(config.get(TEXT), Mapping):
        return {**config, **values}
    return {**config, TEXT: {**config[TEXT], **values}, **({TIED: values[TIED]} if TIED in values else {})}
