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


def gradients(folder, ids, mesh, shares) -> list[dict[str, np.ndarray]]:
    """Return the gradients of all weights, once for each share that is left of the logits of all experts but two."""
    model, params = load(folder, attach_full, mesh=mesh)
    path = next(path for path in params if path.endswith(".gate.weight"))
    weights = np.random.default_rng(1).normal(size=(*ids.shape, 96)).astype(np.float32)

    def loss(params):
        ctx = context(ids)
        module = model.bind(params)
        return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

    differentiate, found = jax.jit(jax.grad(loss)), []
    for share in shares:
        router = np.array(params[path])
        router[:, 2:] *= share
        with jax.set_mesh(mesh):
            found.append(differentiate({**params, path: jax.device_put(router, params[path].sharding)}))
    return [{path: np.asarray(one[path]) for path in model.trainable} for one in found]


def test_any_routing(folder, monkeypatch):
    """Gradients are those of one device, also where the other experts' logits are equal, so that few tokens go there."""
    ids, shares = tokens(8, 10), (1.0, 0.0)
    want = gradients(folder, ids, one_device(), shares)
    rounds = []
    original = exchange._further

    def spy(run, capacity, trained, x, y, frozen, queues, needed):
        jax.debug.callback(lambda n: rounds.append(int(n)), needed)
        return original(run, capacity, trained, x, y, frozen, queues, needed)

    monkeypatch.setattr(exchange, "_further", spy)
    got = gradients(folder, ids, make_mesh(MeshConfig(**MESH)), shares)
    jax.effects_barrier()
    for one, other in zip(got, want, strict=True):
        for path, value in other.items():
            np.testing.assert_allclose(one[path], value, atol=1e-4 * np.abs(value).max(), rtol=0, err_msg=path)
    assert max(rounds) > 1, "rows waited for a second round"


@pytest.mark.parametrize("kind", [None, pytest.param("nf4", marks=pytest.mark.sweep)])
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
