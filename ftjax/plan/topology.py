"""Names of slices: `v5e-16`, `v5p-64`, `v6e:2x4`, `cpu:8`.

Names are Google Cloud's: v5e (or v5litepod) and v6e count chips; v2, v3, v4, v5p and v7x (or tpu7x) count TensorCores, two per
chip, so that v5p-64 has 32 chips. `--chips` counts chips unambiguously, and so does a shape: `v5p:2x4x4`.

No TPU needs to be attached: libtpu, from PyPI, compiles for TPUs on any Linux machine with an x86-64 processor.
"""

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

import jax

from ftjax.chips import CHIPS, Chip
from ftjax.errors import UserError
from ftjax.torus import closes

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "v7x", "v7": "v7x", "trillium": "v6e", "ironwood": "v7x"}
COUNTED_IN_CORES = ("v4", "v5p", "v7x")
# The shapes that Cloud gives for a number alone: powers of two, as square or as cubic as possible.
PLANAR = {2**k: (2 ** (k // 2), 2 ** ((k + 1) // 2)) for k in range(9) if k != 1}
CUBIC = {2**k: tuple(2 ** ((k + i) // 3) for i in range(3)) for k in range(3, 13)}
CUBIC |= {1: (1, 1, 1), 4: (2, 2, 1), 6144: (16, 16, 24)}
# Without the first, libtpu queries the machine's metadata for minutes; without the next two it complains that it found none;
# without the last, only one process at a time may load it, as if each used the chips.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TPUS = ("v4", "v5e", "v5p", "v6e", "v7x")


@dataclass(frozen=True)
class Topology:
    """Slices of equal chips, attached or not.

    Attributes:
        chip: None for `cpu:N`, devices of the host.
        shape: chips along each dimension of a slice.
        slices: number of slices, joined by the data centre's network.
    """

    chip: Chip | None
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.name if self.chip else 'cpu'}:{shape}" + (f" x {self.slices} slices" if self.slices > 1 else "")

    def wraps(self, dimension: int) -> bool:
        """Return whether the links of a dimension close to a ring."""
        return self.chip is not None and closes(self.chip.torus, self.shape)[dimension]

    def devices(self) -> list[jax.Device]:
        """Return abstract devices to compile for.

        Raises UserError if libtpu is missing or does not know them.
        """
        return self._cpus() if self.chip is None else self._tpus()

    def _cpus(self) -> list[jax.Device]:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            with suppress(RuntimeError):  # if devices exist already, there may be enough of them
                jax.config.update("jax_num_cpu_devices", self.chips)
        devices = jax.devices("cpu")
        if len(devices) < self.chips:
            raise UserError(
                f"{self.name}: this process has {len(devices)} CPU device(s); set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={self.chips} before it starts"
            )
        return devices[: self.chips]

    def _tpus(self) -> list[jax.Device]:
        if find_spec("libtpu") is None:
            raise UserError(
                f"{self.name}: planning for TPUs compiles with libtpu, which is not installed: pip install libtpu "
                "(Linux on x86-64)"
            )
        for name, value in NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options: dict = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}  # both cores as one device, as usual
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1,) * 3
        elif self.slices == 1 and self.chips == self.chip.chips_per_host == 8:  # of one host, where libtpu takes two
            options["chips_per_host_bounds"] = (2, 4, 1)
        libtpu_name = {"v7x": "tpu7x"}.get(self.chip.name, self.chip.name)
        try:
            found = topologies.get_topology_desc(
                f"{libtpu_name}:{'x'.join(map(str, self.shape))}", platform="tpu", num_slices=self.slices, **options
            )
        except Exception as error:  # libtpu's errors are RuntimeErrors of several kinds
            raise UserError(f"{self.name}: libtpu knows no such topology: {str(error).splitlines()[0]}") from None
        return list(found.devices)


def parse(name: str, chips: int | None = None, slices: int = 1) -> Topology:
    """Parse the name of a topology.

    Args:
        name: `v5e-16`, `v5e:4x4`, or `v5e` with `chips`; `cpu:8`.
        chips: chips per slice.

    Raises UserError that lists the known names.
    """
    match = re.fullmatch(r"(?P<kind>[a-z0-9]+?)(?:-(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)*))?", name.strip().lower())
    kind = match and ALIASES.get(match["kind"], match["kind"])
    if not match or (kind not in TPUS and kind != "cpu"):
        raise UserError(
            f"topology {name!r}: expected a TPU version and a size, such as v5e-16 or v5p:2x4x4 (versions: {', '.join(TPUS)}), "
            "or cpu:8"
        )
    if chips is not None and (match["count"] or match["shape"]):
        raise UserError(f"topology {name!r} has a size, and --chips {chips} is another; give one of them")
    if kind == "cpu":
        count = chips or int(match["count"] or match["shape"] or 1)
        if slices != 1:
            raise UserError(f"topology {name!r}: slices are of TPUs; leave --slices out")
        return Topology(None, (count,))
    chip = CHIPS[kind]
    if match["shape"]:
        shape = tuple(map(int, match["shape"].split("x")))
        if len(shape) != chip.torus:
            raise UserError(
                f"topology {name!r}: the shape of a {kind} slice has {chip.torus} dimensions, such as {_example(chip)}"
            )
        return Topology(chip, shape, slices)
    if chips is None and not match["count"]:
        raise UserError(f"topology {name!r} lacks a size: write {kind}-16, {_example(chip)}, or add --chips 16")
    cores = 2 if chips is None and kind in COUNTED_IN_CORES else 1
    asked = chips or int(match["count"])
    shapes = PLANAR if chip.torus == 2 else CUBIC
    if asked % cores or asked // cores not in shapes:
        sizes = ", ".join(f"{kind}-{size * cores}" for size in sorted(shapes))
        what = "TensorCores, two per chip" if cores == 2 else "chips"
        raise UserError(
            f"topology {name!r}: no slice of {asked} {what}; there are {sizes}. Write another shape out: {_example(chip)}"
        )
    return Topology(chip, shapes[asked // cores], slices)


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join('4' * chip.torus)}"
