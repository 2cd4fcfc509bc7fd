"""Biases of the base model that train beside LoRA (`bias: all | lora_only`, PEFT's `mark_only_adapters_as_trainable`)."""

from collections.abc import Set

from flax import nnx

from ftjax.models.nn.param import specs


def trained_biases(root: nnx.Module, kind: str, adapted: Set[str]) -> set[str]:
    """Return the Hugging Face names of the trained biases: all of the model's, or (`lora_only`) those of adapted modules.

    Args:
        adapted: names of the modules with an update.
    """
    names = {
        piece.name
        for spec in specs(root).values()
        if not spec.row.adapter and spec.row.name.rpartition(".")[2] == "bias"
        for piece in spec.pieces()
    }
    return names if kind == "all" else {name for name in names if name.removesuffix(".bias") in adapted}
