"""Load the model that a command or a caller names, with the settings of its training run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.generate.named import LoadOptions, Named, find_named
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh


@dataclass(frozen=True)
class Opened:
    """A loaded model, and what it was named by."""

    named: Named
    generator: Generator

    @property
    def chat(self) -> bool | None:
        """Whether a text is rendered with the chat template, as in training; None: if there is one."""
        learnt = self.named.config.data.prompt_format if self.named.config else "auto"
        return {"raw": False, "chat": True}.get(learnt)


def open_named(named: Named, options: LoadOptions, mesh: Mesh | None = None) -> Opened:
    """Load a model that was found. Raises UserError as `Generator` does."""
    keep_compiled_programs()
    generator = Generator(named.model, named.adapter, dtype=options.dtype, mesh=mesh, **named.options(options))
    return Opened(named, generator)


def open_model(given: str, options: LoadOptions, mesh: Mesh | None = None) -> Opened:
    """Find a model (`find_named`) and load it. Raises UserError as `find_named` and `Generator` do."""
    return open_named(find_named(given, adapter=options.adapter), options, mesh)


def mesh_of(sizes: Mapping[str, int]) -> Mesh | None:
    """Return the mesh of these sizes; None, one device, for none.

    Raises UserError for an axis that rows which decode cannot use, and for more devices than there are.
    """
    if not sizes:
        return None
    known = ("data", "fsdp", "expert", "tensor")  # a row that decodes has one token, which `sequence` cannot cut
    if wrong := sorted(set(sizes) - set(known)):
        raise UserError(f"mesh: {wrong[0]}: not an axis that rows which decode can use; choose of {', '.join(known)}")
    count, there = math.prod(sizes.values()), jax.local_devices()
    if count > len(there):
        raise UserError(f"mesh: {count} devices are asked for; there are {len(there)}")
    return make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), there[:count])
