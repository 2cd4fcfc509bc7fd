#!/usr/bin/env python3
"""Keeps `ftjax serve` busy for a while: no answer may be wrong, lost or mixed, memory stays flat, and SIGTERM drains.

    python scripts/soak_serve.py --model DIR --adapters DIR [--seconds 1200] [--clients 32] [--every 10] [--json FILE]

DIR of the adapters holds two LoRA folders or more. Each request is asked once alone, of the base model and of each adapter.
Then clients ask them again in random order, all at the same time: whole, streamed, hung up half-way, or with something wrong
in them, while another adapter takes the name `swapped` every few seconds. Exits with 1 if an answer is not the one that the
request had alone, a wrong request is not refused with 4xx, or the server does not end after SIGTERM.
"""

import argparse
import atexit
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

WORDS = ("Tom", "went to", "the park", "and saw", "a big", "dog", "that ran", "after", "its ball", "in the sun")
WRONG = [{"temperature": -1}, {"n": 0}, {"max_tokens": 10**9}, {"prompt": []}, {"unknown": 1}, {"stop": [1]}, {"model": "none"}]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--adapters", type=Path, required=True, help="a folder of LoRA folders")
    p.add_argument("--seconds", type=float, default=1200)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--every", type=float, default=10, help="seconds from one adapter to the next")
    p.add_argument("--requests", type=int, default=24, help="different requests")
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    return p.parse_args()


def made(number: int, context: int) -> dict[str, Any]:
    """Return request `number`: a prompt of its own length, greedy or sampled."""
    rng = random.Random(number)
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, context // 16)))
    more = {"temperature": 0} if number % 3 else {"temperature": 1.0, "seed": number, "top_p": 0.95}
    return {"prompt": text, "max_tokens": rng.randint(1, context // 4), "n": 1 + (number % 7 == 0), **more}


class Server:
    """The process of a server, and requests to it."""

    def __init__(self, a: argparse.Namespace):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "ftjax", "serve", a.model, "--adapter-root", a.adapters, "--max-adapters", 4, "--port",
            self.port, "--name", "base", "--rows", a.rows, "--context", a.context, "--dtype", a.dtype, "--max-requests", 1000,
        ]  # fmt: skip
        self.process = subprocess.Popen(list(map(str, command)))
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server has not started")
            try:
                self.ask("/health", None)
                return
            except OSError:
                time.sleep(0.2)

    def ask(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            headers = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def texts(self, model: str, body: dict[str, Any], streamed: bool = False) -> list[str] | int:
        """Return the texts of a completion, or the status if there are none."""
        status, found = self.ask("/v1/completions", {**body, "model": model, "stream": streamed})
        if status != 200:
            return status
        if not streamed:
            return [one["text"] for one in json.loads(found)["choices"]]
        texts = [""] * body["n"]
        *events, last = [line.removeprefix("data: ") for line in found.decode().split("\n\n") if line]
        for event in map(json.loads, events):
            if "error" in event:
                return 500
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        return texts if last == "[DONE]" else 500

    def hang_up(self, model: str, body: dict[str, Any], after: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        asked = json.dumps({**body, "model": model, "stream": True})
        connection.request("POST", "/v1/completions", asked, {"content-type": "application/json"})
        time.sleep(after)
        connection.close()

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def client(number: int, server: Server, requests: list, want: dict, until: float, counts: Counter, problems: list) -> None:
    rng = random.Random(1000 + number)
    while time.monotonic() < until:
        which, model = rng.randrange(len(requests)), rng.choice(["base", "fixed", "swapped"])
        kind = rng.choices(["whole", "streamed", "hung up", "wrong"], [5, 3, 1, 1])[0]
        counts[kind] += 1
        if kind == "hung up":
            server.hang_up(model, requests[which], rng.random())
            continue
        if kind == "wrong":
            status, text = server.ask("/v1/completions", {**requests[which], "model": model, **rng.choice(WRONG)})
            if not 400 <= status < 500:
                problems.append(f"a wrong request: {status} {text[:200]!r}")
            continue
        found = server.texts(model, requests[which], kind == "streamed")
        if model == "swapped" and found == 404:  # between two adapters
            counts["no adapter"] += 1
        elif found not in want[model][which]:
            problems.append(f"request {which} of {model}: {found!r}; expected {want[model][which]!r}")


def main() -> int:
    a = arguments()
    folders = sorted(one.name for one in a.adapters.iterdir() if (one / "adapter_config.json").is_file())
    requests = [made(number, a.context) for number in range(a.requests)]
    server = Server(a)
    atexit.register(server.process.kill)  # where something fails here, nothing else ends it
    load = lambda name, folder: server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})[0]  # noqa: E731
    alone = {"base": [server.texts("base", one) for one in requests]}
    for folder in folders:
        assert load(folder, folder) == 200, folder
        alone[folder] = [server.texts(folder, one) for one in requests]
        server.ask("/v1/unload_lora_adapter", {"lora_name": folder})
    want = {"base": [[one] for one in alone["base"]], "fixed": [[one] for one in alone[folders[0]]]}
    want["swapped"] = [[alone[folder][n] for folder in folders[1:]] for n in range(len(requests))]
    load("fixed", folders[0])
    load("swapped", folders[1])
    counts, problems, memory = Counter(), [], []
    began = time.monotonic()
    until = began + a.seconds
    threads = [
        threading.Thread(target=client, args=(n, server, requests, want, until, counts, problems)) for n in range(a.clients)
    ]
    for thread in threads:
        thread.start()
    swaps = 0
    while time.monotonic() < until:
        time.sleep(min(a.every, max(0.0, until - time.monotonic())))
        memory.append(round(server.memory(), 1))
        server.ask("/v1/unload_lora_adapter", {"lora_name": "swapped"})
        swaps += 1
        while (status := load("swapped", folders[1 + swaps % (len(folders) - 1)])) != 200 and time.monotonic() < until:
            if status >= 500:
                problems.append(f"an adapter is not loaded: {status}")
            time.sleep(0.1)  # requests that still run have the places
    for thread in threads:
        thread.join()
    os.kill(server.process.pid, signal.SIGTERM)
    ended = server.process.wait(timeout=120)
    if ended:
        problems.append(f"the server ended with {ended}")
    figures = {
        "seconds": round(time.monotonic() - began), "requests": sum(counts.values()) - counts["no adapter"], **counts,
        "swaps": swaps, "memory_mb": memory, "problems": len(problems),
    }  # fmt: skip
    print(json.dumps(figures))
    for problem in problems[:10]:
        print(problem, file=sys.stderr)
    if a.json:
        a.json.write_text(json.dumps(figures, indent=2) + "\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
