"""The strictness that every configuration section shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings: unknown keys are errors, and nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
