"""The verbs as tests use them: the command line in this process; `evaluate` and `check` on one device; `generate` and `chat` by
the names of their options."""

from dataclasses import fields
from functools import partial

import pytest
from oracle import ONE

from ftjax import cli
from ftjax.evaluate.check.command import check as run_check
from ftjax.evaluate.command import evaluate as run_evaluate
from ftjax.evaluate.lm_eval.command import evaluate_harness as run_harness
from ftjax.generate.chat import SAMPLING
from ftjax.generate.chat import chat as run_chat
from ftjax.generate.command import generate as run_generate
from ftjax.generate.named import LoadOptions
from ftjax.generate.request import Request

evaluate, check, evaluate_harness = (partial(run, devices=ONE) for run in (run_evaluate, run_check, run_harness))


def ftjax(*arguments: str) -> int:
    """The exit code of `ftjax ARGUMENTS`, which has all devices."""
    with pytest.raises(SystemExit) as caught:
        cli.app(list(arguments), prog_name="ftjax")
    return caught.value.code or 0


def _options(settings) -> LoadOptions:
    names = {field.name for field in fields(LoadOptions)}
    return LoadOptions(**{name: settings.pop(name) for name in names & settings.keys()})


def generate(model, *, prompt=(), prompts=None, system=None, raw=False, batch_size=32, as_json=False, **settings):
    options = _options(settings)
    given = {"prompt": prompt, "prompts": prompts, "system": system, "raw": raw, "batch_size": batch_size, "as_json": as_json}
    run_generate(model, Request.of(**settings), options, **given)


def chat(model, *, system=None, **settings):
    options = _options(settings)
    sampling = {name: settings.pop(name) for name in SAMPLING if name in settings}
    run_chat(model, Request(**{"max_new_tokens": 512, **settings}), options, system=system, sampling=sampling)
