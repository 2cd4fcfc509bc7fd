"""`ftjax plan`: print a plan, or the shardings."""

import json

from ftjax.config import Config
from ftjax.console import make_console
from ftjax.plan.plan import check_price, design_for, make_plan, trace_step
from ftjax.plan.result import as_json as plain
from ftjax.plan.serve import as_json as plain_serving
from ftjax.plan.serve import plan_serving
from ftjax.plan.shardings import shardings
from ftjax.plan.show import show, show_serving, show_shardings
from ftjax.plan.topology import parse


def plan(
    config: Config, topology: str, *, chips: int | None, slices: int, price: float | None, as_json: bool, placed: bool
) -> bool:
    """Print the plan; return whether it fits (True if unknown).

    Args:
        placed: list the sharding of every array, instead of compiling.

    Raises UserError for an unknown name, and for anything wrong in the configuration.
    """
    check_price(price)
    where = parse(topology, chips, slices)
    console = make_console()
    if placed:
        made = design_for(config, where)
        rows = shardings(made, *trace_step(made))
        if as_json:
            print(json.dumps([row._asdict() for row in rows], indent=1))
        else:
            show_shardings(rows, console)
        return True
    result = make_plan(config, where, price)
    if as_json:
        print(json.dumps(plain(result), indent=1))
    else:
        show(result, console)
    return result.fits is not False


def serving(
    config: Config, topology: str, *, chips: int | None, slices: int, concurrency: int | None, context: int | None,
    as_json: bool,
) -> bool:  # fmt: skip
    """Print the plan of a server; return whether all of its rows fit with their whole context (True if unknown).

    Raises UserError as `plan` does.
    """
    result = plan_serving(config, parse(topology, chips, slices), concurrency, context)
    if as_json:
        print(json.dumps(plain_serving(result), indent=1))
    else:
        show_serving(result, make_console())
    return result.fits is not False
