"""A stand-in for the Hugging Face hub over HTTP: one model, from a directory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from processes import LOOPBACK

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Answers `huggingface_hub` about model `name`, in every revision that is asked for."""

    daemon_threads = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__((LOOPBACK, 0), Handler)
        self.name = name
        self.folder = folder
        # Files that were read, in order.
        self.given: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        name = re.escape(hub.name)
        files = sorted(file.name for file in hub.folder.iterdir())
        if re.fullmatch(rf"/api/models/{name}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": file} for file in files]
            self.json(
                {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": siblings}, body
            )
        elif re.fullmatch(rf"/api/models/{name}/tree/[^/]+", path):
            entries = [
                {
                    "type": "file",
                    "path": file,
                    "size": (hub.folder / file).stat().st_size,
                    "oid": COMMIT,
                }
                for file in files
            ]
            self.json(entries, body)
        elif (match := re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path)) is None:
            self.refuse("RepoNotFound", "Repository Not Found")
        elif match[1] not in files:
            self.refuse("EntryNotFound", "Entry not found")
        else:
            content = (hub.folder / match[1]).read_bytes()
            if body:
                hub.given.append(match[1])
            self.send("application/octet-stream", content, body)

    def json(self, content: object, body: bool) -> None:
        self.send("application/json", json.dumps(content).encode(), body)

    def refuse(self, code: str, text: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": text}
        self.send("text/plain", text.encode(), self.command == "GET", 404, headers)

    def send(
        self,
        kind: str,
        content: bytes,
        body: bool,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def hub_of(name: str, folder: Path) -> Iterator[Hub]:
    """The hub, on a port of its own, until the block ends."""
    with Hub(name, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join(10)
        assert not thread.is_alive(), "the stand-in for the hub still serves"
