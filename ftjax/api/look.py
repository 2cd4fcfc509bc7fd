"""What a run will see and need, before it is started."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from ftjax.api.settings import Settings, settings_of
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.plan.result import Plan


def preview(config: Settings, *, examples: int = 3, html: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Return the data as the model sees it, with its counts; train nothing.

    >>> rows = [{"prompt": "Tom went", "completion": " home."}, {"prompt": "The dog", "completion": " ran."}]
    >>> seen = ftjax.preview({"model": {"path": "model"}, "data": {"train": rows}}, examples=1)
    >>> seen["train"]["kept"], seen["examples"][0]["where"]
    (2, 'memory:train[0]')

    Args:
        config, overrides: as for `train`.
        examples: how many rows to show.
        html: a file to write the preview to.

    Returns: `examples`, each with tokens, texts and weights, for `train` and `validation` the counts, and `personal_data`: how
        many rows have it, and where.

    Raises UserError, with file and line, for anything that is wrong with the data.
    """
    return preview_config(settings_of(config, overrides), html=None if html is None else Path(html), examples=examples)


def preview_config(
    config: Config, *, html: Path | None = None, as_json: bool = False, console: Any = None, examples: int = 3
) -> dict[str, Any]:
    """Preview a validated configuration; both `preview` and the command call this. Args: console: None prints nothing."""
    from ftjax.data.preview import preview as show
    from ftjax.hub.load import positions_of
    from ftjax.hub.tokenizer.load import load_tokenizer
    from ftjax.hub.vocabulary import embeddings_of
    from ftjax.objectives import encoding_of, objective_of

    config, embeddings = objective_of(config).complete(config), None
    with suppress(UserError):  # data can be looked at without a model that can be trained
        embeddings = embeddings_of(config)
    return show(
        config, load_tokenizer(config.model), html=html, as_json=as_json, console=console, examples=examples,
        positions=positions_of(config.model.path, config.model.revision), embeddings=embeddings, encoding=encoding_of(config),
    )  # fmt: skip


def plan(
    config: Settings, topology: str, *, chips: int | None = None, slices: int = 1, price: float | None = None, **overrides: Any
) -> Plan:
    """Compile the training step for devices that need not be present; return the memory and the least time it needs.

    >>> plan = ftjax.plan({"model": {"path": "model"}, "data": {"train": "train.jsonl"}}, "cpu:1", mesh={"fsdp": 1})
    >>> plan.devices, plan.memory["total"] > 0
    (1, True)

    Args:
        config, overrides: as for `train`. Only the model's config.json is read.
        topology: `v5e-16`, `v5p-64`, `v6e:2x4`, `v5e` with `chips`, or `cpu:8`.
        chips: number of chips in one slice.
        slices: number of slices.
        price: of a chip-hour.

    Raises UserError for an unknown topology, and for anything that does not fit the model or the topology.
    """
    from ftjax.plan.plan import check_price, make_plan
    from ftjax.plan.topology import parse

    check_price(price)
    return make_plan(settings_of(config, overrides), parse(topology, chips, slices), price)
