"""Text models under the names that they have in a composite checkpoint (`ftjax.models.composite`).

`model.layers.0...` becomes `model.language_model.layers.0...`, so that tensors, PEFT's keys and LoRA's targets are those of the
class with which people load the whole checkpoint.

Legend: B batch, T query length, E embed, V vocab.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from ftjax.errors import UserError
from ftjax.models.causal_lm import CausalLM
from ftjax.models.composite import TEXT, TIED, Composite
from ftjax.models.facts import Facts
from ftjax.models.nn.context import Context, after_virtual_tokens


class Inside(nnx.Module):
    """A composite model that has its text model alone, under the name that it has there."""

    def __init__(self, text: nnx.Module, name: str):
        self.name = name
        setattr(self, name, text)

    @property
    def text(self) -> nnx.Module:
        return vars(self)[self.name]

    @property
    def embed_tokens(self) -> nnx.Module:
        return self.text.embed_tokens

    def __call__(self, tokens: jax.Array, ctx: Context, cache: Any = None):
        """Map tokens `[B, T]` to `(hidden states [B, T, E], cache, auxiliary loss)`."""
        return self.text(tokens, ctx, cache)


class Whole(nnx.Module):
    """A composite model that has its text model with the output alone, under the name that it has there."""

    def __init__(self, text: CausalLM, name: str):
        self.name = name
        self.sizes, self.ropes, self.ignored = text.sizes, text.ropes, text.ignored
        self.embedding, self.output = text.embedding, text.output
        setattr(self, name, text)

    @property
    def text(self) -> CausalLM:
        return vars(self)[self.name]

    def hidden(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Any = None):
        """Map tokens `[B, T]` to `(hidden states [B, T, E], cache, auxiliary loss)`."""
        return self.text.hidden(tokens, after_virtual_tokens(self, tokens, ctx), cache)

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        return self.text.unembed(x, ctx)


def text_facts(facts: Facts, composite: Composite) -> Facts:
    """Return the fields of the text model; fields of the other parts are marked as read."""
    facts.inert(*composite.inert)
    if composite.whole and bool(facts[TIED]) != bool(facts[TEXT].get(TIED)):
        raise UserError(
            f"config.json of this {facts.model_type} model has {TIED} = {facts[TIED]!r}, and {facts[TEXT].get(TIED)!r} in "
            f"{TEXT}, which transformers reads; give both the same value"
        )
    return Facts({**facts[TEXT], TIED: facts[TIED]})


def put_inside(root: CausalLM, facts: Facts, composite: Composite) -> CausalLM:
    """Give a text model its name in the composite model; tensors that it ignores or carries get theirs."""

    def inside(name: str) -> str:
        if composite.whole and not name.startswith("."):
            return f"{composite.name}.{name}"
        return name.replace("model.", f"model.{composite.name}.", 1) if name.startswith("model.") else name

    root.embedding, root.output = inside(root.embedding), inside(root.output)
    root.ignored, facts.carried = tuple(map(inside, root.ignored)), list(map(inside, facts.carried))
    if composite.whole:
        return Whole(root, composite.name)
    root.model = Inside(root.model, composite.name)
    return root
