"""The reference model: the model as it was before training, which some objectives compare with.

An adapter that starts as zero is left out: the reference is then the base model, in the frozen arrays that the run holds
anyway. Everything else that trains (biases, whole modules, all weights in full fine-tuning, an adapter that is trained further)
is copied before the first update.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.methods.walk import remove_adapters
from ftjax.models.model import Model
from ftjax.models.nn.param import Spec, variables

PREFIX = "reference."  # of the path of a copy, among the frozen parameters


@dataclass(frozen=True)
class Reference:
    """A reference model, and where its parameters are.

    Attributes:
        model: without the method's parameters, unless they are copied.
        held: maps each of its parameters to a path among the run's frozen ones.
        copied: maps the path of each copy to the trained parameter whose initial value it is.
    """

    model: Model
    held: Mapping[str, str]
    copied: Mapping[str, str]

    def params(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reference's parameters, arrays or quantised, from the frozen ones of the run."""
        return {path: frozen[held] for path, held in self.held.items()}

    def initial(
        self, params: Mapping[str, Float[Array, "..."]], frozen: Mapping[str, Any], model: Model, dtype: Any
    ) -> dict[str, Any]:
        """Return the reference's parameters before training, when the trained ones need no copy; for use inside jit."""
        specs = self.copy_specs(model, dtype)
        return {
            path: params[self.copied[held]].astype(specs[held].dtype) if held in self.copied else frozen[held]
            for path, held in self.held.items()
        }

    def copy_specs(self, model: Model, dtype: Any) -> dict[str, Spec]:
        """Return the specs of the copies by path.

        Args:
            model: the model that trains.
            dtype: dtype of frozen weights.
        """
        specs = {path: model.specs[trained] for path, trained in self.copied.items()}
        return {path: spec if spec.row.adapter else spec.astype(dtype) for path, spec in specs.items()}

    def copies(self, model: Model, params: Mapping[str, Float[Array, "..."]], dtype: Any) -> dict[str, Float[Array, "..."]]:
        """Copy parameters as they are now; see `copy_specs`."""
        specs = self.copy_specs(model, dtype)
        return {path: jnp.copy(params[self.copied[path]]).astype(spec.dtype) for path, spec in specs.items()}


def make_reference(root: nnx.Module, model: Model, *, keep_adapter: bool) -> Reference:
    """Build the reference of a model.

    Args:
        root: the model's abstract module; modified in place.
        keep_adapter: the run starts from a trained adapter, which is then part of the reference.
    """
    paths = {id(variable): path for path, variable in variables(root)}
    if not keep_adapter:
        remove_adapters(root)
    reference = Model.of(root, model.config)
    own = {path: paths[id(variable)] for path, variable in variables(root) if path in reference.specs}
    copied = {f"{PREFIX}{path}": path for path in own.values() if path in model.trainable}
    held = {path: f"{PREFIX}{before}" if before in model.trainable else before for path, before in own.items()}
    return Reference(reference, held, copied)


class MovingReference:
    """Moves the copies of a reference model towards the model every `steps` updates (TR-DPO, Gorbatovski et al. 2024,
    arXiv:2404.09656)."""

    def __init__(self, reference: Reference, steps: int, share: float):
        """Args: share: of the model in a new reference, at most 1."""
        self._copied, self._steps = reference.copied, steps

        def move(copies: dict[str, jax.Array], params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            def mix(path: str, before: jax.Array) -> jax.Array:
                now = params[self._copied[path]].astype(jnp.float32)
                return (share * now + (1 - share) * before.astype(jnp.float32)).astype(before.dtype)

            return {path: mix(path, before) for path, before in copies.items()}

        self._move = jax.jit(move, donate_argnums=0)

    def copies(self, frozen: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
        """Return the reference's own arrays, which a checkpoint has to hold."""
        return {path: frozen[path] for path in self._copied}

    def shapes(self, frozen: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and shardings of `copies`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.copies(frozen))

    def after(self, step: int, params: Mapping[str, Float[Array, "..."]], frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the frozen arrays after update `step`. Donates the copies if they move."""
        if step % self._steps:
            return dict(frozen)
        return {**frozen, **self._move(self.copies(frozen), params)}
