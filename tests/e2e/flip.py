"""A transparent TCP proxy that flips one bit of one byte, once. Run on a host whose outgoing
connections are redirected to it; its own carry mark 7 and are not.

    flip.py AFTER        the byte at offset AFTER of the first connection that sends as many
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading

SO_ORIGINAL_DST = 80
SO_MARK = 36
MARK = 7
CHUNK = 1 << 16

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


def serve(client: socket.socket, flip_at: int) -> None:
    packed = client.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
    port, address = struct.unpack("!2xH4s8x", packed)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
    try:
        server.connect((socket.inet_ntoa(address), port))
    except OSError:
        client.close()
        return
    back = threading.Thread(target=forward, args=(server, client, None), daemon=True)
    back.start()
    forward(client, server, flip_at)
    back.join()
    client.close()
    server.close()


def main() -> None:
    flip_at = int(sys.argv[1])
    listener = socket.create_server(("0.0.0.0", 0), backlog=64)
    print(f"listening on {listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, flip_at), daemon=True).start()


if __name__ == "__main__":
    main()
