"""Unmodified vLLM frontends, and clients that ask them."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import LOOPBACK, REQUEST_LIMIT, START_LIMIT, STEP_LIMIT, Process, free_port, wait_for

if TYPE_CHECKING:
    from cluster import Node

# Bounds what an engine takes; the same for engines and frontends, because vLLM compares a hash.
MODEL_FLAGS = [
    "--max-model-len",
    "256",
    "--enforce-eager",
    "--max-num-seqs",
    "8",
    "--dtype",
    "bfloat16",
    "--gpu-memory-utilization",
    "0.1",
]
IN_PROCESS_WORKER = ["--distributed-executor-backend", "uni"]


@dataclass
class Answer:
    """What became of one request."""

    prompt: str
    frontend: str
    status: int | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    began: float = 0.0
    ended: float = 0.0

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finish_reason in ("length", "stop")


class Frontend(Process):
    """An unmodified `vllm serve` that has no engine of its own."""

    def __init__(
        self,
        name: str,
        vllm: str,
        model: str,
        env: dict[str, str],
        folder: Path,
        *,
        size: int = 2,
        flags: list[str] | None = None,
        api_servers: int = 1,
        http_port: int | None = None,
        rpc_port: int | None = None,
        node: Node | None = None,
    ) -> None:
        self.host = node.address if node else LOOPBACK
        self.http_port = http_port or free_port()
        self.rpc_port = rpc_port or free_port()
        self.model = model
        command = [
            *(vllm, "serve", model, "--host", self.host, "--port", str(self.http_port)),
            *("--data-parallel-size", str(size), "--data-parallel-size-local", "0"),
            *("--data-parallel-address", self.host),
            *("--data-parallel-rpc-port", str(self.rpc_port)),
            *("--api-server-count", str(api_servers)),
            *(MODEL_FLAGS if flags is None else flags),
        ]
        super().__init__(name, command, env, folder / f"{name}.log", node)

    @property
    def handshake(self) -> str:
        return f"{self.host}:{self.rpc_port}"

    def healthy(self) -> bool:
        try:
            return http_get(self.http_port, "/health", 5.0, self.host)[0] == 200
        except OSError:
            return False

    def wait_ready(self, limit: float = START_LIMIT) -> None:
        def look():
            if self.child.poll() is not None:
                raise AssertionError(f"{self.name} ended\n{self.tail()}")
            return self.healthy()

        wait_for(f"{self.name} answers /health", limit, look, self.tail)

    def ask(
        self, prompt: str, count: int = 24, limit: float = REQUEST_LIMIT, rank: int | None = None
    ) -> Answer:
        """A completion; of this DP rank, or of one that the frontend chooses."""
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        return complete(
            self.http_port, self.model, prompt, count, limit, self.name, self.host, headers
        )

    def metric(self, name: str) -> dict[str, float]:
        """Samples of one Prometheus metric, by label text."""
        text = http_get(self.http_port, "/metrics", 10.0, self.host)[1]
        found = {}
        for line in text.splitlines():
            match = re.fullmatch(re.escape(name) + r"(\{.*\})? (\S+)", line)
            if match:
                found[match[1] or ""] = float(match[2])
        return found


def http_get(port: int, path: str, limit: float, host: str = LOOPBACK) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=limit)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def http_post(
    port: int,
    path: str,
    body: Any,
    limit: float,
    host: str = LOOPBACK,
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=limit)
    with contextlib.closing(connection):
        payload = json.dumps(body)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", path, payload, {**kind, **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read().decode()


def complete(
    port: int,
    model: str,
    prompt: str,
    count: int,
    limit: float,
    name: str = "",
    host: str = LOOPBACK,
    headers: dict[str, str] | None = None,
) -> Answer:
    """A greedy completion. Never raises: what went wrong is in the answer."""
    answer = Answer(prompt, name, began=time.monotonic())
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    try:
        answer.status, text = http_post(port, "/v1/completions", body, limit, host, headers)
        if answer.status == 200:
            choice = json.loads(text)["choices"][0]
            answer.tokens = choice.get("token_ids") or []
            answer.finish_reason = choice["finish_reason"]
        else:
            answer.error = text
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    return answer


class Load:
    """Keeps asking frontends from several threads until the block ends."""

    def __init__(
        self, frontends: list[Frontend], prompts: list[str], count: int = 40, clients: int = 3
    ) -> None:
        self.answers: list[Answer] = []
        # Seconds between an answer and the client's next request. Engines that start meanwhile need
        # the cores.
        self.pause = 0.0
        self._frontends = frontends
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stopped: dict[str, threading.Event] = {f.name: threading.Event() for f in frontends}
        self._threads = [
            threading.Thread(target=self._run, args=(frontend, prompts, count, client), daemon=True)
            for frontend in frontends
            for client in range(clients)
        ]

    def _run(self, frontend: Frontend, prompts: list[str], count: int, offset: int) -> None:
        turn = offset
        while not (self._stop.is_set() or self._stopped[frontend.name].is_set()):
            answer = frontend.ask(prompts[turn % len(prompts)], count)
            turn += 1
            with self._lock:
                self.answers.append(answer)
            # Where nobody listens: do not spin.
            self._stop.wait(max(self.pause, 0.2 if answer.status is None else 0.0))

    def leave(self, frontend: Frontend) -> None:
        """Ask this frontend no more."""
        self._stopped[frontend.name].set()

    def wait_answers(
        self, more: int, limit: float = STEP_LIMIT, of: Frontend | None = None
    ) -> None:
        """Until so many more requests were answered completely."""

        def good() -> int:
            with self._lock:
                mine = [a for a in self.answers if of is None or a.frontend == of.name]
            return sum(answer.complete for answer in mine)

        def describe() -> str:
            return "\n".join(str(answer) for answer in self.answers[-5:])

        target = good() + more

        def look() -> bool:
            for frontend in self._frontends:
                left = self._stopped[frontend.name].is_set()
                assert left or frontend.child.poll() is None, f"it ended\n{frontend.tail()}"
            return good() >= target

        wait_for(f"{more} more answers under load", limit, look, describe)

    def wait_each(self, frontends: list[Any], more: int, limit: float = STEP_LIMIT) -> None:
        """Until each of these has answered so many more requests completely."""

        def good() -> dict[str, int]:
            with self._lock:
                done = Counter(answer.frontend for answer in self.answers if answer.complete)
            return {frontend.name: done[frontend.name] for frontend in frontends}

        before = good()

        def look() -> bool:
            for frontend in frontends:
                assert frontend.child.poll() is None, f"it ended\n{frontend.tail()}"
            return all(count >= before[name] + more for name, count in good().items())

        wait_for(f"{more} more answers of each", limit, look, lambda: f"{before}, now {good()}")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        deadline = time.monotonic() + REQUEST_LIMIT + 10
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        hanging = [thread for thread in self._threads if thread.is_alive()]
        assert not hanging, f"{len(hanging)} clients hang"

    def of(self, frontend: Frontend) -> list[Answer]:
        return [answer for answer in self.answers if answer.frontend == frontend.name]
