"""LoRA on an embedding: `y = W[t] + scale * B A[:, t]` (Hu et al. 2021, arXiv:2106.09685, eq. 3, with a one-hot input).

A `[r, V]` starts at zero and B `[E, r]` normal, the reverse of dense layers, and there is no dropout, as in PEFT: the product
starts at zero, and the first gradient reaches the rows of the tokens in the batch.

If the output is tied to the embedding, the update applies to both (PEFT's `ensure_weight_tying`): logits are `(W + scale * (B
A)^T) x`. PEFT's file has it a second time, as the update of an output projection with A and B exchanged.

Legend: B batch, T query length, E embed, V vocab, R rank.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ftjax.methods.walk import Site
from ftjax.models.model import Model
from ftjax.models.nn.context import is_virtual
from ftjax.models.nn.layers import project
from ftjax.models.nn.lookup import rows_of
from ftjax.models.nn.param import Buffer, Init, Row, param


class LoraEmbedding(nnx.Module):
    """A frozen Embedding plus its low-rank update."""

    def __init__(self, site: Site, rank: int, scale: float):
        self.base = site.layer
        (vocab, embed), (axis_vocab, axis_embed) = self.base.weight.get_value().shape, self.base.weight.row.axes
        row = {"trainable": True, "adapter": True}
        self.lora_embedding_A = param((rank, vocab), ("rank", axis_vocab), "lora_embedding_A", init=Init("zeros"), **row)
        self.lora_embedding_B = param((embed, rank), (axis_embed, "rank"), "lora_embedding_B", init=Init("normal", 1.0), **row)
        self.scale = Buffer(np.full(rank, scale, np.float32), row=Row(("rank",), "scale"))

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return self.base

    def __call__(self, tokens: Shaped[Array, "B T ..."], dtype) -> Float[Array, "B T E"]:
        """Look up ids, or pass embeddings of virtual tokens through."""
        rows = self.base(tokens, dtype)
        if is_virtual(tokens):
            return rows
        axes = self.lora_embedding_A.row.axes[::-1]
        low = rows_of(self.lora_embedding_A[...].T, axes, tokens, jnp.float32) * self.scale[...]
        return rows + project(low.astype(dtype), self.lora_embedding_B[...])

    def attend(self, x: Float[Array, "*of E"]) -> Float[Array, "*of V"]:
        """Compute logits, if the output is tied."""
        low = project(x, self.lora_embedding_B[...], conv1d=True) * self.scale[...].astype(x.dtype)
        return self.base.attend(x) + project(low, self.lora_embedding_A[...], conv1d=True)


def output_copies(model: Model) -> dict[str, str]:
    """Map the name of each tensor that PEFT's file has of a tied update for the output to the path of the parameter whose
    transpose it is."""
    layer = model.output
    if f"{layer}.lora_embedding_A" not in model.specs:
        return {}
    heads = [name.removesuffix(".weight") for name in model.ignored if name.endswith(("lm_head.weight", "embed_out.weight"))]
    return {
        f"base_model.model.{head}.{name}.weight": f"{layer}.lora_embedding_{other}"
        for head in heads
        for name, other in (("lora_A", "B"), ("lora_B", "A"))
    }
