"""A trainer that has no directory in common with anybody: it uploads its checkpoint over HTTP, in
parts, sends only what is not there yet, and has it committed. A module for tests, and a program
that tests may kill.

It prints a line for everything that it did; `--help` tells its arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

LIMIT = 90.0
JSON = {"Content-Type": "application/json"}


_SAYING = threading.Lock()


def say(*words: object) -> None:
    # Two threads speak, and `print` writes a line in pieces.
    with _SAYING:
        print(*words, flush=True)


class Client:
    """Asks the leader; each call on a connection of its own."""

    def __init__(self, address: str, token: Path) -> None:
        self.address = address
        self.bearer = {"Authorization": f"Bearer {token.read_text().strip()}"}

    def connect(self) -> http.client.HTTPConnection:
        host, _, port = self.address.rpartition(":")
        return http.client.HTTPConnection(host, int(port), timeout=LIMIT)

    def call(
        self, method: str, path: str, body: Any = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, JSON and headers of an answer."""
        with contextlib.closing(self.connect()) as connection:
            payload = None if body is None else json.dumps(body)
            connection.request(method, f"/v1/weights/{path}", payload, {**JSON, **self.bearer})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None, answer.headers

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        status, found, _ = self.call(method, path, body)
        assert 200 <= status < 300, f"{method} {path}: {status} {found}"
        return found

    def put(self, path: str, data: bytes, first: int, total: int, stop_at: int | None) -> None:
        """A part; with `stop_at` only so many bytes of it, and then nothing happens any more."""
        with contextlib.closing(self.connect()) as connection:
            connection.putrequest("PUT", f"/v1/weights/{path}")
            for name, value in self.bearer.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(data)))
            connection.putheader("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
            connection.endheaders()
            connection.send(data[:stop_at])
            if stop_at is not None:
                say("stopped")
                signal.pause()
            answer = connection.getresponse()
            assert answer.status == 200, f"PUT {path}: {answer.status} {answer.read()!r}"


def missing(ranges: list[list[int]], size: int, part: int) -> list[tuple[int, int]]:
    """What is not there, in parts: from, to (not included)."""
    found = []
    at = 0
    for start, end in [*ranges, [size, size]]:
        found += [(first, min(first + part, start)) for first in range(at, start, part)]
        at = end
    return found


class Update:
    """An update by HTTP; its phases and its report are printed as they come."""

    def __init__(self, client: Client, wanted: dict[str, Any]) -> None:
        self.asked = threading.Event()
        self.report: dict[str, Any] = {}
        self.thread = threading.Thread(target=self._follow, args=(client, wanted), daemon=True)
        self.thread.start()

    def _follow(self, client: Client, wanted: dict[str, Any]) -> None:
        with contextlib.closing(client.connect()) as connection:
            headers = {**JSON, **client.bearer, "Accept": "text/event-stream"}
            connection.request("POST", "/v1/weights/updates", json.dumps(wanted), headers)
            answer = connection.getresponse()
            # From here on the leader knows of it, or of one more who asks for it.
            self.asked.set()
            kind = ""
            while line := answer.readline().decode():
                name, _, value = line.strip().partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind == "progress":
                    say("phase", json.loads(value)["phase"])
                elif name and not line.startswith(":"):
                    say(kind or answer.status, value or line.strip())
                    if kind == "report" and name == "data":
                        self.report = json.loads(value)

    def wait(self) -> bool:
        """Whether it was committed."""
        self.thread.join(LIMIT)
        return self.report.get("status") == "committed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leader", required=True, help="address of its --http")
    parser.add_argument("--token", type=Path, required=True, help="file with the secret")
    parser.add_argument("--file", type=Path, required=True, help="what to upload")
    parser.add_argument("--upload", required=True, help="id of the upload")
    parser.add_argument("--version", required=True, help="what to commit it as")
    parser.add_argument("--update", required=True, help="id of the update")
    parser.add_argument("--begin", choices=["before", "after"], help="the update; than the bytes")
    parser.add_argument("--part", type=int, default=1 << 20, help="bytes of a part")
    parser.add_argument("--shuffle", help="parts in the order of this seed")
    parser.add_argument("--hold", action="store_true", help="send nothing before SIGUSR1")
    parser.add_argument("--stop-at", type=int, help="stop when so many bytes are sent")
    args = parser.parse_args()

    let_go = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: let_go.set())
    client = Client(args.leader, args.token)
    data = args.file.read_bytes()
    path = f"uploads/{args.upload}/{args.file.name}"
    files = [{"name": args.file.name, "size": len(data)}]
    client.ok("POST", "uploads", {"id": args.upload, "files": files})
    (there,) = client.ok("GET", f"uploads/{args.upload}")["files"]
    _, _, headers = client.call("HEAD", path)
    say("offset", headers["Upload-Offset"], "of", headers["Upload-Length"])
    wanted = {"upload": args.upload, "version": args.version, "id": args.update}
    update = None
    if args.begin == "before":
        update = Update(client, wanted)
        assert update.asked.wait(LIMIT), "nobody has heard of the update"
    if args.hold:
        say("holding")
        assert let_go.wait(LIMIT), "nobody lets it go"
    parts = missing(there["ranges"], len(data), args.part)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(parts)
    sent = 0
    for first, end in parts:
        stop = None
        if args.stop_at is not None and sent + end - first > args.stop_at:
            stop = args.stop_at - sent
        client.put(path, data[first:end], first, len(data), stop)
        sent += end - first
    say("sent", sent)
    update = update or Update(client, wanted)
    return 0 if update.wait() else 1


if __name__ == "__main__":
    sys.exit(main())
