"""A transparent TCP proxy through which what comes from the other side comes late.

`late.py FILE`: so many seconds late as the file says; not late while there is none.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from pathlib import Path

from redirect import CHUNK, onward, serve

TICK = 0.01


def delay(order: Path) -> float:
    try:
        return float(order.read_text())
    except FileNotFoundError:
        return 0.0


def receive(source: socket.socket, came: queue.Queue[tuple[float, bytes]]) -> None:
    """Notes when each piece, and the end, came."""
    data = b"."
    while data:
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        came.put((time.monotonic(), data))


def deliver(sink: socket.socket, came: queue.Queue[tuple[float, bytes]], order: Path) -> None:
    """Each piece when it is time, which may change while it waits; one behind the other in any
    case."""
    with contextlib.suppress(OSError):
        while True:
            when, data = came.get()
            while time.monotonic() < when + delay(order):
                time.sleep(TICK)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)


def forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main() -> None:
    order = Path(sys.argv[1])

    def handle(client: socket.socket) -> None:
        server = onward(client)
        if server is None:
            return
        came: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threads = [
            threading.Thread(target=receive, args=(server, came), daemon=True),
            threading.Thread(target=deliver, args=(client, came, order), daemon=True),
        ]
        for thread in threads:
            thread.start()
        forward(client, server)
        for thread in threads:
            thread.join()
        client.close()
        server.close()

    serve(handle)


if __name__ == "__main__":
    main()
