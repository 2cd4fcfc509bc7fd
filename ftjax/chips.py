"""The one table of accelerators: peak arithmetic, memory and links, each figure with its source.

Figures are per chip as their makers print them, in plain units: FLOP/s (dense, bfloat16 in, float32 sums), bytes and bytes/s of
1000s. A JAX *device* is a chip, or one of its cores (v2, v3, 7x, and v4 without megacore): `Chip.share`.

Sources:
[1] Google Cloud, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x (Ironwood)": docs.cloud.google.com/tpu/docs/<version>.
[2] Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks", CACM 63(7), table 1 (v2, v3).
[3] JAX, jax/_src/pallas/mosaic/tpu_info.py: peak and memory of every TPU; the names that `Device.device_kind` has.
[4] Austin et al. 2025, "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus: links and network per chip.
[5] NVIDIA data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, L4 (their dense figures, half of those "with sparsity");
    DGX A100, H100, H200, B200 user guides for the network of a host.
"""

from dataclasses import dataclass
from typing import Any

GB = 1e9
GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as in a topology (`v5e`) or in product names (`H100`).
        kinds: values of `jax.Device.device_kind`.
        peak: bfloat16 FLOP/s.
        hbm: bytes of memory. A program gets less: `Device.memory_stats()["bytes_limit"]`.
        hbm_bandwidth: bytes/s.
        links: inter-chip links (ICI ports, NVLinks); 0 if chips of a host communicate over PCIe only.
        link_bandwidth: bytes/s of one link in one direction (of PCIe if there are no links).
        torus: dimensions of the ICI torus; 0 if links meet in a switch.
        chips_per_host: of the usual host of a slice, or server.
        dcn_per_host: bytes/s of a host's network in one direction.
        cores: TensorCores of a TPU; `Device.num_cores` tells how many of them a device is. GPUs count as one.
        source: source of the figures, by the numbers above.
    """

    name: str
    kinds: tuple[str, ...]
    peak: float
    hbm: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    torus: int
    chips_per_host: int
    dcn_per_host: float
    cores: int
    source: str

    def share(self, device: Any) -> float:
        """Return the share of the chip that a `jax.Device` is: 1, or 0.5."""
        return getattr(device, "num_cores", self.cores) / self.cores

    @property
    def dcn_per_chip(self) -> float:
        return self.dcn_per_host / self.chips_per_host


# Links: [1] gives the bandwidth of all ports in both directions: v5e 400 GB/s over 4 ports, so 50 GB/s per port and direction;
# v6e 800 over 4, v5p and 7x 1200 over 6. Network: v5e hosts have 2 x 100 Gb/s [1], v6e 4 x 200, 7x 2 x 200; v4 is assumed to be
# as v5p, 200 Gb/s [4]. No figure was found for hosts of v2 and v3: 32 Gb/s is an assumption.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", ("TPU v2",), 46e12, 16 * GiB, 700 * GB, 4, 62 * GB, 2, 4, 4 * GB, 2, "[2]"),
        Chip("v3", ("TPU v3",), 123e12, 32 * GiB, 900 * GB, 4, 82 * GB, 2, 4, 4 * GB, 2, "[2]"),
        Chip("v4", ("TPU v4",), 275e12, 32 * GiB, 1200 * GB, 6, 50 * GB, 3, 4, 25 * GB, 2, "[1], [3], [4]"),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GiB, 819 * GB, 4, 50 * GB, 2, 8, 25 * GB, 1, "[1]"),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GiB, 2765 * GB, 6, 100 * GB, 3, 4, 25 * GB, 2, "[1], [4]"),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GiB, 1638 * GB, 4, 100 * GB, 2, 8, 100 * GB, 1, "[1], [4]"),
        Chip("v7x", ("TPU7x", "TPU7"), 2307e12, 192 * GiB, 7380 * GB, 6, 100 * GB, 3, 4, 50 * GB, 2, "[1], [3]"),
        Chip("A100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GB, 2039 * GB, 12, 25 * GB, 0, 8, 200 * GB, 1, "[5]"),
        Chip("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * GB, 1555 * GB, 12, 25 * GB, 0, 8, 200 * GB, 1, "[5]"),
        Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GB, 3350 * GB, 18, 25 * GB, 0, 8, 400 * GB, 1, "[5]"),
        Chip("H200", ("NVIDIA H200",), 989e12, 141 * GB, 4800 * GB, 18, 25 * GB, 0, 8, 400 * GB, 1, "[5]"),
        Chip("B200", ("NVIDIA B200",), 2250e12, 180 * GB, 7700 * GB, 18, 50 * GB, 0, 8, 400 * GB, 1, "[5]"),
        Chip("L4", ("NVIDIA L4",), 121e12, 24 * GB, 300 * GB, 0, 32 * GB, 0, 1, 12.5 * GB, 1, "[5]"),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`; None if it is not in the table (a CPU, say)."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
