"""`modules_to_save`: modules that train in full beside an adapter and are saved in its file (PEFT's key of that name)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from ftjax.errors import UserError
from ftjax.methods.walk import describe
from ftjax.models.layers import Embedding
from ftjax.models.param import Spec, specs, variables


def mark_modules_to_save(root: nnx.Module, modules: list[str]) -> None:
    """Make every parameter of these modules trainable (in float32), in place; raises as `paths_to_save`."""
    chosen = paths_to_save(root, modules)
    for path, variable in variables(root):
        if path in chosen:
            train(variable)


def paths_to_save(root: nnx.Module, modules: list[str]) -> set[str]:
    """The parameters of these modules.

    Raises UserError for a name that no module has, or for an embedding that is tied to the output: PEFT would train a
    copy of one side only, and no file format tells its reader so.
    """
    found = specs(root)
    base = {path: spec for path, spec in found.items() if not spec.row.adapter}
    chosen: set[str] = set()
    for module in modules:
        paths = {path for path, spec in base.items() if _is(spec, module)}
        if not paths:
            raise UserError(
                f"method.modules_to_save: no module is named {module!r}; the model has "
                f"{describe(piece.name.rsplit('.', 1)[0] for spec in base.values() for piece in spec.pieces())}"
            )
        chosen |= paths
    tied = getattr(root, "lm_head", True) is None
    embeddings = {
        ".".join(map(str, path)) + ".weight" for path, node in nnx.iter_graph(root) if isinstance(node, Embedding) and tied
    }
    if chosen & embeddings:
        raise UserError(
            "method.modules_to_save: this model ties its input and output embeddings, and an adapter file can only hold one of "
            "them; leave it out, or use method.name: full"
        )
    return chosen


def _is(spec: Spec, module: str) -> bool:
    """PEFT's rule: the name of the parameter's module, or of one around it, ends with what was asked for. So `norm` is
    also every `input_layernorm`."""
    parts = spec.module.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts) + 1))


def train(variable: nnx.Variable) -> None:
    """Mark a parameter as trained. What trains is kept in float32, whatever the base is."""
    value = variable.get_value()
    variable.set_value(type(value)(value.shape, jnp.float32))
    variable.set_metadata("row", dataclasses.replace(variable.row, trainable=True))
