"""Calls `ftjax generate` and `ftjax chat` by the names of their options."""

from dataclasses import fields

from ftjax.generate.chat import SAMPLING
from ftjax.generate.chat import chat as run_chat
from ftjax.generate.command import generate as run_generate
from ftjax.generate.named import LoadOptions
from ftjax.generate.request import Request


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
