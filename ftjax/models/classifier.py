"""A sequence classifier: a model whose last projection goes to classes, in the layout of Hugging Face's
`AutoModelForSequenceClassification`. Its scores are read at the last token of a text.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.errors import UserError
from ftjax.models.causal_lm import CausalLM
from ftjax.models.context import Context
from ftjax.models.layers import Linear

HEAD = "score"
ARCHITECTURE = "ForSequenceClassification"
OTHERS = ("granite",)  # families of which transformers has no such class
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names


def _unembed(self: Any, x: jax.Array, ctx: Context) -> jax.Array:
    """Hidden states `[..., E]` -> float32 scores `[..., classes]`."""
    return self.score(x, ctx).astype(jnp.float32)


@cache
def _with_scores(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The family's model with scores in the place of the projection to the vocabulary."""
    return type(f"{kind.__name__}WithScores", (kind,), {"unembed": _unembed})


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a classifier's config.json, by number; empty for a model that writes text."""
    if not any(name.endswith(ARCHITECTURE) for name in config.get("architectures") or ()):
        return ()
    return tuple(name for _, name in sorted((int(number), name) for number, name in config["id2label"].items()))


def problem_of(config: Mapping[str, Any]) -> str | None:
    """What a classifier's scores mean; None for a model that writes text. One output alone is a number, as in transformers."""
    classes = classes_of(config)
    return (config.get("problem_type") or (REGRESSION if len(classes) == 1 else SINGLE)) if classes else None


def vector_size(config: Mapping[str, Any]) -> int:
    """Values that the labels of one text are; 0 where they are one class."""
    return 0 if problem_of(config) in (None, SINGLE) else len(classes_of(config))


def classifier_config(
    config: Mapping[str, Any], classes: Sequence[str], pad_token_id: int | None = None, problem_type: str | None = SINGLE
) -> dict[str, Any]:
    """config.json of a classifier over this model.

    Args:
        pad_token_id: where config.json has none. transformers needs it: it reads the score of the last token that is not it.

    Raises UserError for families of which transformers has no classifier.
    """
    kind = config["model_type"]
    if kind in OTHERS:
        raise UserError(
            f"objective.head: transformers has no {ARCHITECTURE[3:]} of the family {kind}, so that nothing could load the "
            "result; leave head out, which trains the words of the labels"
        )
    from transformers import CONFIG_MAPPING

    name = CONFIG_MAPPING[kind].__name__.removesuffix("Config") + ARCHITECTURE
    pad = config.get("pad_token_id")
    return {
        **config,
        "architectures": [name],
        "id2label": {str(number): label for number, label in enumerate(classes)},
        "label2id": {label: number for number, label in enumerate(classes)},
        "problem_type": problem_type,
        "pad_token_id": pad_token_id if pad is None else pad,
    }


def to_classifier(root: CausalLM, config: Mapping[str, Any]) -> None:
    """Replace the projection to the vocabulary by one to the classes of config.json, in place."""
    if "." not in root.output:  # a module of its own, not the embedding
        setattr(root, root.output, None)
    object.__setattr__(root, "__class__", _with_scores(type(root)))  # not one of its parts, which NNX would note
    root.score = Linear(root.sizes.embed, len(classes_of(config)), ("embed", None))
    root.score.adaptable = False  # it trains in full
    root.output = HEAD
