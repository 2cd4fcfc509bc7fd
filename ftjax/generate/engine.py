"""`Engine`: the compiled programs of one model on one mesh."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax.config import MeshConfig
from ftjax.generate.answer import Answer
from ftjax.generate.decode import Runner, State
from ftjax.generate.embed import Pooling, embed_step
from ftjax.generate.score import head_step, score_step
from ftjax.generate.steps import Sizes, Steps
from ftjax.mesh import fitting, make_mesh, parts, spec
from ftjax.models.model import Model
from ftjax.models.nn.attention_paged import PageKernel
from ftjax.models.nn.cache import Layout

SHARDED = ("vocab", "heads", "kv_heads", "mlp")  # dimensions of weights along `tensor`


def decoding_mesh(model: Model, devices: Sequence[Any]) -> Mesh:
    """Return a mesh to decode on: as many devices along `tensor` as the model's heads allow, and the others along `data`. Each
    token needs all weights, which are better read in parts than gathered."""
    sizes = {one.shape[at] for one in model.specs.values() for at, axis in enumerate(one.row.axes) if axis in SHARDED}
    heads = {one.kv_heads for one in Layout(model.memories).keys_values if one.kv_heads > 1}  # a single one is everywhere
    tensor = math.gcd(len(devices), model.sizes.heads, *heads, *sizes)
    return make_mesh(MeshConfig(tensor=tensor, data=len(devices) // tensor, fsdp=1), devices)


class Programs(NamedTuple):
    """The functions of `Steps` for arrays of certain sizes, compiled on first use; they take the state over."""

    empty: Callable
    prefill: Callable
    decode: Callable
    clear: Callable


def has_kernel(mesh: Mesh) -> bool:
    """Return whether there is a kernel for these devices that reads pages."""
    return _platform(mesh) == "tpu"


def on_one_cpu(mesh: Mesh) -> bool:
    """Return whether the mesh is a single CPU device."""
    return mesh.size == 1 and _platform(mesh) == "cpu"


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


class Engine:
    """Compiled programs of a model, one per shape."""

    def __init__(self, model: Model, mesh: Mesh, dtype: Any, of_sampler: bool = False):
        """Args: of_sampler: log-probabilities are those that tokens were drawn with, not the model's own."""
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.kernel = PageKernel(mesh) if has_kernel(mesh) else None
        self.on_one_cpu = on_one_cpu(mesh)
        self.shards = parts(mesh.shape, "batch")
        heads = model.sizes.heads
        self.heads = heads // parts(mesh.shape, "heads") if fitting(mesh, "heads", heads) else heads  # of each device
        self._runner = runner = Runner(model, dtype, of_sampler)
        self._programs: dict[Sizes, Programs] = {}
        self._score = jax.jit(
            partial(score_step, runner), static_argnames="temperature", out_shardings=NamedSharding(mesh, spec(()))
        )
        self._embed = jax.jit(
            partial(embed_step, runner), static_argnames="pooling", out_shardings=NamedSharding(mesh, spec(()))
        )
        self._head = jax.jit(partial(head_step, runner), out_shardings=NamedSharding(mesh, spec(())))
        self.whole_prompts = any(rope.by_length for rope in model.ropes)  # RoPE needs the full length
        self.keeps_prefixes = not (self.whole_prompts or Layout(model.memories).states)  # states cannot be rewound
        self.switch = min((rope.recomputed_at for rope in model.ropes if rope.recomputed_at), default=None)

    def programs(self, sizes: Sizes) -> Programs:
        """Return the programs for arrays of these sizes, the same ones each time."""
        if sizes not in self._programs:
            steps = self._steps(sizes)
            where, everywhere = steps.shardings(self.mesh), NamedSharding(self.mesh, spec(()))
            self._programs[sizes] = Programs(
                jax.jit(steps.empty, out_shardings=where),
                jax.jit(steps.prefill, donate_argnums=1, out_shardings=(where, everywhere, everywhere, everywhere)),
                jax.jit(steps.decode, donate_argnums=1, out_shardings=(where, everywhere)),
                jax.jit(steps.clear, donate_argnums=0, out_shardings=where),
            )
        return self._programs[sizes]

    def _steps(self, sizes: Sizes) -> Steps:
        return Steps(self._runner, sizes, self.whole_prompts, self.kernel)

    @property
    def attention(self) -> str:
        """How attention reads keys and values in the programs that have been made so far, in words."""
        if self.on_one_cpu:
            return "pages are read block by block, as far as the longest text goes"
        if self.kernel is None:
            return f"pages are gathered: the kernel that reads them in place is for TPUs, and this is a {_platform(self.mesh)}"
        but = f", but they are gathered in layers with {'; '.join(self.kernel.reasons)}" if self.kernel.reasons else ""
        return f"a kernel reads pages in place{but}"

    def abstract_state(self, sizes: Sizes) -> State:
        """Return the state for arrays of these sizes, as shapes with shardings."""
        steps = self._steps(sizes)
        shape = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(shape, jax.eval_shape(steps.empty), steps.shardings(self.mesh))

    def score(
        self, params: Mapping[str, jax.Array], *batch: np.ndarray, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run `score_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            logprobs, best = self._score(params, *map(self.shard_rows, batch), temperature=temperature)
        return np.asarray(logprobs), np.asarray(best)

    def head(self, params: Mapping[str, jax.Array], *batch: np.ndarray) -> np.ndarray:
        """Run `head_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._head(params, *map(self.shard_rows, batch)))

    def embed(self, params: Mapping[str, jax.Array], *batch: np.ndarray, pooling: Pooling) -> np.ndarray:
        """Run `embed_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._embed(params, *map(self.shard_rows, batch), pooling=pooling))

    def steps_to_switch(self, answer: Answer) -> float:
        """Return the number of tokens until LongRoPE switches frequencies, so that cached keys become invalid; 0 means now."""
        if self.switch is None or len(answer.prompt) > self.switch:
            return math.inf
        left = self.switch + 1 - len(answer.prompt) - len(answer.tokens)
        return left if left >= 0 else math.inf

    # ---- host arrays to devices ----

    def shard_rows(self, rows: np.ndarray) -> jax.Array:
        """Place an array on the devices, sharded along its first axis, the batch."""
        where = NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])

    def replicate(self, value: np.ndarray) -> jax.Array:
        """Place an array on the devices, replicated."""
        where = NamedSharding(self.mesh, spec(()))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])
