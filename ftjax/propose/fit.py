"""A configuration that fits the machine's memory, by the arithmetic of `ftjax plan`: weights in fewer bits, microbatches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.config import Config
from ftjax.models.nn.memory import packs
from ftjax.plan.out_of_memory import needs
from ftjax.plan.show import KINDS, size
from ftjax.propose.machine import SHARE, Machine
from ftjax.train.setup import Design, build, design, mesh_of

Tree = dict[str, Any]  # a configuration as a file has it


@dataclass(frozen=True)
class Fit:
    """A choice that was tried.

    Attributes:
        microbatches: of one update.
        memory: bytes by kind that each device needs.
        room: bytes that it has for them.
    """

    quantization: str | None
    microbatches: int
    memory: Mapping[str, float]
    room: float

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.room

    def described(self, machine: Machine) -> str:
        parts = ", ".join(f"{KINDS.get(kind, kind)} {size(count)}" for kind, count in self.memory.items() if count)
        return f"needs at least {size(sum(self.memory.values()))} of {size(machine.memory)} free on each device ({parts})"


def facts(config: Config, hf_config: Mapping[str, Any]) -> tuple[int, int, int | None, bool]:
    """Return of the base model: number of parameters, width, positions, and whether rows may hold several documents."""
    model, _ = build(config, hf_config)
    base = [spec for spec in model.specs.values() if not spec.row.adapter]
    return sum(spec.size for spec in base), model.sizes.embed, model.sizes.positions, packs(model.memories)


def fit(config: Config, hf_config: Mapping[str, Any], machine: Machine) -> Fit:
    """Return the first choice that fits: all rows at a time, then more microbatches, then the frozen weights in 4 bits.

    If none fits, it is the one that needs least.
    """
    tried: list[Fit] = []
    kinds: Sequence[str | None] = (None, "nf4") if config.method.name == "lora" else (None,)
    for quantization in kinds:
        for microbatches in _microbatches(config, machine):
            made = _design(config, hf_config, machine, quantization, microbatches)
            tried.append(Fit(quantization, microbatches, needs(made), SHARE * machine.memory))
            if tried[-1].fits:
                return tried[-1]
    return min(tried, key=lambda one: sum(one.memory.values()))


def _microbatches(config: Config, machine: Machine) -> list[int]:
    """Return numbers of microbatches into which the rows divide, so that each device has the same number of them."""
    rows, devices = config.training.global_batch_size, len(machine.devices)
    return [count for count in range(1, rows + 1) if rows % count == 0 and (rows // count) % devices == 0] or [1]


def _design(
    config: Config, hf_config: Mapping[str, Any], machine: Machine, quantization: str | None, microbatches: int
) -> Design:
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"quantization": quantization}),
            "training": config.training.model_copy(update={"gradient_accumulation_steps": microbatches}),
        }
    )
    mesh, _ = mesh_of(config, hf_config, machine.devices, machine.memory)
    return design(config, hf_config, mesh, machine.memory)
