"""Makes the pictures of the README from a run: its report, a preview of its data, a plan, and the chat page.

    pip install playwright                       # and Chromium on the PATH; the project itself needs neither
    python scripts/pictures.py RUN --config run.yaml --plan configs/plan/8b-lora.yaml --out docs/pictures

Nothing is drawn by hand: pages are photographed in a browser, and what commands print is written as SVG.
"""

import argparse
import os
import pty
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml
from rich.console import Console
from rich.text import Text

WIDTH = 100  # columns of a terminal
FTJAX = [sys.executable, "-P", "-m", "ftjax"]  # that of this interpreter, not a folder of that name here
QUESTION = "My flight was cancelled and the airline offers a voucher. What should I do?"


def printed(command: list[str]) -> str:
    """Return what a command prints in a terminal, with its colours."""
    reading, writing = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    process = subprocess.Popen([*FTJAX, *command], stdout=writing, stderr=subprocess.DEVNULL, env=environment)
    os.close(writing)
    parts = []
    while True:
        try:
            part = os.read(reading, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    if process.wait():
        raise SystemExit(f"ftjax {' '.join(command)}: exit code {process.returncode}\n{b''.join(parts).decode()}")
    return b"".join(parts).decode().replace("\r\n", "\n")


def terminal(command: list[str], out: Path, shown: str, lines: slice) -> None:
    """Write what a command prints as SVG.

    Args:
        shown: the command as the title.
        lines: which of them.
    """
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("\n".join(printed(command).split("\n")[lines])))
    console.save_svg(str(out), title=shown)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def photograph(browser, page: str, out: Path, height: int, ask: str | None = None) -> None:
    """Take a picture of a page; with `ask`, of the chat page after this question was answered."""
    tab = browser.new_page(viewport={"width": 1100, "height": height}, device_scale_factor=1.5)
    tab.goto(page)
    if ask is not None:
        tab.check("#shade")
        tab.fill("#max_tokens", "96")
        tab.fill("#temperature", "0")
        tab.fill("#text", ask)
        tab.click("#send")
        tab.wait_for_selector("#halt:not([hidden])")
        tab.wait_for_selector("#send:not([hidden])", timeout=600_000)
    tab.screenshot(path=str(out))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--config", required=True, help="whose data is previewed")
    arguments.add_argument("--plan", required=True, help="what is planned for v5e-16")
    arguments.add_argument("--ask", default=QUESTION, help="what is asked on the chat page")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    terminal(["preview", given.config, "--examples", "1"], given.out / "preview.svg", "ftjax preview run.yaml", slice(0, 34))
    plan = ["plan", given.plan, "--topology", "v5e-16"]
    terminal(plan, given.out / "plan.svg", f"ftjax {' '.join(plan)}", slice(None))
    report = given.out / "report.html"
    subprocess.run([*FTJAX, "report", str(given.run), "--out", str(report)], check=True)

    from playwright.sync_api import sync_playwright

    base, port = yaml.safe_load((given.run / "config.yaml").read_text())["model"]["path"], free_port()
    server = subprocess.Popen(
        [*FTJAX, "serve", base, "--adapter", f"tuned={given.run / 'final'}", "--port", str(port), "--dtype", "float32"]
    )
    try:
        with sync_playwright() as made:
            browser = made.chromium.launch(executable_path=shutil.which("chromium"))
            photograph(browser, report.resolve().as_uri(), given.out / "report.png", 1200)
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    if server.poll() is not None:
                        raise SystemExit(f"the server has ended with {server.returncode}") from None
                    time.sleep(1)
            photograph(browser, f"http://127.0.0.1:{port}/", given.out / "chat.png", 760, given.ask)
            browser.close()
    finally:
        server.terminate()
        server.wait()
        report.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
