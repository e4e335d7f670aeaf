#!/usr/bin/env python3
"""Writes what vLLM's own DP coordinator does, for our machine to be compared with.

The real `DPCoordinatorProc` of the installed vLLM runs in a thread, over real ZMQ sockets, with
random events from a seed. Only its clock and its poller are ours: time stands still unless an event
says `sleep`, and the poller tells when everything that was sent has been handled. So the trace is
the same on every run, publish times included.

    scripts/coordinator_reference.py            write the trace
    scripts/coordinator_reference.py --check    compare with the committed trace, write nothing

Run it with an interpreter that has vLLM (`scripts/vllm_env.py` prepares one). The trace is replayed
by `cargo test -p dp-sidecar-protocol --test protocol coordinator_trace::`.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time as real_time
from pathlib import Path

import msgspec
import vllm
import zmq
from vllm.v1.engine import EngineCoreOutputs, coordinator
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackEncoder

LIMIT_S = 20.0
SEEDS = 30
EVENTS = 60


class Clock:
    """Virtual milliseconds, shared by the DP coordinator's thread and the script."""

    def __init__(self):
        # Far from 0, as a real clock: the first publish does not wait for an interval.
        self.now_ms = 1_000_000_000
        self.changed = threading.Condition()
        self.handled = 0
        self.deadline = None
        self.ended = False

    def time(self):
        return self.now_ms / 1000


class Ended(Exception):
    """Unwinds the DP coordinator's endless loop."""


def poller_class(clock):
    class Poller:
        def __init__(self):
            self.inner = zmq.Poller()
            self.sockets = {}

        def register(self, sock, flags):
            self.sockets[sock.inner] = sock
            self.inner.register(sock.inner, flags)

        def poll(self, timeout):
            deadline = clock.now_ms + timeout
            while True:
                events = self.inner.poll(0)
                with clock.changed:
                    due = clock.now_ms >= deadline
                    if clock.ended:
                        raise Ended
                    if events or due:
                        clock.handled += 1
                        clock.deadline = None
                        clock.changed.notify_all()
                        return [(self.sockets[sock], flag) for sock, flag in events]
                    clock.deadline = deadline
                    clock.changed.notify_all()
                self.inner.poll(1)

    return Poller


class CountingSocket:
    """A socket of the DP coordinator that counts what it sends."""

    def __init__(self, inner):
        self.inner = inner
        self.sent = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inner.close(linger=0)

    def send(self, data):
        self.sent += 1
        self.inner.send(data)

    def send_multipart(self, frames):
        self.sent += 1
        self.inner.send_multipart(frames)

    def recv(self):
        return self.inner.recv()


class Reference:
    """One DP coordinator with its engines and one frontend."""

    def __init__(self, engines, wave_coordination):
        self.clock = Clock()
        self.directory = tempfile.TemporaryDirectory(prefix="dpref")
        base = f"ipc://{self.directory.name}"
        self.context = zmq.Context()
        self.made = []
        self.encoder = MsgpackEncoder()

        class Zmq:
            Poller = poller_class(self.clock)

            def __getattr__(self, name):
                return getattr(zmq, name)

        make = self.make_original = coordinator.make_zmq_socket

        def make_counting(**arguments):
            sock = CountingSocket(make(**arguments))
            self.made.append(sock)
            return sock

        self.saved = (coordinator.zmq, coordinator.time)
        coordinator.zmq = Zmq()
        coordinator.time = self.clock
        coordinator.make_zmq_socket = make_counting
        coordinator.set_process_title = lambda *_: None
        proc = coordinator.DPCoordinatorProc(
            engine_count=engines, enable_wave_coordination=wave_coordination
        )

        def run():
            try:
                proc.process_input_socket(f"{base}/front", f"{base}/output", f"{base}/publish")
            except Ended:
                pass
            finally:
                proc.ctx.destroy(linger=0)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        self.until(lambda: len(self.made) == 3, "binding")
        self.front, self.output, self.publish = self.made
        self.frontend = self.socket(zmq.XSUB, f"{base}/front")
        self.frontend.send(b"\x01")
        # It is not read before all engines have subscribed, so there is nothing to wait for.
        real_time.sleep(0.1)
        self.subscribers = []
        self.pushes = []
        for _ in range(engines):
            subscriber = self.socket(zmq.XSUB, f"{base}/publish")
            subscriber.send(b"\x01")
            self.subscribers.append(subscriber)
            self.pushes.append(self.socket(zmq.PUSH, f"{base}/output"))
        self.seen = {"front": 0, "publish": 0}
        # READY, and the frontend's subscription, which it reads and drops. Without lockstep there
        # is no silence to wait for: it publishes at once.
        handled = 1 if wave_coordination else 2
        self.until(lambda: self.publish.sent == 1 and self.clock.handled == handled, "READY")
        self.idle()

    def socket(self, kind, address):
        sock = self.context.socket(kind)
        sock.linger = 0
        sock.rcvtimeo = int(LIMIT_S * 1000)
        sock.connect(address)
        return sock

    def until(self, condition, what):
        end = real_time.monotonic() + LIMIT_S
        while not condition():
            if real_time.monotonic() > end or not self.thread.is_alive():
                state = [sock.sent for sock in self.made], self.clock.handled
                raise RuntimeError(f"{what} did not happen: sent and handled {state}")
            real_time.sleep(0.0002)

    def idle(self):
        with self.clock.changed:
            ready = self.clock.changed.wait_for(lambda: self.clock.deadline is not None, LIMIT_S)
        if not ready:
            raise RuntimeError("the DP coordinator does not come to rest")

    def handled(self, act):
        before = self.clock.handled
        act()
        self.until(lambda: self.clock.handled > before, "handling an event")
        self.idle()

    def sleep(self, milliseconds):
        """Lets virtual time pass; returns the publishes with their times."""
        end = self.clock.now_ms + milliseconds
        published = []
        while True:
            self.idle()
            due = self.clock.deadline
            if due > end:
                break
            self.handled(lambda due=due: self.advance(due))
            after_ms = due - (end - milliseconds)
            published += [{"after_ms": after_ms, **m} for m in self.collect()["front"]]
        self.advance(end)
        return published

    def advance(self, to):
        with self.clock.changed:
            self.clock.now_ms = max(to, self.clock.now_ms)
            if self.clock.deadline is not None and self.clock.now_ms >= self.clock.deadline:
                self.clock.deadline = None

    def collect(self):
        """What was sent since the last call."""
        back = []
        for _ in range(self.publish.sent - self.seen["publish"]):
            messages = [subscriber.recv_multipart() for subscriber in self.subscribers]
            if any(message != messages[0] for message in messages):
                raise RuntimeError(f"engines were told different things: {messages}")
            back.append(self.read_back(messages[0]))
        self.seen["publish"] = self.publish.sent
        front = []
        for _ in range(self.front.sent - self.seen["front"]):
            counts, wave, running = msgspec.msgpack.decode(self.frontend.recv())
            front.append({"counts": counts, "wave": wave, "running": running})
        self.seen["front"] = self.front.sent
        return {"back": back, "front": front}

    @staticmethod
    def read_back(frames):
        if frames == [b"READY"]:
            return {"ready": True}
        kind, payload = frames
        if kind != b"\x02":
            raise RuntimeError(f"unexpected message type {kind}")
        wave, exclude = msgspec.msgpack.decode(payload)
        if isinstance(exclude, bytes):
            exclude = {"identity": int.from_bytes(exclude, "little")}
        return {"wave": wave, "exclude": exclude}

    def perform(self, event):
        kind = event["kind"]
        if kind == "sleep":
            return {"back": [], "front": self.sleep(event["ms"])}
        if kind == "first_request":
            target = event["target"]
            if isinstance(target, dict):
                target = target["identity"].to_bytes(2, "little")
            message = msgspec.msgpack.encode((target, event["wave"]))
            self.handled(lambda: self.frontend.send(message))
        elif kind == "subscribe":
            self.handled(lambda: self.subscribers[event["rank"]].send(b"\x01"))
        else:
            fields = {"engine_index": event["rank"]}
            if "stats" in event:
                waiting, running, kv, wave, step = event["stats"]
                fields["scheduler_stats"] = SchedulerStats(
                    num_waiting_reqs=waiting,
                    num_running_reqs=running,
                    kv_cache_usage=kv,
                    current_wave=wave,
                    step_counter=step,
                )
            for name in ("wave_complete", "start_wave"):
                if name in event:
                    fields[name] = event[name]
            frames = self.encoder.encode(EngineCoreOutputs(**fields))
            push = self.pushes[event["rank"] % len(self.pushes)]
            self.handled(lambda: push.send_multipart(frames))
        return self.collect()

    def close(self):
        with self.clock.changed:
            self.clock.ended = True
        self.thread.join(LIMIT_S)
        if self.thread.is_alive():
            raise RuntimeError("the DP coordinator does not end")
        self.context.destroy(linger=0)
        coordinator.zmq, coordinator.time = self.saved
        coordinator.make_zmq_socket = self.make_original
        self.directory.cleanup()


def random_event(rng, engines, guess):
    """`guess` follows the wave roughly, so that old, current and new numbers all occur."""
    near = max(0, guess["wave"] + rng.choice((-2, -1, 0, 0, 0, 0, 1, 3)))
    rank = rng.randrange(engines)
    pick = rng.random()
    if pick < 0.25:
        targets = ({"identity": rank}, rank, None)
        target = rng.choices(targets, weights=(5, 3, 1))[0]
        return {"kind": "first_request", "target": target, "wave": near}
    if pick < 0.5:
        guess["step"] += rng.randrange(2)
        stats = [rng.randrange(5), rng.randrange(9), rng.randrange(5) / 4]
        stats += [max(0, guess["wave"] + rng.choice((-1, 0, 0, 0))), guess["step"]]
        if rng.random() < 0.05:
            # Nobody has this rank; the message is dropped.
            rank = engines + rng.randrange(2)
        return {"kind": "report", "rank": rank, "stats": stats}
    if pick < 0.63:
        guess["wave"] = max(guess["wave"], near + 1)
        guess["step"] = 0
        return {"kind": "report", "rank": rank, "wave_complete": near}
    if pick < 0.79:
        guess["wave"] = max(guess["wave"], near)
        return {"kind": "report", "rank": rank, "start_wave": near}
    if pick < 0.83:
        guess["wave"] = max(guess["wave"], near + 1)
        event = {"kind": "report", "rank": rank, "wave_complete": near, "start_wave": near + 1}
        if rng.random() < 0.3:
            event["stats"] = [1, 2, 0.5, near, guess["step"]]
        return event
    if pick < 0.86:
        return {"kind": "subscribe", "rank": rank}
    return {"kind": "sleep", "ms": rng.choice((1, 20, 49, 50, 60, 100, 150, 1000, 6000))}


def run(seed):
    rng = random.Random(seed)
    engines = rng.randrange(2, 6)
    wave_coordination = rng.random() < 0.8
    guess = {"wave": 0, "step": 0}
    events = [random_event(rng, engines, guess) for _ in range(EVENTS)]
    reference = Reference(engines, wave_coordination)
    try:
        steps = [{"event": None, **reference.collect()}]
        steps += [{"event": event, **reference.perform(event)} for event in events]
    finally:
        reference.close()
    return {
        "seed": seed,
        "engines": engines,
        "wave_coordination": wave_coordination,
        "steps": steps,
    }


def dump(trace):
    """One step per line, so that a difference is readable."""
    lines = []
    for run_ in trace["runs"]:
        steps = ",\n".join(json.dumps(step, separators=(",", ":")) for step in run_["steps"])
        head = {key: value for key, value in run_.items() if key != "steps"}
        lines.append(json.dumps(head, separators=(",", ":"))[:-1] + ',"steps":[\n' + steps + "]}")
    head = {key: value for key, value in trace.items() if key != "runs"}
    return json.dumps(head)[:-1] + ', "runs": [\n' + ",\n".join(lines) + "]}\n"


def main():
    version = vllm.__version__.split("+")[0]
    repository = Path(__file__).resolve().parent.parent
    default = repository / "protocol" / "golden" / f"vllm-{version}" / "coordinator.trace.json"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of runs (%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    trace = {
        "vllm": version,
        "class": "vllm.v1.engine.coordinator.DPCoordinatorProc",
        "written_by": "scripts/coordinator_reference.py",
        "runs": [run(seed) for seed in range(arguments.seeds)],
    }
    text = dump(trace)
    if json.loads(text) != trace:
        raise RuntimeError("the trace does not survive writing")
    steps = sum(len(run_["steps"]) for run_ in trace["runs"])
    if not arguments.check:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
        print(f"{arguments.output}: {len(trace['runs'])} runs, {steps} steps")
        return 0
    committed = json.loads(arguments.output.read_text())
    runs = committed["runs"][: arguments.seeds]
    for ours, theirs in zip(runs, trace["runs"], strict=False):
        for number, (old, new) in enumerate(zip(ours["steps"], theirs["steps"], strict=True)):
            if old != new:
                print(f"seed {ours['seed']}, step {number}: trace {old}, vllm {version} {new}")
                return 1
    print(f"{steps} steps of vllm {version} are as in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
