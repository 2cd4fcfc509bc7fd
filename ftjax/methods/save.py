"""`modules_to_save`: modules that train in full beside an adapter and are saved in its file (PEFT's key of that name)."""

import dataclasses
from collections.abc import Sequence, Set

import jax.numpy as jnp
from flax import nnx

from ftjax.errors import UserError
from ftjax.methods.tied import tied_names
from ftjax.methods.walk import describe
from ftjax.models.nn.param import specs, variables


def names_to_save(root: nnx.Module, modules: Sequence[str], *, both: bool = False) -> set[str]:
    """Return the Hugging Face names of the parameters of these modules.

    Args:
        both: an embedding that is tied to the output may train, on both sides.

    Raises UserError for such an embedding otherwise: PEFT would train a copy of one side only.
    """
    chosen = {name for name in _names(root) if any(_is(name, module) for module in modules)}
    tied = tied_names(root)
    if tied and f"{tied[0]}.weight" in chosen and not both:
        raise UserError(
            "method.modules_to_save: this model ties its input and output embeddings, and PEFT would train one of them alone; "
            "for LoRA set method.ensure_weight_tying: true, which trains both as one, or else use method.name: full"
        )
    return chosen


def refuse_missing(root: nnx.Module, modules: Sequence[str]) -> None:
    """Raise UserError for names that no module has."""
    names = _names(root)
    if missing := [module for module in modules if not any(_is(name, module) for name in names)]:
        raise UserError(
            f"method.modules_to_save: no module is named {', '.join(map(repr, missing))}; the model has "
            f"{describe(name.rsplit('.', 1)[0] for name in names)}"
        )


def _names(root: nnx.Module) -> list[str]:
    base = (spec for spec in specs(root).values() if not (spec.row.adapter or spec.row.constant))
    return [piece.name for spec in base for piece in spec.pieces()]


def _is(name: str, module: str) -> bool:
    """Match by PEFT's rule: the name of the parameter's module, or of one that contains it, ends with `module`. So `norm` also
    matches every `input_layernorm`."""
    parts = name.split(".")[:-1]
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts) + 1))


def train_names(root: nnx.Module, chosen: Set[str]) -> None:
    """Mark the parameters of these names as trained, in place; stacks must be split before, so that each trains as a whole."""
    found = specs(root)
    paths = {p for p, spec in found.items() if not spec.row.adapter and all(piece.name in chosen for piece in spec.pieces())}
    for path, variable in variables(root):
        if path in paths:
            train(variable)


def train(variable: nnx.Variable) -> None:
    """Mark a parameter as trained. Trained parameters are float32, whatever the dtype of the base."""
    value = variable.get_value()
    variable.set_value(type(value)(value.shape, jnp.float32))
    variable.set_metadata("row", dataclasses.replace(variable.row, trainable=True))
