"""Tests meshes on slices that are not there: all can be made, axes have the stated neighbours, and collectives stay on them."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import Case, hf_config
from rich.console import Console
from tiny_run import make_config

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import AXES, crossings, describe, divisions, make_mesh, nearness, notes
from ftjax.models.facts import complete_config
from ftjax.placement import in_slices
from ftjax.plan.groups import slice_groups
from ftjax.plan.hlo import Program
from ftjax.plan.plan import make_plan
from ftjax.plan.roofline import Traffic
from ftjax.plan.show import show
from ftjax.plan.topology import parse
from ftjax.torus import Torus
from ftjax.train.auto_mesh import choose_mesh
from ftjax.train.setup import build

pytest.importorskip("libtpu", reason="topologies of TPUs are libtpu's")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "mesh_table.py"


def script():
    """Import scripts/mesh_table.py, which is not in a package."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


def mesh_on(name: str, slices: int = 1, **sizes):
    sizes = {"data": slices, "fsdp": 1, **sizes}
    return make_mesh(MeshConfig(**sizes, slices=slices), parse(name, slices=slices).devices())


TOPOLOGIES = [
    ("v5e-1", 1), ("v5e-4", 1), ("v5e-4", 4), ("v5e-8", 1), ("v5e-16", 1), ("v5e-16", 2), ("v5e-32", 1), ("v6e-8", 1),
    ("v6e-16", 2), ("v4-16", 1), ("v4:2x2x4", 1), ("v5p-8", 1), ("v5p-16", 3), ("v5p-32", 1), ("v5p:2x2x4", 2), ("v5p-64", 1),
    ("v7x-8", 1), ("v7x-16", 1), ("v7x:2x2x4", 2), ("v7x:2x4x4", 1),
]  # fmt: skip
LARGE = [
    ("v5p:4x4x12", 1), ("v6e-256", 1), ("v5e-256", 2), ("v4-128", 1), ("v5p-64", 4), ("v5p-1024", 1), ("v7x:4x4x4", 1),
    ("v7x-256", 2),
]  # fmt: skip


@pytest.mark.parametrize("name, slices", TOPOLOGIES + LARGE)
def test_every_division_can_be_made(name, slices):
    """Every device has one position, only `data` crosses slices, and the cost is stated; on large slices, for some
    divisions."""
    devices = parse(name, slices=slices).devices()
    found = [sizes for sizes in divisions(len(devices), len(AXES)) if sizes[0] % slices == 0]
    for sizes in found[:: max(1, len(found) // 20)] if (name, slices) in LARGE else found:
        mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True)), slices=slices), devices)
        assert mesh.devices.shape == sizes
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
        across = [axis for axis, crossing in crossings(mesh).items() if crossing.slices]
        assert across == (["data"] if slices > 1 else [])
        near = nearness(mesh)
        assert len(notes(mesh)) >= any(not found.ring for found in near.values())
        for axis, size in zip(AXES, sizes, strict=True):
            inside = size // (slices if axis == "data" else 1)
            assert (near[axis].hops == 0) == (inside == 1), f"{describe(mesh)}: {axis}"


@pytest.mark.parametrize("name", ["v5e-16", "v5p-32", "v5p-64", "v6e-256", "v7x:4x4x4"])
def test_the_first_axis_has_the_nearest_devices(name):
    """`tensor` connects neighbours, whatever the other axes are."""
    devices = parse(name).devices()
    for tensor, sequence in itertools.product((2, 4, 8), (1, 2)):
        mesh = make_mesh(MeshConfig(fsdp=-1, tensor=tensor, sequence=sequence), devices)
        assert nearness(mesh)["tensor"].hops == 1, describe(mesh)


def test_jax_decides_where_it_keeps_axes_on_neighbours():
    """For whole dimensions of the torus, the mesh is that of `create_device_mesh`."""
    from jax.experimental import mesh_utils

    for name, sizes in (("v5e-16", (4, 4)), ("v5p-64", (8, 4)), ("v6e-256", (16, 16)), ("v5e-16", (16, 1)), ("v7x-16", (8, 2))):
        ours = mesh_on(name, fsdp=sizes[0], tensor=sizes[1]).devices
        theirs = mesh_utils.create_device_mesh(sizes, parse(name).devices())
        assert [device.id for device in ours.flat] == [device.id for device in theirs.flat], name


@pytest.mark.parametrize(
    "name, sizes, hops, links",
    [
        # 4 x 4 chips, no rings. A pair of neighbours; of the rest, 4 along one dimension and every second along the other.
        ("v5e-16", {"fsdp": 8, "tensor": 2}, {"fsdp": 2, "tensor": 1}, {"fsdp": 1.5, "tensor": 1}),
        # A square of 4 is a ring, a row of 4 is not; tensor comes first.
        ("v5e-16", {"fsdp": 2, "tensor": 4, "sequence": 2}, {"tensor": 1, "sequence": 2}, {"tensor": 2, "sequence": 0.5}),
        ("v5e-16", {"fsdp": 4, "tensor": 4}, {"fsdp": 1, "tensor": 1}, {"fsdp": 1, "tensor": 1}),
        # 2 x 4 chips: with JAX's ring, fsdp would be 2 hops apart.
        ("v5e-8", {"fsdp": 4, "tensor": 2}, {"fsdp": 1, "tensor": 1}, {"fsdp": 1, "tensor": 1}),
        # 16 x 16 with rings: half of a ring is a line, and every second chip of one is a ring whose links two groups share.
        ("v5e-256", {"fsdp": 32, "tensor": 8}, {"fsdp": 4, "tensor": 1}, {"tensor": 2, "fsdp": 1.5}),
        ("v5e-256", {"fsdp": 16, "tensor": 16}, {"fsdp": 1, "tensor": 1}, {"tensor": 2, "fsdp": 2}),
        # 2 x 2 x 4: JAX gives tensor 2 x 2, and then finds nothing for the two axes of 2.
        (
            "v5p-32",
            {"fsdp": 2, "tensor": 4, "sequence": 2},
            {"tensor": 1, "sequence": 1, "fsdp": 2},
            {"tensor": 2, "fsdp": 0.5},
        ),
        # Two devices per chip: a core's nearest neighbour is the other core.
        ("v7x:4x4x4", {"fsdp": 64, "tensor": 2}, {"tensor": 1, "fsdp": 1}, {"tensor": 6, "fsdp": 6}),
    ],
)
def test_where_axes_lie(name, sizes, hops, links):
    near = nearness(mesh_on(name, **sizes))
    assert {axis: near[axis].hops for axis in hops} == hops
    assert {axis: near[axis].links for axis in links} == links


def test_a_pair_is_a_pair_of_neighbours():
    """The coordinates are adjacent; on v5e-16, JAX alone cannot make tensor=2."""
    for pair in mesh_on("v5e-16", fsdp=8, tensor=2).devices.reshape(8, 2):
        assert np.abs(np.subtract(pair[0].coords, pair[1].coords)).sum() == 1
    for pair in mesh_on("v7x:4x4x4", fsdp=64, tensor=2).devices.reshape(64, 2):
        assert pair[0].coords == pair[1].coords


def test_notes_say_what_a_mesh_costs():
    assert notes(mesh_on("v5e-16", fsdp=16)) == []
    (line,) = notes(mesh_on("v5e-16", 2, data=2, fsdp=4, tensor=4))
    assert line.startswith("fsdp=4 and tensor=4: on a line of neighbours that does not close")
    (apart,) = notes(mesh_on("v5e-16", fsdp=8, tensor=2))
    assert apart.startswith("fsdp=8: the chips of a group are up to 2 hops apart") and "1.5 link(s) each" in apart


@pytest.mark.parametrize(
    "name, slices, sizes, hosts",
    [
        ("v5e-16", 1, {"fsdp": 4, "tensor": 2, "sequence": 2}, ["fsdp"]),  # a host has 2 x 2 chips
        ("v5e-16", 1, {"tensor": 16}, ["tensor"]),
        ("v5e-16", 2, {"fsdp": 4, "tensor": 2, "sequence": 2}, ["data", "fsdp"]),
        ("v5e-4", 2, {"fsdp": 4}, ["data"]),
    ],
)
def test_crossings(name, slices, sizes, hosts):
    over = crossings(mesh_on(name, slices, **sizes))
    assert [axis for axis in AXES if over[axis].hosts] == hosts
    assert [axis for axis in AXES if over[axis].slices] == (["data"] if slices > 1 else [])


def test_a_slice_with_a_hole_is_used_all_the_same():
    devices = parse("v5e-16").devices()[:6]
    mesh = make_mesh(MeshConfig(fsdp=3, tensor=2), devices)
    assert nearness(mesh) is None and "do not fill a box of a slice" in notes(mesh)[0]


@pytest.mark.parametrize(
    "name, real, asked, said",
    [
        (
            "v5e-16",
            2,
            {"data": 2},
            r"mesh.slices: 1 asked for, .* are in 2 .* set mesh.slices: 2 and mesh.data to a multiple",
        ),
        (
            "v5e-16",
            1,
            {"data": 2, "slices": 2},
            r"mesh.slices: 2 asked for, .* are in 1 slice\(s\); set mesh.slices: 1$",
        ),
        ("v5e-16", 4, {"data": 2, "slices": 2}, r"are in 4 slice"),
        ("v5e-16", 2, {"slices": 2}, r"data=1 is not a multiple of that. Nearest that can be made: data=2 x fsdp=16, or"),
        ("v5e-16", 2, {"data": 2, "fsdp": 1, "tensor": 32, "slices": 2}, r"made: data=2 x tensor=16, or"),
    ],
)
def test_what_cannot_be_made_is_refused_in_words(name, real, asked, said):
    with pytest.raises(UserError, match=said):
        make_mesh(MeshConfig(**asked), parse(name, slices=real).devices())


def test_slices_of_unlike_sizes():
    devices = parse("v5e-16", slices=2).devices()
    with pytest.raises(UserError, match=r"equally many devices, and these have 8, 16"):
        in_slices(devices[:24], 2)


@pytest.mark.parametrize("asked", ["auto", {"auto": True, "slices": 2}])
def test_auto_knows_the_slices(asked):
    """All meshes that it may choose can be made, and nothing that the devices know is asked for."""
    facts = complete_config(hf_config(Case("llama", "llama", {})).to_dict(), "llama")
    devices = parse("v5e-4", slices=2).devices()
    for rows in (2, 4, 8, 16):
        config = Config.model_validate({
            "model": {"path": "x"}, "data": {"train": "y"}, "mesh": asked, "training": {"global_batch_size": rows},
        })  # fmt: skip
        chosen, _ = choose_mesh(config, build(config, facts)[0], devices, 2**30)
        assert chosen.slices == 2 and chosen.data % 2 == 0
        assert make_mesh(chosen, devices).size == 8
    assert make_mesh(config.mesh, devices).shape["data"] == 2  # without a batch, as in an evaluation
    with pytest.raises(UserError, match="are in 1 slice"):
        choose_mesh(config.model_copy(update={"mesh": MeshConfig(auto=True, slices=2)}), None, devices[:4], 2**30)


def test_a_torus_closes_where_it_is_whole():
    """Half of a wrapped dimension is a line; the shorter way around counts."""
    torus = Torus((16, 4, 1, 1), (True, False, False, False), (0, 0, 0, 0))
    row = [(x, 0, 0, 0) for x in range(16)]
    assert torus.near(row) == (1, 2.0, True)
    assert torus.near(row[:8]) == (1, 1.0, False)
    assert torus.near(row[::4]) == (4, 0.5, False)
    assert torus.near([row[x] for x in (0, 1, 4, 5)]) == (3, 0.5, False)  # as tensor and fsdp around sequence: two groups
    assert torus.near([row[x] for x in (0, 1, 4, 5, 8, 9, 12, 13)]) == (3, 1.0, False)  # all the way round
    bent = [(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)]
    assert torus.near(bent) == (1, 1.0, False)
    assert torus.near([(0, 0, 0, 0), (15, 0, 0, 0), (14, 1, 0, 0)]).hops == 2


# ---- compiled ----

RECV = (
    "  %recv = (bf16[2,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all), channel_id=3, is_host_transfer=true, "
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target=TARGET,'
    '_xla_megascale_transfer_type="TYPE"}'
)


def test_what_crosses_slices_is_read():
    """A send and receive in XLA's text count once per loop iteration, in their groups, by the factor of their kind."""
    ids = [100000, 100001, 200000, 200001]

    def received(target, type_, times=1):
        recv = RECV.replace("TARGET", target).replace("TYPE", type_)
        text = f"ENTRY %main () -> f32[] {{\n  %after-all = token[] after-all()\n{recv}\n}}\n"
        (found,) = Program(text, 4, tuple(ids)).transfers()
        return found

    size = 2 * 8 * 128 * 2
    summed = received('"{1,2}x{0:1}"', "ALL_REDUCE")
    assert (summed.kind, summed.bytes, summed.groups) == ("all-reduce", size, ((0, 2), (1, 3)))
    assert received('"{1,2}x{0:1}"', "ALL_GATHER").bytes == size / 2  # half of the received data is its own
    passed = received("{{200000->100001},{100001->200000}}", "ONE_TO_ONE")
    assert (passed.kind, passed.bytes, passed.groups) == ("collective-permute", size, ((2, 1), (1, 2)))
    four = {100000 * s + i: 8 * (s - 1) + i for s in range(1, 5) for i in range(8)}
    assert slice_groups('_xla_megascale_target="{1:4}x{0,2:3}"', four) == ((0, 8, 16, 24), (2, 10, 18, 26), (3, 11, 19, 27))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(script().LLAMA))
    return folder


@pytest.mark.parametrize(
    "name, slices, mesh, method",
    [
        ("v5e-4", 2, {"fsdp": 2, "tensor": 2}, None),  # the embedding went to the other slice and came back from both
        pytest.param("v5e-4", 2, {"fsdp": 2, "expert": 2}, None, marks=pytest.mark.sweep),  # logits went to the other slice
        pytest.param("v5e-4", 2, {"data": 2, "sequence": 2}, {"name": "full"}, marks=pytest.mark.sweep),
        pytest.param("v5e-8", 1, {"fsdp": 2, "tensor": 2, "sequence": 2}, None, marks=pytest.mark.sweep),
    ],
)
def test_collectives_stay_on_their_axes(llama, name, slices, mesh, method):
    module = script()
    rows, gradients = module.compiled(llama, name, slices, {"fsdp": 1, **mesh}, method)
    assert module.faults(rows, gradients) == []
    between = sum(row.dcn_bytes for row in rows)
    assert (0 < between <= 2 * gradients) if slices > 1 else between == 0
    if "sequence" in mesh:
        assert ("all-to-all", ("sequence",)) in {(row.kind, row.axes) for row in rows}
    if mesh.get("fsdp", 1) > 1:
        weights = max(row.ici_bytes for row in rows if row.kind == "all-gather")
        assert all(set(row.axes) <= {"fsdp", "expert"} for row in rows if row.kind == "all-gather" and row.ici_bytes == weights)


@pytest.mark.parametrize(
    "kind, axes, ici, dcn, said",
    [
        ("all-gather", ("data",), 0.0, 1e3, "all-gather of 0.001 MB between slices"),
        ("collective-permute", ("data", "fsdp"), 0.0, 1e3, "collective-permute of 0.001 MB between slices"),
        ("all-gather", ("data",), 3e6, 0.0, "3.000 MB within a slice"),
        ("all-reduce", ("data",), 0.0, 3e6, "3.000 MB between slices"),
        ("all-to-all", ("sequence", "tensor"), 3e6, 0.0, "3.000 MB within a slice"),
        ("all-gather", ("sequence",), 3e6, 0.0, "3.000 MB within a slice"),
        ("all-reduce", ("data", "fsdp"), 1e6, 1e6, None),
        ("all-gather", ("fsdp", "expert"), 9e9, 0.0, None),
        ("all-to-all", ("sequence",), 9e9, 0.0, None),
        ("all-reduce", ("tensor",), 9e9, 0.0, None),
    ],
)
def test_what_leaves_its_axis_is_seen(kind, axes, ici, dcn, said):
    found = script().faults([Traffic(kind, axes, 1, ici, dcn, 0, 0)], 1e6)
    assert (found == []) if said is None else (said in found[0])


def test_a_plan_of_two_slices(tmp_path, capsys):
    """`ftjax plan --slices 2` gives the time of traffic between slices, and the cost of the mesh."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(Case("llama", "llama", {"intermediate_size": 64})).to_dict()))
    config = make_config(tmp_path, mesh={"data": 2, "fsdp": 4, "tensor": 2, "slices": 2})
    where = parse("v5e-8", slices=2)
    found = make_plan(config, where)
    between = [row for row in found.traffic if row.dcn_bytes]
    assert {(row.kind, row.axes) for row in between} == {("all-reduce", ("data",))}
    assert found.seconds["DCN"] == pytest.approx(sum(row.dcn_bytes for row in between) / (25e9 / 8))
    assert found.mesh["data"] == found.slices == 2
    show(found, Console())
    assert "mesh: fsdp=4: on a line of neighbours that does not close" in capsys.readouterr().out
    with pytest.raises(UserError, match="are in 2 slice"):
        make_plan(make_config(tmp_path, mesh={"fsdp": -1}), where)


@pytest.mark.sweep  # compiles for some minutes each
@pytest.mark.parametrize("name, slices", list(itertools.product(script().SLICES, (1, 2))))
def test_all_meshes_of_the_table(name, slices, tmp_path):
    """The table is checked in a separate process, because a process compiles for one kind of device."""
    subprocess.run([sys.executable, SCRIPT, "--kept", tmp_path, "--only", name, str(slices)], check=True, cwd=SCRIPT.parents[1])
    found = {path.name: json.loads(path.read_text())["faults"] for path in tmp_path.iterdir()}
    assert len(found) == len(list(script().meshes(parse(name).chips))) and not any(found.values()), found
