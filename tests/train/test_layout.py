"""Tests which rows of a global batch a process holds, for meshes within and across processes, and the arrays made of them."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ftjax.config import MeshConfig
from ftjax.mesh import make_mesh, spec
from ftjax.plan.topology import parse
from ftjax.train.layout import BatchLayout


@pytest.mark.parametrize(
    "sizes, rows",
    [
        ({"data": 2, "fsdp": 4}, 16),
        ({"fsdp": 2, "tensor": 4}, 8),
        ({"data": 2, "sequence": 4, "fsdp": 1}, 8),
        ({"fsdp": 2, "expert": 2, "sequence": 2}, 8),
    ],
)
@pytest.mark.parametrize("microbatches", [None, 1, 2])
def test_arrays_are_the_rows_in_their_order(sizes, rows, microbatches):
    """The arrays equal the whole batch put on the devices."""
    layout = BatchLayout(make_mesh(MeshConfig(**sizes)), rows, microbatches)
    assert layout.own.tolist() == list(range(rows))
    batch = {"tokens": np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)}
    found = layout.arrays(batch)["tokens"]
    whole = batch["tokens"] if microbatches is None else batch["tokens"].reshape(microbatches, -1, 16)
    axes = ("batch", "length") if microbatches is None else (None, "batch", "length")
    want = jax.device_put(whole, NamedSharding(layout.mesh, spec(axes)))
    assert found.sharding == want.sharding and found.shape == want.shape
    for one, other in zip(found.addressable_shards, want.addressable_shards, strict=True):
        assert one.index == other.index
        np.testing.assert_array_equal(one.data, other.data)


SHARING = [  # slice, mesh, processes that share each row
    ("v5e-16", {"fsdp": 4, "tensor": 4}, None),
    ("v5e-16", {"fsdp": 4, "sequence": 4}, None),
    ("v5p-32", {"fsdp": 2, "tensor": 8}, None),
    ("v5e-16", {"fsdp": 16}, 1),
    ("v5e-16", {"tensor": 16, "fsdp": 1}, 4),
]


@pytest.mark.parametrize("name, sizes, sharing", SHARING, ids=str)
@pytest.mark.parametrize("microbatches", [None, 2])
def test_every_device_of_a_slice_finds_its_rows(name, sizes, sharing, microbatches):
    """Each process builds exactly the rows of its devices, however hosts are arranged in the mesh."""
    mesh = make_mesh(MeshConfig(**sizes), parse(name).devices())
    rows = 32
    held: dict[int, set[int]] = {}
    for device, index in NamedSharding(mesh, spec(("batch", "length"))).devices_indices_map((rows, 16)).items():
        held.setdefault(device.process_index, set()).update(range(*index[0].indices(rows)))
    layouts = {process: BatchLayout(mesh, rows * (microbatches or 1), microbatches, process) for process in held}
    for process, layout in layouts.items():
        of_each = [row % rows for row in layout.own]
        assert sorted(of_each) == sorted([*held[process]] * (microbatches or 1))
        assert len(layout.own) == len(set(layout.own)) and (np.diff(layout.own) > 0).all()
    owners = np.zeros(rows * (microbatches or 1), int)
    for layout in layouts.values():
        owners[layout.own] += 1
    assert owners.min() >= 1 and (sharing is None or set(owners) == {sharing})


def test_rows_that_do_not_follow_each_other():
    """A process whose devices are at both ends of the mesh gets its rows in the right places."""
    mesh = make_mesh(MeshConfig(fsdp=8))

    class Ends(BatchLayout):
        @property
        def _of_each(self):
            return np.array([0, 7])

    layout = Ends(mesh, 16, 2)
    assert layout.own.tolist() == [0, 7, 8, 15]
    batch = np.array([[0, 0], [7, 7], [8, 8], [15, 15]], np.int32)
    shape = (2, 8, 2)
    held = batch.reshape(2, 2, 2)
    assert layout._shape(2) == shape
    for index, want in (((slice(None), slice(0, 1), slice(None)), [[[0, 0]], [[8, 8]]]),
                        ((slice(None), slice(7, 8), slice(None)), [[[7, 7]], [[15, 15]]])):  # fmt: skip
        np.testing.assert_array_equal(layout.part(held, shape, index), want)
