"""Runs a Cloud Storage bucket on this machine, `gs://bucket`; it can refuse some requests, as the real service does."""

import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

import pytest

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/?]+)\?(?:.*&)?alt=media")


@contextmanager
def bucket(refuse_every: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield `(environment variables for its users, the requests refused so far)`.

    Args:
        refuse_every: refuse one request in this many, with 503 "try again".
    """
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    count, refused, one_at_a_time = itertools.count(1), [], threading.Lock()

    class Sometimes(emulator.RequestHandler):
        def _answer(self, method: str, answer) -> None:
            if next(count) % refuse_every:
                with one_at_a_time:
                    return answer()
            refused.append(f"{method} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self._answer("GET", super().do_GET)

        def do_POST(self):
            self._answer("POST", super().do_POST)

        def do_PUT(self):
            self._answer("PUT", super().do_PUT)

        def do_PATCH(self):
            self._answer("PATCH", super().do_PATCH)

        def do_DELETE(self):
            self._answer("DELETE", super().do_DELETE)

    class WithGeneration(emulator.Response):
        """Says which version of an object this is, as the service does. A writer that has read an object replaces no other."""

        def close(self):
            handler = self._handler
            read = OBJECT.match(handler.path) if handler.command == "GET" and self.status in (200, 206) else None
            if read:
                self["x-goog-generation"] = handler.storage.get_file_obj(read[1], unquote(read[2]))["generation"]
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "RequestHandler", Sometimes)
        patch.setattr(emulator, "Response", WithGeneration)
        patch.setattr(emulator.server, "HTTPServer", ThreadingHTTPServer)  # an idle connection does not keep others waiting
        server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
        server.start()
        try:
            address = f"http://localhost:{server._api._httpd.server_address[1]}"
            token = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
            yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, **token}, refused
        finally:
            server.stop()
