"""Tests meshes, and sizes that the axes do not divide."""

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from oracle import Case, hf_config

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import AXES, describe, make_mesh, sharding, spec
from ftjax.models.facts import complete_config
from ftjax.placement import ORDER, arrange
from ftjax.train.auto_mesh import choose_mesh, state_bytes
from ftjax.train.remat import device_memory
from ftjax.train.setup import build, design, mesh_of


@pytest.fixture(scope="module")
def llama():
    return complete_config(hf_config(Case("llama", "llama", {})).to_dict(), "llama")


def test_open_axis_takes_the_rest():
    shape = make_mesh(MeshConfig(data=2, tensor=2)).shape
    assert (shape["data"], shape["fsdp"], shape["tensor"]) == (2, 2, 2)


@pytest.mark.parametrize(
    "sizes, said",
    [
        (
            {"data": 3},
            r"data=3 x fsdp=-1 .* fsdp takes what the other axes leave, and their 3 .* made: data=4 x fsdp=2, or data=2",
        ),
        ({"fsdp": 4}, r"fsdp=4 does not .* set one axis to -1 .* made: data=2 x fsdp=4, or fsdp=8,"),
        ({"fsdp": 4, "tensor": 4}, r"fsdp=4 x tensor=4 does not .* made: fsdp=2 x tensor=4,"),
        ({"fsdp": 1, "tensor": -1, "data": 16}, r"data=16 x tensor=-1 .* made: data=8,"),
        ({"data": 3, "slices": 2}, r"made: data=4 x fsdp=2, or data=2 x fsdp=4, or data=8"),
    ],
)
def test_sizes_that_do_not_use_the_devices(sizes, said):
    with pytest.raises(UserError, match=r"^mesh: .* 8 device\(s\) exactly") as error:
        make_mesh(MeshConfig(**sizes))
    assert re.search(said, str(error.value)), error.value


def test_some_of_the_devices():
    """Of any place; and the memory that counts is what those that are used share."""
    chosen = jax.devices()[5:1:-2]
    mesh = make_mesh(MeshConfig(), chosen)
    assert mesh.shape["fsdp"] == 2 and set(mesh.devices.flat) == set(chosen)
    assert device_memory(chosen) // 4 == device_memory(jax.devices())
    with pytest.raises(UserError, match=r"^mesh: data=2 x fsdp=2 does not use 2 device\(s\)"):
        make_mesh(MeshConfig(data=2, fsdp=2), chosen)
    with pytest.raises(UserError, match=r"^devices: expected some .* or None for all; found none"):
        make_mesh(MeshConfig(), [])
    with pytest.raises(UserError, match=r"^devices: expected each device once; found one more than once"):
        make_mesh(MeshConfig(), [*chosen, chosen[0]])


def test_uneven_size_names_parameter_axis_and_what_works():
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8), jax.devices())
    with pytest.raises(UserError) as error:
        sharding(mesh, "model.layers.block.mlp.up_proj.weight", (5, 172, 64), ("layers", "mlp", "embed"))
    for word in ("up_proj", "'mlp'", "172", "tensor=8", "1, 2, 4"):
        assert word in str(error.value)


def test_two_dimensions_along_one_axis():
    """Whole experts are sharded over `expert`; every other weight has its embedding dimension there."""
    assert spec(("experts", "mlp", "embed")) == PartitionSpec(("expert",), ("tensor",), ("fsdp",))
    assert spec(("mlp", "embed")) == PartitionSpec(("tensor",), ("fsdp", "expert"))


@pytest.mark.parametrize("size, cut", [(64, ("tensor", "fsdp", "expert")), (12, ("tensor",))])
def test_wide_sides_of_adapters(size, cut):
    """Wide sides of adapters are sharded over `fsdp` too if it divides them, else like their layers."""
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


def devices(platform: str, *counts: int, slices: int | None = None) -> list:
    """Return stand-ins for the devices of these processes, shuffled; with `slices`, each process has a `slice_index`."""
    found = []
    for process, count in enumerate(counts):
        more = {} if slices is None else {"slice_index": process * slices // len(counts)}
        found += [
            SimpleNamespace(platform=platform, process_index=process, id=1000 * process + i, device_kind=platform, **more)
            for i in range(count)
        ]
    return sorted(found, key=lambda device: (device.id * 7919) % 101)


def cpus(count: int) -> list:
    return devices("cpu", count)


def ids(grid) -> list:
    return [device.id for device in grid.flat]


def test_slices():
    mesh = make_mesh(MeshConfig(data=2, slices=2))
    assert describe(mesh) == "data=2 x fsdp=4"
    assert [d.id for d in mesh.devices.reshape(2, 4)[0]] == [0, 1, 2, 3], "a slice's devices are together"
    with pytest.raises(UserError, match=r"2 slices .* data=1 .* made: data=2 x fsdp=4, or"):
        make_mesh(MeshConfig(slices=2))
    with pytest.raises(UserError, match=r"mesh.slices: 8 devices do not divide into 3 slices"):
        make_mesh(MeshConfig(slices=3, data=3))


@pytest.mark.parametrize("counts", [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8, (3, 3, 2)])
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_a_configuration_means_the_same_places_on_any_number_of_cpu_processes(counts, slices):
    """All CPU devices claim slice 0; consecutive processes stand for a slice."""
    given = devices("cpu", *counts)
    for device in given:
        device.slice_index = 0
    sizes = {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2, "sequence": 1}
    grid = arrange(sizes, given, slices)
    assert grid.shape == tuple(sizes.values())
    order = [(device.process_index, device.id) for device in grid.flat]
    assert order == sorted(order) and len(order) == 8


def test_real_processes(tmp_path):
    """Two processes of two devices in two slices work, although JAX finds one slice: all CPUs claim slice 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        "import sys, jax\n"
        f"jax.distributed.initialize('127.0.0.1:{port}', 2, int(sys.argv[1]))\n"
        "from ftjax.config import MeshConfig\nfrom ftjax.mesh import crossings, make_mesh\n"
        "mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, slices=2))\n"
        "print([d.process_index for d in mesh.devices.flat], [a for a, c in crossings(mesh).items() if c.hosts])"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i)], env={**os.environ, **flags}, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    assert [process.communicate(timeout=120)[0].splitlines()[-1] for process in running] == ["[0, 0, 1, 1] ['data']"] * 2


def test_slices_of_gpus():
    """If there are as many NVLink domains as slices, those are the slices; else processes are."""
    sizes = {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2, "sequence": 1}
    domains = arrange(sizes, devices("gpu", 1, 1, 1, 1, slices=2), 2)
    assert ids(domains) == [0, 1000, 2000, 3000]
    crossed = devices("gpu", 1, 1, 1, 1)
    for device in crossed:
        device.slice_index = device.process_index % 2
    assert ids(arrange(sizes, crossed, 2)) == [0, 2000, 1000, 3000]
    assert ids(arrange(sizes, devices("gpu", 2, 2), 2)) == [0, 1, 1000, 1001]


@pytest.mark.parametrize(
    "sizes, inside",
    [
        ({"fsdp": 8, "tensor": 4}, {"tensor"}),
        ({"tensor": 8, "sequence": 4}, {"tensor"}),  # in the order of AXES, sequence would be
        ({"fsdp": 2, "tensor": 4, "sequence": 4}, {"tensor"}),
        ({"data": 4, "tensor": 2, "sequence": 4}, {"tensor", "sequence"}),
        ({"data": 4, "fsdp": 8}, {"fsdp"}),
        ({"fsdp": 2, "tensor": 16}, set()),
    ],
)
def test_axes_of_gpus_stay_in_a_process_where_they_can(sizes, inside):
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    grid = arrange(sizes, devices("gpu", 8, 8, 8, 8))
    found = set()
    for number, axis in enumerate(AXES):
        lines = np.moveaxis(grid, number, -1).reshape(-1, sizes[axis])
        if sizes[axis] > 1 and all(len({device.process_index for device in line}) == 1 for line in lines):
            found.add(axis)
    assert found == inside


def test_gpus_in_groups_that_do_not_divide():
    """Three of four GPUs cannot form a group; four of three processes can."""
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 3, "sequence": 1}
    grid = arrange(sizes, devices("gpu", 4, 4, 4))
    for row in grid[0, :, 0, :, 0].T:
        assert len({device.process_index for device in row}) == 1
    uneven = arrange({**sizes, "fsdp": 3}, devices("gpu", 4, 4, 1))
    assert sorted(ids(uneven)) == [0, 1, 2, 3, 1000, 1001, 1002, 1003, 2000]


def test_every_axis_has_a_place_in_the_order():
    assert sorted(ORDER) == sorted(AXES)


GB = 10**9


@pytest.mark.parametrize(
    "devices, memory, training, length, want",
    [
        (8, 16 * GB, {"global_batch_size": 16}, 128, {"data": 8, "fsdp": 1}),  # fits: no weight is ever gathered
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
    chosen, why = choose_mesh(config, build(config, llama)[0], cpus(devices), memory)
    sizes = {axis: getattr(chosen, axis) for axis in ("data", "fsdp", "expert", "tensor", "sequence")}
    assert sizes == {axis: 1 for axis in sizes} | want, why
    assert "GB" in why and ("rows of a microbatch over" in why) == (sizes["data"] * sizes["fsdp"] > 1)


def test_auto_of_some_of_the_devices(llama):
    config = Config.model_validate({"model": {"path": "x"}, "data": {"train": "y"}, "mesh": "auto"})
    mesh, why = mesh_of(config, llama, jax.devices()[2:4])
    assert set(mesh.devices.flat) == set(jax.devices()[2:4]) and "rows of a microbatch over 2" in why


def test_auto_finds_nothing(llama):
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"train": "y"}, "mesh": "auto", "training": {"global_batch_size": 3}}
    )
    with pytest.raises(UserError, match=r"16 devices .* 3 rows .* multiple of 16"):
        choose_mesh(config, build(config, llama)[0], cpus(16), GB)


def test_auto_beside_sizes():
    with pytest.raises(ValueError, match=r"mesh.auto chooses .* fsdp"):
        MeshConfig(auto=True, fsdp=4)


@pytest.mark.parametrize(
    "optimizer, bytes_each",
    [
        ({}, 16),  # weight, gradient and two moments in float32
        ({"state_dtype": "bfloat16", "param_dtype": "bfloat16"}, 8),
        ({"offload": True}, 8),
        ({"name": "adafactor"}, 8.25),  # no first moment; of the second, a row and a column of each small matrix
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
    assert (
        model.sizes.layers == llama["num_hidden_layers"] > max(spec.stacked[0] for spec in model.specs.values() if spec.stacked)
    )
