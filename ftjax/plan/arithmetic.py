"""FLOPs of a program, counted from its jaxpr: loops by their trip counts, kernels by the blocks that they run.

XLA's own cost analysis counts the body of a loop once, however often it runs, and a layer scan is such a loop. Here every
matrix product and convolution counts two FLOPs per multiply-add, on all devices; elementwise work, which the matrix units do
not do, is left out. What remat recomputes is in the jaxpr and so is counted.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters import partial_eval

from ftjax.models.nn.loops import named_runs

Values = Mapping[Any, np.ndarray]


def program_flops(traced: Any) -> float:
    """Return the FLOPs of one call of a traced function (`jax.jit(f).trace(...)`), on all devices."""
    closed = traced.jaxpr
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return _flops(live, dict(zip(live.constvars, closed.consts, strict=False)))


def _flops(jaxpr: Jaxpr, known: Values) -> float:
    """Count the FLOPs of a jaxpr; `known` maps variables to constants: the tables by which kernels skip blocks."""
    known, total = dict(known), 0.0
    for eqn in jaxpr.eqns:
        total += _of(eqn, known)
        if eqn.primitive.name in _PASSED_ON and eqn.invars and (value := _value(eqn.invars[0], known)) is not None:
            known[eqn.outvars[0]] = value
    return total


# Operations that keep the number of zeros in a kernel's table, which is all that is counted of it.
_PASSED_ON = {
    "broadcast_in_dim", "convert_element_type", "reshape", "device_put", "copy", "copy_p", "squeeze", "sharding_constraint",
    "pvary", "pcast",
}  # fmt: skip


def _value(var: Any, known: Values) -> Any:
    return var.val if isinstance(var, Literal) else known.get(var)


def _of(eqn: JaxprEqn, known: Values) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sizes = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(sizes[i] for i in contracted)
    if name == "ragged_dot" or name == "ragged_dot_general":  # only rows of a group are computed
        (contracted, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        rows = math.prod(eqn.invars[0].aval.shape)
        right = eqn.invars[1].aval.shape
        groups = eqn.invars[2].aval.shape[-1]
        return 2.0 * rows * math.prod(right) / (groups * math.prod(eqn.invars[0].aval.shape[i] for i in contracted))
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    if name == "scan":
        return params["length"] * _inside(eqn, params["jaxpr"], known)
    if name == "cond":
        return max(_inside(eqn, branch, known, skip=1) for branch in params["branches"])
    if name == "shard_map":
        copies = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return copies * _inside(eqn, params["jaxpr"], known)
    if name == "pallas_call":
        return _kernel(eqn, known)
    if name == "while":
        runs = named_runs(str(eqn.source_info.name_stack))
        return (1 if runs is None else runs) * _inside(eqn, params["body_jaxpr"], known, skip=params["cond_nconsts"])
    if name in ("custom_vjp_call", "custom_jvp_call"):
        return _inside(eqn, params["call_jaxpr"], known)
    return sum(_inside(eqn, inner, known) for inner in jaxprs_in_params(params))


def _inside(eqn: JaxprEqn, inner: Jaxpr | ClosedJaxpr, known: Values, skip: int = 0) -> float:
    """Count the FLOPs of a jaxpr in an equation's parameters, whose arguments are the equation's from index `skip` on."""
    own: dict[Any, Any] = {}
    if isinstance(inner, ClosedJaxpr):
        own.update(zip(inner.jaxpr.constvars, inner.consts, strict=True))
        inner = inner.jaxpr
    for outer, var in zip(eqn.invars[skip:], inner.invars, strict=False):
        value = _value(outer, known)
        if value is not None and np.shape(value):
            own[var] = value
    return _flops(inner, own)


def _kernel(eqn: JaxprEqn, known: Values) -> float:
    """Count a Pallas kernel: its body for each step of its grid, or for those that its table of blocks does not skip."""
    if "ragged_paged_attention" in str(eqn.params.get("name")):  # as if all its tables were full
        _, table, _, _, _, q, pages = (var.aval.shape for var in eqn.invars)
        return 4.0 * math.prod(q) * table[1] * pages[1]  # scores and their sum with the values
    mapping = eqn.params["grid_mapping"]
    steps = math.prod(size for size in mapping.grid if isinstance(size, int))
    share = 1.0
    if "splash" in str(eqn.params.get("name")):
        # Its second table has an entry per head, block of queries and block of keys: 0 where the block is fully masked.
        table = _value(eqn.invars[1], known)
        share = 1.0 if table is None else float(np.mean(np.asarray(table) != 0))
    body = eqn.params["jaxpr"]
    return steps * share * _flops(body.jaxpr if isinstance(body, ClosedJaxpr) else body, {})
