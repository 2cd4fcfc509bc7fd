"""Compares ftjax with transformers: makes a tiny model, loads it in both, and computes logits."""

import copy
import dataclasses
import json
import runpy
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ftjax.config import FullConfig, LoraConfig, MeshConfig
from ftjax.generate.cache import forward
from ftjax.hub.adapter.peft import write_adapter
from ftjax.hub.load import init_params, load_base, open_model
from ftjax.hub.model_folder import from_params, model_tensors, write_folder
from ftjax.mesh import make_mesh
from ftjax.methods import lora, method_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.context import Context
from ftjax.models.nn.paged import PagedCache
from ftjax.models.registry import FAMILIES


@dataclass(frozen=True)
class Case:
    """A tiny configuration of a family.

    Attributes:
        name: shown in the test's name.
        model_type: that of transformers.
        values: fields of its config.json that differ from TINY.
        tensor: the largest `tensor` axis that divides the sizes.
    """

    name: str
    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    tensor: int = 2

    def __str__(self) -> str:
        return self.name


TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


ONE = jax.devices()[:1]  # the devices of most users' machines


def one_device():
    return make_mesh(MeshConfig(), ONE)


def hf_config(case: Case) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[case.model_type](**all_values(case))


def all_values(case: Case) -> dict[str, Any]:
    """Return the values of a case, with those of `TINY` that its family has and it leaves out."""
    from transformers import CONFIG_MAPPING

    values = copy.deepcopy(case.values)  # transformers completes nested values in place
    composite = FAMILIES[case.model_type].composite
    text = values if composite is None else values["text_config"]
    fields = CONFIG_MAPPING[text.get("model_type", case.model_type)]
    known = {field.name for field in dataclasses.fields(fields)}  # GPT-2 has its own names
    text |= {name: value for name, value in TINY.items() if name in known and name not in text}
    return values


def auto_class(config: Any) -> Any:
    """Return the class with which people load a model of this configuration."""
    return AutoModelForImageTextToText if FAMILIES[config.model_type].composite else AutoModelForCausalLM


def load_hf(folder: Path, **options) -> Any:
    """Load a folder with transformers, as people load it."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options)


def make_hf(case: Case, folder: Path, seed: int = 0, **save) -> Any:
    """Make a float32 model of transformers with random weights, and save it to `folder`.

    Vectors get random values too: norms of ones and biases of zeros would hide that they are not read.
    """
    torch.manual_seed(seed)
    config = hf_config(case)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):  # experts have a bias each
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert torch.isfinite(parameter).all(), name
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # the correction bias of a router
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder, **save)
    return model


def folders(cases: Mapping[str, Case], tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a case's name to its folder, which is made on first use."""
    made = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_hf(cases[name], made[name])
        return made[name]

    return of


def paged(model: Model, rows: int, slots: int) -> PagedCache:
    """Return an empty cache in which each row has its own pages of four tokens, the last row the first ones."""
    layout, count = Layout(model.memories), -(-slots // 4)

    def empty():
        return *PagedCache.pages(layout, 1, rows * count + 1, 4, jnp.float32), Cache.empty(layout, rows, 0, jnp.float32).states

    keys, values, states = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(empty))
    table = 1 + np.arange(rows * count, dtype=np.int32).reshape(rows, count)[::-1]
    nothing = np.zeros(rows, np.int32)
    cache = PagedCache(keys, values, states, nothing, layout, table, nothing)
    return jax.device_put(cache, NamedSharding(one_device(), P()))  # as steps return it, so that they are compiled once


def assert_cached_is_uncached(
    model: Model, params: Mapping[str, jax.Array], ids: np.ndarray, portions: Sequence[Sequence[int]], slots: int,
    atol: float = 1e-4, want: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Assert that logits computed through a cache of `slots` equal those of one uncached pass over `ids` `[B, T]`.

    Args:
        portions: for each step, the number of tokens that each row takes; shorter rows are padded.
        want: the logits of an uncached pass, if transformers computed them.
    """

    @jax.jit
    def step(params, ids, counts, cache):
        module = model.bind(params)
        hidden, cache = forward(module, ids, counts, cache, jnp.float32)
        return module.unembed(hidden, context(ids)), cache

    want, longest = logits(model, params, ids) if want is None else want, max(map(max, portions))
    cache, at = paged(model, len(ids), slots), np.zeros(len(ids), np.int32)
    for counts in portions:
        size = longest if max(counts) > 1 else 1
        part = [np.pad(ids[row, at[row] : at[row] + n], (0, size - n), constant_values=95) for row, n in enumerate(counts)]
        got, cache = step(params, np.stack(part), np.asarray(counts, np.int32), cache)
        got = np.asarray(got)
        for row, n in enumerate(counts):
            np.testing.assert_allclose(got[row, :n], want[row, at[row] : at[row] + n], atol=atol, rtol=0)
        at += np.asarray(counts, np.int32)
    assert at.max() == ids.shape[1] and want.std() > 0.05


def load(folder: Path, attach: Callable | None = None, mesh=None, dtype=jnp.float32) -> tuple[Model, dict[str, jax.Array]]:
    """Load a model and its parameters with ftjax; `attach(root)` may add a method."""
    config, source = open_model(folder)
    root = build_module(config)
    if attach:
        attach(root)
    model = Model.of(root, config)
    return model, load_base(model, source, mesh or one_device(), dtype, str(folder))


def adapted(base: Path, folder: Path, method: LoraConfig) -> tuple[Model, dict[str, jax.Array]]:
    """Write an adapter with random weights to a new folder; return the model and its parameters."""
    model, params = load(base, lambda root: lora.attach(root, method))
    params |= init_params({path: spec for path, spec in model.specs.items() if spec.row.adapter}, one_device(), 0)
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():
        value = np.zeros(spec.shape, np.float32)
        for piece in spec.pieces():
            value[piece.index] = rng.normal(size=piece.shape) * 0.3
        params[path] = jax.device_put(value, params[path].sharding)
    folder.mkdir(parents=True)
    write_adapter(folder, model, params, method, str(base))
    return model, params


def attach_full(root) -> None:
    method_of(FullConfig()).attach(root, FullConfig())


def tokens(rows: int, length: int, vocab: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (rows, length)).astype(np.int32)


def context(ids: np.ndarray, segments: np.ndarray | None = None, positions: np.ndarray | None = None, **options) -> Context:
    b, t = ids.shape
    segments = np.ones((b, t), np.int32) if segments is None else segments
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)) if positions is None else positions
    return Context(jnp.asarray(positions), jnp.asarray(segments), **options)


def logits(model: Model, params: dict, ids: np.ndarray, **inputs) -> np.ndarray:
    """Return float32 logits `[B, T, V]`, computed without a cache."""
    ctx = context(ids, **inputs)
    return np.asarray(compiled(model)(params, jnp.asarray(ids), ctx.positions, ctx.segment_ids))


def packed_gradients(folder: Path, mesh=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the loss and the gradients of all weights for packed rows with padding."""
    model, params = load(folder, attach_full, mesh=mesh)
    ids = tokens(4, 24)
    segments = np.array([[1] * 9 + [2] * 13 + [0] * 2, [0] * 3 + [1] * 21, [1] * 24, [0] * 24], np.int32)
    weights = np.random.default_rng(1).normal(size=(4, 24, 96)).astype(np.float32) * (segments != 0)[..., None]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        ctx = context(ids, segments)
        module = model.bind(params)
        return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

    with jax.set_mesh(mesh or one_device()):
        return jax.device_get(loss(params))


def eager_logits(model: Model, params: dict, ids: np.ndarray) -> np.ndarray:
    """Return the same, one operation at a time: for many models of the same shapes, where compiling each would take longer."""
    with jax.disable_jit():
        module, ctx = model.bind(params), context(ids)
        hidden, _, _ = module.hidden(jnp.asarray(ids), ctx)
        return np.asarray(module.unembed(hidden, ctx))


COMPILED: deque[tuple[Any, Callable]] = deque(maxlen=64)


def compiled(model: Model) -> Callable:
    """Return the jitted `(params, ids, positions, segment_ids) -> logits`; models of the same structure share it."""
    buffers = tuple((path, value.dtype.str, value.shape, value.tobytes()) for path, value in model.buffers.items())
    structure = (model.order, buffers, model.treedef, model.graphdef)  # compared, not hashed: Gemma 3's graphdef has a dict
    for known, function in COMPILED:
        if known == structure:
            return function

    def forward(params, ids, positions, segments):
        ctx = Context(positions, segments)
        module = model.bind(params)
        hidden, _, _ = module.hidden(ids, ctx)
        return module.unembed(hidden, ctx)

    function = jax.jit(forward)
    COMPILED.append((structure, function))
    return function


def hf_logits(hf: Any, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
    for module in hf.modules():  # dynamic RoPE remembers the longest text it has seen; calls here are independent
        if hasattr(module, "original_max_seq_len") and hasattr(module, "original_inv_freq"):
            module.inv_freq.copy_(module.original_inv_freq)
            module.max_seq_len_cached = module.original_max_seq_len
        rope_type = getattr(module, "rope_type", None)
        for kind in rope_type if isinstance(rope_type, dict) else ():  # one RoPE for each type of layer
            getattr(module, f"{kind}_inv_freq").copy_(getattr(module, f"{kind}_original_inv_freq"))
            setattr(module, f"{kind}_max_seq_len_cached", module.original_max_seq_len)
    inputs = {"input_ids": torch.tensor(ids).long()}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask).long()
    if positions is not None:
        inputs["position_ids"] = torch.tensor(positions).long()
    with torch.no_grad():
        return hf(**inputs, use_cache=False).logits.numpy()


PEER = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "peft_step.py"


def peer_training(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the script that trains with transformers and PEFT writes; it runs in this process, which has PyTorch loaded."""
    out = folder / "peer.json"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(sys, "argv", [PEER.name, *arguments, "--out", str(out)])
        runpy.run_path(str(PEER), run_name="__main__")
    return json.loads(out.read_text())


def write_merged(folder: Path, model: Model, params: dict, config, source: Path) -> None:
    """Write the model, with its method's update merged, as a float32 Hugging Face folder."""
    write_folder(folder, model, model_tensors(model, from_params(params), params, config, np.float32), "float32", source)
