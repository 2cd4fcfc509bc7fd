"""Sequence classifiers: models with a classification head, in the layout of Hugging Face's
`AutoModelForSequenceClassification`. Scores are read at the last token of a text.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.errors import UserError
from ftjax.models.causal_lm import CausalLM
from ftjax.models.composite import text_of, with_text
from ftjax.models.nn.context import Context
from ftjax.models.nn.layers import Linear

HEAD = "score"
ARCHITECTURE = "ForSequenceClassification"
OTHERS = (  # families without such a class in transformers
    "bamba", "falcon_h1", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm4_moe", "glm4_moe_lite",
    "granite", "granitemoe", "granitemoehybrid", "lfm2_moe", "llama4", "llama4_text", "nemotron_h", "olmo_hybrid", "olmoe",
)  # fmt: skip
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names


def _unembed(self: Any, x: jax.Array, ctx: Context) -> jax.Array:
    """Project hidden states `[..., E]` to float32 scores `[..., classes]`."""
    return self.score(x, ctx).astype(jnp.float32)


@cache
def _with_scores(kind: type[nnx.Module]) -> type[nnx.Module]:
    """Return a subclass of the family's model with a classification head in place of the projection to the vocabulary."""
    return type(f"{kind.__name__}WithScores", (kind,), {"unembed": _unembed})


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes in a classifier's config.json, by id; empty for a model that generates text."""
    if not any(name.endswith(ARCHITECTURE) for name in config.get("architectures") or ()):
        return ()
    return tuple(name for _, name in sorted((int(number), name) for number, name in config["id2label"].items()))


def problem_of(config: Mapping[str, Any]) -> str | None:
    """Return a classifier's problem type; None for a model that generates text.

    Without `problem_type`, a single output means regression, as in transformers.
    """
    classes = classes_of(config)
    return (config.get("problem_type") or (REGRESSION if len(classes) == 1 else SINGLE)) if classes else None


def vector_size(config: Mapping[str, Any]) -> int:
    """Return the number of label values per text; 0 for single-label classification."""
    return 0 if problem_of(config) in (None, SINGLE) else len(classes_of(config))


def classifier_config(
    config: Mapping[str, Any], classes: Sequence[str], pad_token_id: int | None = None, problem_type: str | None = SINGLE
) -> dict[str, Any]:
    """Return config.json of a classifier based on this model.

    Args:
        pad_token_id: used if config.json has none. transformers needs it to find the last token that is not padding.

    Raises UserError for families without a classifier in transformers.
    """
    kind = config["model_type"]
    if kind in OTHERS:
        raise UserError(
            f"objective.head: transformers has no {ARCHITECTURE[3:]} of the family {kind}, so nothing could load the "
            "result; leave head out to train the words of the labels instead"
        )
    from transformers import CONFIG_MAPPING

    name = CONFIG_MAPPING[kind].__name__.removesuffix("Config") + ARCHITECTURE
    pad = text_of(config).get("pad_token_id")
    return {
        **with_text(config, pad_token_id=pad_token_id if pad is None else pad),
        "architectures": [name],
        "id2label": {str(number): label for number, label in enumerate(classes)},
        "label2id": {label: number for number, label in enumerate(classes)},
        "problem_type": problem_type,
    }


def to_classifier(root: CausalLM, config: Mapping[str, Any]) -> None:
    """Replace the projection to the vocabulary with a head for the classes of config.json, in place."""
    if "." not in root.output:  # a separate module, not the tied embedding
        setattr(root, root.output, None)
    object.__setattr__(root, "__class__", _with_scores(type(root)))  # bypasses NNX, which would register it as an attribute
    root.score = Linear(root.sizes.embed, len(classes_of(config)), ("embed", None))
    root.score.adaptable = False  # the head is trained in full
    root.output = HEAD
