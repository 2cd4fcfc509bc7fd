"""Stands in for the Hugging Face Hub on this machine: the requests with which huggingface_hub pushes and downloads.

The token `hf_test` is that of the user `me`, who may write under `me/`. Repositories in `gated` require accepted terms.
Processes that tests start reach it through HF_ENDPOINT.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """The repositories of the server, and the requests that it received."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # by SHA-256, before a commit names them
    uploads: list[str] = field(default_factory=list)  # SHA-256 of each uploaded object
    downloads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    hang_after: int | None = None  # this many objects are accepted; the next request is never answered
    hanging: threading.Event = field(default_factory=threading.Event)
    taking: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    processes: list[subprocess.Popen] = field(default_factory=list)

    def run(self, code: str, home: Path, **environment: str) -> subprocess.Popen:
        """Run Python code in a process that uses this server as the Hub; its cache is in `home`."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        wanted = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={name: value for name, value in (known | wanted | environment).items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process


PATIENCE = 600  # seconds that a test waits for an event: long enough for a busy machine


@contextmanager
def serving() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        for process in server.hub.processes:  # even if the test failed
            process.kill()
            process.communicate()
        server.hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Print nothing."""

    def answer(self, status: int, body: dict | list | bytes = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do(self) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        body = self.body()
        if path.startswith("/lfs/"):  # like S3, it trusts the address
            return self.take_object(hub, path.removeprefix("/lfs/"), body)
        signed = self.headers.get("Authorization")
        if signed is not None and signed != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(hub, json.loads(body))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2]).removesuffix(".git")
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not signed):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        rest = parts[2:]
        if repository.gated:
            return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        if rest[:1] == ["revision"] and rest[1] not in ("main", repository.sha):
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": file} for file in repository.files]
            return self.answer(200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings})
        if rest[0] == "tree":
            return self.answer(200, [entry(file, data) for file, data in repository.files.items()])
        if rest[0] == "preupload":
            return self.answer(200, {"files": [mode(file) for file in json.loads(body)["files"]]})
        if rest[:2] == ["info", "lfs"]:
            return self.answer(200, {"objects": [self.batch(hub, each) for each in json.loads(body)["objects"]]})
        if rest[0] == "commit":
            return self.commit(hub, name, repository, body)
        if rest[0] == "resolve":
            return self.resolve(hub, repository, "/".join(rest[2:]))
        return self.answer(500, {"error": f"the stand-in does not know {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = do

    def create(self, hub: Hub, asked: dict) -> None:
        owner = asked["organization"] or "me"
        if owner != "me":
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            return self.answer(403, {"error": message}, X_Error_Message=message.replace("'", ""))
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{hub.endpoint}/{name}", "name": name}
        if name in hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **answer})
        hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self.answer(200, answer)

    def batch(self, hub: Hub, asked: dict) -> dict:
        if asked["oid"] in hub.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{asked['oid']}"}}}

    def take_object(self, hub: Hub, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        with hub.taking:  # two that come at once are not both the first
            hangs = hub.hang_after is not None and len(hub.uploads) >= hub.hang_after
            if not hangs:
                hub.uploads.append(oid)
                hub.objects[oid] = body
        if hangs:
            hub.hanging.set()
            hub.released.wait()
            return
        self.answer(200)

    def commit(self, hub: Hub, name: str, repository: Repository, body: bytes) -> None:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = hub.objects[value["oid"]]
        repository.commits += 1
        url = f"{hub.endpoint}/{name}/commit/{repository.sha}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": repository.sha})

    def resolve(self, hub: Hub, repository: Repository, file: str) -> None:
        if file not in repository.files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data = repository.files[file]
        if self.command == "GET":
            hub.downloads.append(file)
        self.answer(200, data, ETag=f'"{blob_id(data)}"', X_Repo_Commit=repository.sha)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(file: str, data: bytes) -> dict:
    return {"type": "file", "path": file, "size": len(data), "oid": blob_id(data)}


def mode(file: dict) -> dict:
    large = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}
