"""Tests that rows reach the devices of their experts, however uneven the routing is, and by which collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Case, attach_full, context, load, make_hf, one_device, tokens
from tiny_run import make_config

from ftjax.config import MeshConfig
from ftjax.mesh import make_mesh
from ftjax.models.nn import exchange
from ftjax.plan.plan import make_plan
from ftjax.plan.topology import parse

MESH = {"data": 2, "fsdp": 1, "expert": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    make_hf(Case("mixtral", "mixtral", {"num_local_experts": 8, "num_hidden_layers": 2, "intermediate_size": 96}), folder)
    return folder


def gradient(folder, ids, mesh, push: float):
    """Return the gradients of all weights; `push` is added to the logits of the first two experts' rows of the routers."""
    model, params = load(folder, attach_full, mesh=mesh)
    path = next(path for path in params if path.endswith(".gate.weight"))
    router = np.array(params[path])
    router[:, 2:] *= 1 - push
    params[path] = jax.device_put(router, params[path].sharding)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, 96)).astype(np.float32)

    def loss(params):
        ctx = context(ids)
        module = model.bind(params)
        return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss))(params)
    return {path: np.asarray(found[path]) for path in model.trainable}


@pytest.mark.parametrize("push", [0.0, 1.0], ids=["even", "most tokens to one device"])
def test_any_routing(folder, push, monkeypatch):
    """Gradients are those of one device; with `push` the other experts' logits are equal, so that few tokens go there."""
    ids = tokens(8, 10)
    want = gradient(folder, ids, one_device(), push)
    rounds = []
    original = exchange._further

    def spy(run, capacity, trained, x, y, frozen, queues, needed):
        jax.debug.callback(lambda n: rounds.append(int(n)), needed)
        return original(run, capacity, trained, x, y, frozen, queues, needed)

    monkeypatch.setattr(exchange, "_further", spy)
    got = gradient(folder, ids, make_mesh(MeshConfig(**MESH)), push)
    jax.effects_barrier()
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=1e-4 * np.abs(value).max(), rtol=0, err_msg=path)
    assert max(rounds) > 1, "rows waited for a second round"


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_collectives(folder, kind):
    """Rows travel by all-to-all along `expert`, forward, recomputed and backward, and no weight of experts is gathered."""
    method = {"name": "lora", "r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = make_config(folder, method=method, mesh=MESH)
    config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": kind, "remat": "full"})})
    plan = make_plan(config, parse("cpu:8"))
    along = {row.kind: row for row in plan.traffic if row.axes == ("expert",)}
    assert along["all-to-all"].runs >= 2 * 2 * 2, "two layers, there and back, forward and backward"
    of_experts = 2 * 96 * 32 * 3 * 4 / (8 if kind else 1)  # of a device
    gathers = [row for row in plan.traffic if row.kind == "all-gather"]
    assert max(row.ici_bytes / row.runs for row in gathers) < of_experts
