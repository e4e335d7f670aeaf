"""A transparent TCP proxy that flips one bit of one byte, once.

`flip.py AFTER`: the byte at offset AFTER of the first connection that sends as many.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

from redirect import CHUNK, onward, serve

_once = threading.Lock()


def forward(source: socket.socket, sink: socket.socket, flip_at: int | None) -> None:
    passed = 0
    try:
        while data := source.recv(CHUNK):
            offset = None if flip_at is None else flip_at - passed
            if offset is not None and 0 <= offset < len(data) and _once.acquire(blocking=False):
                changed = bytearray(data)
                changed[offset] ^= 0x10
                data = bytes(changed)
                print(f"flipped byte {flip_at} to {sink.getpeername()}", flush=True)
            passed += len(data)
            sink.sendall(data)
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def main() -> None:
    flip_at = int(sys.argv[1])

    def handle(client: socket.socket) -> None:
        server = onward(client)
        if server is None:
            return
        back = threading.Thread(target=forward, args=(server, client, None), daemon=True)
        back.start()
        forward(client, server, flip_at)
        back.join()
        client.close()
        server.close()

    serve(handle)


if __name__ == "__main__":
    main()
