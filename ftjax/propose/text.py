"""A proposal as a file: sections, settings and reasons as comments."""

import json
import re
from itertools import groupby
from typing import Any

from ftjax.config.examples import comment
from ftjax.config.interpolate import escape
from ftjax.config.yaml_text import dump
from ftjax.propose.propose import Proposal
from ftjax.version import __version__


def text_of(proposal: Proposal, command: str) -> str:
    """Return the YAML file. Args: command: what wrote it."""
    lines = [
        f"# Written by ftjax {__version__}: {command}",
        "# Each comment says why; ftjax config KEY says what a key does.",
        "#",
        "#   ftjax preview FILE   shows the data as the model sees it",
        "#   ftjax train FILE     trains, and resumes if it was stopped",
        *(line for warning in proposal.warnings for line in comment(f"Note: {warning}.", "")),
    ]
    for section, settings in groupby(proposal.settings, key=lambda one: one.key.partition(".")[0]):
        lines.append("")
        indent = ""
        for number, one in enumerate(settings):
            name = one.key.partition(".")[2]
            if name and not number:
                lines.append(f"{section}:")
            indent = "  " if name else ""
            lines += [*comment(one.why, indent), f"{indent}{name or section}: {_on_one_line(escape(one.value))}"]
    return "\n".join(lines) + "\n"


def _on_one_line(value: Any) -> str:
    """Return a value on one line of YAML; texts that need care are in JSON's quotes, which YAML reads too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_on_one_line, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_on_one_line(key)}: {_on_one_line(one)}' for key, one in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        return json.dumps(value, ensure_ascii=False)
    return dump([value])[2:].strip()
