"""Meshes, and sizes that do not divide."""

import jax
import pytest
from jax.sharding import PartitionSpec
from oracle import Case, hf_config

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import describe, make_mesh, sharding, spec
from ftjax.models.facts import complete_config
from ftjax.train.auto_mesh import choose_mesh, state_bytes
from ftjax.train.setup import build, design


@pytest.fixture(scope="module")
def llama():
    return complete_config(hf_config(Case("llama", "llama", {})).to_dict(), "llama")


def test_open_axis_takes_the_rest():
    shape = make_mesh(MeshConfig(data=2, tensor=2)).shape
    assert (shape["data"], shape["fsdp"], shape["tensor"]) == (2, 2, 2)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 4}, {"fsdp": 4, "tensor": 4}])
def test_sizes_that_do_not_use_the_devices(sizes):
    with pytest.raises(UserError, match="8 device"):
        make_mesh(MeshConfig(**sizes))


def test_uneven_size_names_parameter_axis_and_what_works():
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8), jax.devices())
    with pytest.raises(UserError) as error:
        sharding(mesh, "model.layers.block.mlp.up_proj.weight", (5, 172, 64), ("layers", "mlp", "embed"))
    for word in ("up_proj", "'mlp'", "172", "tensor=8", "1, 2, 4"):
        assert word in str(error.value)


def test_two_dimensions_along_one_axis():
    """Whole experts along `expert`; every other weight has its embedding dimension there."""
    assert spec(("experts", "mlp", "embed")) == PartitionSpec(("expert",), ("tensor",), ("fsdp",))
    assert spec(("mlp", "embed")) == PartitionSpec(("tensor",), ("fsdp", "expert"))


@pytest.mark.parametrize("size, cut", [(64, ("tensor", "fsdp", "expert")), (12, ("tensor",))])
def test_wide_sides_of_adapters(size, cut):
    """They are cut over `fsdp` too, where they divide; otherwise as their layers are."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices())
    assert sharding(mesh, "lora_B", (5, size, 4), ("layers", "wide", "rank")).spec == PartitionSpec(None, cut, None)


@pytest.mark.parametrize(
    "training, said, multiple",
    [
        ({"global_batch_size": 12}, "global_batch_size: 12", 8),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "global_batch_size: 4", 16),
        ({"global_batch_size": 16, "gradient_accumulation_steps": 2, "eval_batch_size": 6}, "eval_batch_size: 6", 8),
    ],
)
def test_rows_that_do_not_divide(llama, training, said, multiple):
    config = Config.model_validate({"model": {"path": "x"}, "data": {"train": "x.jsonl"}, "training": training})
    with pytest.raises(UserError, match=f"training.{said} rows .* by the 8 devices .* multiple of {multiple},"):
        design(config, llama, make_mesh(MeshConfig(fsdp=4, data=2), jax.devices()))


def test_slices():
    mesh = make_mesh(MeshConfig(data=2, slices=2))
    assert describe(mesh) == "data=2 x fsdp=4"
    assert [d.id for d in mesh.devices.reshape(2, 4)[0]] == [0, 1, 2, 3], "a slice's devices are together"
    with pytest.raises(UserError, match=r"2 slices .* data=1"):
        make_mesh(MeshConfig(slices=2))


GB = 10**9


@pytest.mark.parametrize(
    "devices, memory, training, length, want",
    [
        (8, 16 * GB, {"global_batch_size": 16}, 128, {"data": 8, "fsdp": 1}),  # fits everywhere: no weight is ever gathered
        (8, 200_000, {"global_batch_size": 16}, 128, {"data": 2, "fsdp": 4}),
        (8, 16 * GB, {"global_batch_size": 2}, 128, {"data": 2, "fsdp": 1, "sequence": 4}),  # too few rows
        (4, 16 * GB, {"global_batch_size": 8, "gradient_accumulation_steps": 8}, 102, {"fsdp": 1, "tensor": 2, "sequence": 2}),
    ],
)  # fmt: skip
def test_auto(llama, devices, memory, training, length, want):
    config = Config.model_validate({
        "model": {"path": "x", "dtype": "float32"}, "data": {"train": "y", "max_length": length}, "training": training,
        "mesh": "auto", "method": {"name": "full"},
    })  # fmt: skip
    chosen, why = choose_mesh(config, build(config, llama)[0], devices, memory)
    sizes = {axis: getattr(chosen, axis) for axis in ("data", "fsdp", "expert", "tensor", "sequence")}
    assert sizes == {axis: 1 for axis in sizes} | want, why
    assert "GB" in why and ("rows of a microbatch over" in why) == (sizes["data"] * sizes["fsdp"] > 1)


def test_auto_finds_nothing(llama):
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"train": "y"}, "mesh": "auto", "training": {"global_batch_size": 3}}
    )
    with pytest.raises(UserError, match=r"16 devices .* 3 rows .* multiple of 16"):
        choose_mesh(config, build(config, llama)[0], 16, GB)


def test_auto_beside_sizes():
    with pytest.raises(ValueError, match=r"mesh.auto chooses .* fsdp"):
        MeshConfig(auto=True, fsdp=4)


@pytest.mark.parametrize(
    "optimizer, bytes_each",
    [
        ({}, 16),  # weight, gradient and two moments in float32
        ({"state_dtype": "bfloat16", "param_dtype": "bfloat16"}, 8),
        ({"offload": True}, 8),
        ({"name": "adafactor"}, 12),  # no matrix of this model is large enough to be factored
    ],
)
def test_auto_counts_what_the_optimizer_holds(llama, optimizer, bytes_each):
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"train": "y"}, "method": {"name": "full"}, "optimizer": optimizer}
    )
    model, _ = build(config, llama)
    weights = sum(spec.size for spec in model.specs.values())
    assert state_bytes(config, model) == pytest.approx(bytes_each * weights, rel=1e-3)


def test_layers_of_all_blocks_are_counted(llama):
    method = {"name": "full", "freeze": ["model.layers.1."]}
    config = Config.model_validate({"model": {"path": "x"}, "data": {"train": "y"}, "method": method})
    model, _ = build(config, llama)
    assert model.layers == llama["num_hidden_layers"] > max(spec.stacked[0] for spec in model.specs.values() if spec.stacked)
