"""What kind of device a program is made for, as far as the current mesh tells."""

import jax


def on_cpu() -> bool:
    """Return whether the program is made for CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def on_one_cpu() -> bool:
    """Return whether the program is made for a single CPU device."""
    return on_cpu() and jax.sharding.get_abstract_mesh().size == 1
