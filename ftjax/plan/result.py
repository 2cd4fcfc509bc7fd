"""Result of a plan, as data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ftjax.plan.rollout import RolloutPlan
from ftjax.plan.roofline import Traffic


@dataclass
class Plan:
    """Needs of a train step. Memory and bytes are per device; times are lower bounds."""

    topology: str
    chips: int
    devices: int
    slices: int
    mesh: dict[str, int]
    model: str
    method: str
    parameters: str  # PEFT's line
    attention: str
    remat: str
    rows: int  # per update
    microbatches: int
    max_length: int
    memory: dict[str, float]
    limit: float | None
    fits: bool | None  # None if the limit is not known
    flops: float  # of the program, on all devices
    needed_flops: float  # of the closed form that defines MFU
    formula: str
    peak: float | None = None  # bytes that XLA's buffer assignment has live at one time, arguments included
    hbm_bytes: float | None = None
    traffic: list[Traffic] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    bound: str | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_chip: float | None = None
    mfu: float | None = None
    tokens_per_day: float | None = None
    price: float | None = None  # per chip-hour
    cost_per_day: float | None = None
    cost_per_million_tokens: float | None = None
    advice: list[str] = field(default_factory=list)
    rollout: RolloutPlan | None = None  # of an objective that generates
    mesh_notes: list[str] = field(default_factory=list)  # axes that are not on rings of neighbours
    plan_seconds: float = 0.0
    plan_cpu_seconds: float = 0.0  # of all cores

    @property
    def tokens(self) -> int:
        """Tokens per update, if every row is full."""
        return self.rows * self.max_length


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    values = dataclasses.asdict(plan)
    for own, where in ((plan, values), *([] if plan.rollout is None else [(plan.rollout, values["rollout"])])):
        where["traffic"] = [row._asdict() for row in own.traffic]
    return values


def from_json(values: dict[str, Any]) -> Plan:
    """Build a plan from JSON values, the inverse of `as_json`."""

    def read(own: dict[str, Any]) -> dict[str, Any]:
        return {**own, "traffic": [Traffic(**{**row, "axes": tuple(row["axes"])}) for row in own["traffic"]]}

    rollout = values.get("rollout")
    return Plan(**{**read(values), "rollout": None if rollout is None else RolloutPlan(**read(rollout))})
