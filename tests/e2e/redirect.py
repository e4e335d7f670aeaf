"""What the proxies on a host share: its outgoing connections are redirected to them (see `Node` in
cluster.py), and go on to where they were meant to go. A proxy's own carry a mark and are not
redirected."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

SO_ORIGINAL_DST = 80
SO_MARK = 36
MARK = 7
CHUNK = 1 << 16


def onward(client: socket.socket) -> socket.socket | None:
    """A connection to where `client` was meant to go; None, and `client` closed, without one."""
    packed = client.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
    port, address = struct.unpack("!2xH4s8x", packed)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
    try:
        server.connect((socket.inet_ntoa(address), port))
    except OSError:
        server.close()
        client.close()
        return None
    return server


def serve(handle: Callable[[socket.socket], None]) -> None:
    """Says where it listens, and handles each connection in a thread; for ever."""
    listener = socket.create_server(("0.0.0.0", 0), backlog=64)
    print(f"listening on {listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=handle, args=(client,), daemon=True).start()
