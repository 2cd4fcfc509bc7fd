"""Tests that one update is the same however it is split (T1), on every mesh, and as in PyTorch + PEFT."""

import numpy as np
import pytest
from cases import FEW
from oracle import ONE, Case, hf_config, make_hf, one_device, peer_training
from processes import ALL
from tiny_run import make_batch, make_config, run_steps

from ftjax.train.setup import prepare

METHODS = {"lora": {"name": "lora", "r": 4, "lora_alpha": 8}, "full": {"name": "full"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_hf(Case("llama", "llama", {"tie_word_embeddings": True, "intermediate_size": 64}), folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_any_split_is_the_same(folder, method):
    """Loss, gradient norm and weights after two updates, for one, two and eight microbatches; a row of padding included.

    Epsilon is large, so that an update depends smoothly on the gradient: if a gradient is almost zero, Adam's first steps turn
    its rounding errors into changes of the size of the learning rate.
    """
    batches = [make_batch(8, 32, 96, seed) for seed in (0, 1)]
    want = None
    for microbatches in (1, 2, 8):
        config = make_config(folder, method=METHODS[method], optimizer={"adam_epsilon": 1e-3})
        metrics, params = run_steps(prepare(config, ONE), batches, microbatches)
        got = [float(value) for out in metrics for value in (out.loss, out.weight, out.grad_norm)]
        want = want or (got, params)
        np.testing.assert_allclose(got, want[0], rtol=1e-5)
        for path, value in params.items():
            np.testing.assert_allclose(value, want[1][path], atol=2e-5, err_msg=path)


MESHES = [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
MORE_MESHES = [{"data": 8, "fsdp": 1}, {"fsdp": 4, "tensor": 2}]
SEQUENCE = {"fsdp": 2, "tensor": 2, "sequence": 2}  # with a kernel, for which heads and tokens are exchanged


@pytest.fixture(scope="module", params=METHODS)
def alone(request, folder):
    """A method, batches, and their losses and the norms of their gradients on one device."""
    batches = [make_batch(8, 32, 96, seed) for seed in range(5)]
    metrics, _ = run_steps(prepare(make_config(folder, method=METHODS[request.param]), ONE), batches)
    return METHODS[request.param], batches, [(m.loss, m.grad_norm) for m in metrics]


@pytest.mark.parametrize(
    "mesh", [*MESHES, *MORE_MESHES * ALL, SEQUENCE], ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items())
)
def test_every_mesh_is_one_device(folder, alone, mesh):
    """Five losses agree within 1e-5 relative, and so do gradients (AdamW would hide a factor)."""
    method, batches, want = alone
    config = make_config(folder, method=method, mesh=mesh)
    if mesh is SEQUENCE:
        config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "blockwise"})})
    sharded, _ = run_steps(prepare(config), batches)
    np.testing.assert_allclose([(m.loss, m.grad_norm) for m in sharded], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "halves"),
    [(SEQUENCE, False), ({"data": 2, "fsdp": 4}, True), *[({"data": 2, "fsdp": 4}, False)] * ALL],
    ids=["tensor, sequence", "fsdp, by halves", *["fsdp"] * ALL],
)
def test_feed_forward_layers_in_parts(folder, alone, monkeypatch, mesh, halves):
    """With remat and sharded weights, hidden activations exist for a few tokens at a time, or for few hidden units where
    weights train (and no two devices share a row). Gradients may be reduced by halves, which only TPUs ask for."""
    from ftjax.models.llama import LlamaMLP
    from ftjax.models.nn import chunks, gathered

    shapes, at_once = set(), LlamaMLP.all_at_once

    def watched(self, x, ctx):
        gate = self.gate_proj.base if method["name"] == "lora" else self.gate_proj
        shapes.add((x.shape[1], gate.weight.shape[0]))
        return at_once(self, x, ctx)

    monkeypatch.setattr(LlamaMLP, "all_at_once", watched)
    monkeypatch.setattr(chunks, "CHUNK", 16 if mesh is SEQUENCE else 8)
    monkeypatch.setattr(chunks, "HIDDEN", 20)
    method, batches, want = alone
    monkeypatch.setattr(gathered, "_by_halves", lambda *_: halves)
    config = make_config(folder, method=method, mesh=mesh)
    config = config.model_copy(update={"model": config.model.model_copy(update={"remat": "full"})})
    found, _ = run_steps(prepare(config), batches)
    if method["name"] == "lora":
        assert shapes == {(32 // 4, 64)}  # 8 rows of 32 tokens, on 2 x 2 or 8 devices
    else:
        assert shapes == {(32, 64 if mesh is SEQUENCE else 16)}
    np.testing.assert_allclose([(m.loss, m.grad_norm) for m in found], want, rtol=1e-5)


def test_masters_are_cast_for_all_layers_at_once(folder):
    """Weights in float32, products in bfloat16: what is sharded learns as on one device, and stays in float32."""
    batches = [make_batch(8, 32, 96, seed) for seed in range(3)]
    found = []
    for mesh, devices in (({"data": 2, "fsdp": 4}, None), ({"fsdp": 1}, ONE)):
        config = make_config(folder, method=METHODS["full"], mesh=mesh)
        model = config.model.model_copy(update={"remat": "full", "compute_dtype": "bfloat16"})
        metrics, params = run_steps(prepare(config.model_copy(update={"model": model}), devices), batches)
        assert {str(value.dtype) for value in params.values()} == {"float32"}
        found.append([(m.loss, m.grad_norm) for m in metrics])
    np.testing.assert_allclose(*found, rtol=1e-2)


def step_with(folder, remat: str):
    """Return the metrics of one update of all weights, and the weights after it."""
    config = make_config(folder, method=METHODS["full"])
    config = config.model_copy(update={"model": config.model.model_copy(update={"remat": remat})})
    return run_steps(prepare(config, ONE), [make_batch(8, 32, 96)])


def test_remat_changes_memory_only(folder):
    plain, params = step_with(folder, "none")
    for remat in ("dots", "attention", "full", "offload"):
        other, other_params = step_with(folder, remat)
        np.testing.assert_allclose(other[0].grad_norm, plain[0].grad_norm, rtol=1e-5, err_msg=remat)
        for path, value in params.items():
            np.testing.assert_allclose(other_params[path], value, atol=2e-5, err_msg=f"{remat} {path}")


def test_remat_keeps_less(folder):
    """In the order in which `auto` tries them; attention's output is what `attention` keeps beside a layer's input."""

    from ftjax.train.remat import saved_bytes

    setup = prepare(make_config(folder), ONE)
    policies = ("none", "dots", "attention", "full")
    parts = setup.model.trainable, setup.model.frozen
    kept = [saved_bytes(setup.loss_fn, setup.runtime, *parts, policy, (2, 32)) for policy in policies]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    facts = setup.model.config
    heads, layers = facts["num_attention_heads"], facts["num_hidden_layers"]
    assert kept[2] - kept[3] == 4 * 2 * 32 * layers * (heads * facts["head_dim"] + heads)  # and its log-sum-exp


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_bound_of_what_is_kept(case):
    """`auto` need not trace the loss where this bound fits."""
    from ftjax.models.facts import complete_config
    from ftjax.train.remat import most_bytes, saved_bytes
    from ftjax.train.setup import design

    facts = complete_config(hf_config(case).to_dict(), "here")
    for method in METHODS.values():
        made = design(make_config("none", method=method), facts, one_device())
        parts = made.model.trainable, made.frozen_specs
        kept = saved_bytes(made.loss_fn, made.runtime, *parts, "dots", (2, 32))
        bound = most_bytes([spec for part in parts for spec in part.values()], 2 * 32)
        assert kept <= bound, method


SAVING = [
    {"state_dtype": "int8"}, {"offload": True}, {"param_dtype": "bfloat16", "state_dtype": "bfloat16"}, {"name": "adafactor"},
]  # fmt: skip


MESH = {"fsdp": 4, "tensor": 2}
FAST = {"learning_rate": 3e-3, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def plain_adamw(folder):
    """Return the metrics of AdamW in float32."""
    batches = [make_batch(8, 32, 96)] * 12
    return run_steps(prepare(make_config(folder, method=METHODS["full"], optimizer=FAST, mesh=MESH)), batches)[0]


@pytest.mark.parametrize("options", SAVING if ALL else SAVING[:2], ids=lambda o: "-".join(map(str, o.values())))
def test_optimizers_that_save_memory(folder, options, plain_adamw):
    """Sharded, they learn like AdamW in float32; the state has the intended sharding and memory."""
    import jax
    import jax.numpy as jnp

    from ftjax.train.setup import new_state

    batches, want = [make_batch(8, 32, 96)] * len(plain_adamw), plain_adamw
    setup = prepare(make_config(folder, method=METHODS["full"], optimizer={**FAST, **options}, mesh=MESH))
    got, _ = run_steps(setup, batches)
    fall = float(want[0].loss - want[-1].loss)
    assert fall > 0.5 and all(m.good for m in got)
    np.testing.assert_allclose(got[0].loss, want[0].loss, rtol=3e-3 if "param_dtype" in options else 1e-5)
    if options == {"offload": True}:
        np.testing.assert_allclose([m.loss for m in got], [m.loss for m in want], rtol=1e-6)
    else:
        assert float(got[0].loss - got[-1].loss) > 0.85 * fall

    from ftjax.train.setup import compile_steps

    state = new_state(setup, compile_steps(setup, 1)[2])
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    kinds = {leaf.sharding.memory_kind for leaf in arrays}
    assert (kinds == {"pinned_host"}) == options.get("offload", False)
    size = sum(leaf.nbytes for leaf in arrays) / sum(leaf.size for leaf in state.params.values())
    limit = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.6}[options.get("state_dtype", "float32")]
    assert size <= (4.1 if options.get("name") else limit)
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype(options.get("param_dtype", "float32"))}


def test_bad_update_is_not_applied(folder):
    """A loss that is not finite, or over the limit, leaves the state as it was (T21)."""
    import jax
    import jax.numpy as jnp

    from ftjax.train.setup import compile_steps
    from ftjax.train.step import init_state

    setup = prepare(make_config(folder), ONE)
    step, _, optimizer, _ = compile_steps(setup, 10)
    batch = {name: jnp.asarray(rows[None]) for name, rows in make_batch(8, 32, 96).items()}
    for poison, limit in (({"weights": jnp.full((1, 8, 32), jnp.nan)}, np.inf), ({}, 1e-3)):
        state = init_state({path: leaf.copy() for path, leaf in setup.params.items()}, optimizer)
        state, metrics = step(state, setup.frozen, {**batch, **poison}, jax.random.key(0), jnp.float32(limit))
        assert not metrics.good and int(state.step) == 0
        for path, leaf in state.params.items():
            np.testing.assert_array_equal(leaf, setup.params[path])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_frozen_gets_no_gradient(folder):
    """Optimizer state exists for the adapter alone, and the compiled step has no room for the base model's gradients."""
    import jax

    from ftjax.train.setup import compile_steps
    from ftjax.train.step import init_state

    setup = prepare(make_config(folder), ONE)
    _, _, optimizer, _ = compile_steps(setup, 10)
    state = init_state(setup.params, optimizer)
    trained = sum(leaf.size for leaf in setup.params.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * trained
    assert not set(setup.params) & set(setup.frozen)


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_of_the_peer(trained_llama, method, tmp_path):
    """transformers + PEFT, from the same weights on the same batches: losses within 1e-4."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 512, (10, 4, 48))
    labels = np.where(rng.random(ids.shape) < 0.6, ids, -100)
    np.savez(tmp_path / "batches.npz", input_ids=ids, labels=labels)
    config = make_config(trained_llama, method=METHODS[method], optimizer={"learning_rate": 1e-3}, global_batch_size=4)
    setup = prepare(config, ONE)
    arguments = ["--method", "full"]
    if method == "lora":
        from ftjax.hub.adapter.peft import write_adapter

        (tmp_path / "adapter").mkdir()
        write_adapter(tmp_path / "adapter", setup.model, setup.params, config.method, str(trained_llama))
        arguments = ["--adapter", str(tmp_path / "adapter")]
    files = ["--model", str(trained_llama), "--batches", str(tmp_path / "batches.npz")]
    want = peer_training(tmp_path, *files, *arguments, "--lr", "1e-3")
    ones = np.ones((4, 48), np.int32)
    batches = []
    for step in range(10):
        shifted = np.concatenate([labels[step][:, 1:], np.full((4, 1), -100)], axis=1)
        batches.append({
            "tokens": ids[step].astype(np.int32), "targets": np.maximum(shifted, 0).astype(np.int32),
            "weights": (shifted >= 0).astype(np.float32), "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(48, dtype=np.int32), (4, 48)),
        })  # fmt: skip
    metrics, _ = run_steps(setup, batches)
    np.testing.assert_allclose([float(m.loss) for m in metrics], want["loss"], atol=1e-4)
    assert want["loss"][-1] < want["loss"][0] - 0.01, "nothing was learned, so nothing was compared"
    assert sum(spec.size for spec in setup.model.trainable.values()) == want["trained"]
