"""Tests of the documentation as a site: what is generated is complete, and it builds without warnings."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ftjax.cli import app
from ftjax.config.reference import parts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_has_a_row(site):
    text = site.configuration()
    for part in parts():
        title = f"### {part.name}: {part.variant}" if part.variant else f"## {part.name}"
        _, _, rest = text.partition(f"\n{title}\n")
        own = re.split(r"\n##", rest, maxsplit=1)[0]
        assert [key.name for key in part.keys if f"\n| `{key.name}` |" not in own] == [], title
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows), "a cell divides its row"


def test_every_command_and_option_is_there(site):
    text = site.commands()
    for name, command in typer.main.get_command(app).commands.items():
        _, _, rest = text.partition(f"\n## ftjax {name}\n")
        own = rest.partition("\n## ")[0]
        missing = [opt for one in command.params for opt in one.opts if opt.startswith("--") and opt not in own]
        assert set(missing) <= {"--help"}, name


@pytest.mark.parametrize("text, source, wanted", [
    ("[a](data.md#x)", "docs/api.md", "[a](data.md#x)"),
    ("[a](docs/data.md)", "README.md", "[a](data.md)"),
    ("![a](docs/pictures/chat.png)", "README.md", "![a](pictures/chat.png)"),
    ("[a](../tpu/README.md)", "docs/multihost.md", "[a](tpu.md)"),
    ("[LICENSE](LICENSE)", "README.md", "`LICENSE`"),
    ("[a](https://x.org)", "README.md", "[a](https://x.org)"),
    ("```\n[a](b.py)\n```", "README.md", "```\n[a](b.py)\n```"),
])  # fmt: skip
def test_links_stay_within_the_site(site, text, source, wanted):
    assert site.rewritten(text, source) == wanted


def test_messages_of_the_troubleshooting_page_exist():
    """The words between the dots of a quoted message are in the code, so that a search for them finds the page."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "ftjax").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go over lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = [part for part in page.split("\n\n") if part.startswith("| message |")]
    quoted = [row.split("`")[1] for table in tables for row in table.splitlines()[2:]]
    assert len(quoted) > 8
    for message in quoted:
        for words in filter(None, (part.strip(" ;") for part in message.split("..."))):
            assert words in code, f"{message}: {words!r} is in no message"


def test_it_builds_without_warnings(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("mkdocs-material and mkdocstrings are not installed (extra: docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "ftjax.api.run.train" in page and "&gt;&gt;&gt;" in page
