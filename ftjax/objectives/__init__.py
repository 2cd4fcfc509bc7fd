"""What is minimised: one file an objective, each of which says in an `OBJECTIVE` what it is."""

import importlib

from ftjax.config import Config
from ftjax.config.schema import add_objective
from ftjax.data.encoding import RowEncoding
from ftjax.objectives.objective import Head, Objective

# name in the configuration -> file, or the record itself
OBJECTIVES: dict[str, str | Objective] = {name: name for name in ("sft", "classification")}


def objective_of(config: Config) -> Objective:
    """The objective of a configuration."""
    found = OBJECTIVES[config.objective.name]
    return importlib.import_module(f"ftjax.objectives.{found}").OBJECTIVE if isinstance(found, str) else found


def head_of(config: Config) -> Head | None:
    """The classification head that the objective of a configuration trains."""
    return objective_of(config).head(config.objective)


def encoding_of(config: Config) -> RowEncoding:
    """How the objective of a configuration makes documents of rows."""
    return objective_of(config).encoding(config.objective)


def register(objective: Objective) -> None:
    """Make an objective known by the name of its section, to configurations too."""
    OBJECTIVES[add_objective(objective.config)] = objective
