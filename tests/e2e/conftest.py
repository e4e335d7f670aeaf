"""Fixtures of the end-to-end tests. Run them through scripts/test (or `scripts/test e2e`)."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cluster import Cluster
from deployment import Deployment
from fakes import FakeModels
from harness import World
from processes import REPO, built

# Lane and order of each module; any other is at the beginning of lane "real". Engines that are
# fakes wait more than they compute, real ones fill the cores: each lane has some of both, so that
# all end at about the same time.
LANES = {
    "fakes": (
        "test_cluster_fakes",
        "test_cluster_network",
        "test_cluster_restarts",
        "test_cluster_trainer",
        "test_cluster_updates",
        "test_attach",
        "test_bad_input",
        "test_hub",
    ),
    "crashes": ("test_cluster_crashes", "test_workers"),
    "real": (
        "test_hosted",
        "test_cluster",
        "test_lora",
        "test_keep_engines",
        "test_cluster_planned",
        "test_random_acts",
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: of `scripts/test full` alone")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Three lanes for `-n 3 --dist loadgroup`: most of what fills the cores never runs twice at a
    time, and fakes fill the gaps. Within a lane, modules have the order of `LANES`."""
    place = {name: (lane, at) for lane, names in LANES.items() for at, name in enumerate(names)}
    items.sort(key=lambda item: place.get(item.path.stem, ("real", 0))[1])
    for item in items:
        lane, _ = place.get(item.path.stem, ("real", 0))
        item.add_marker(pytest.mark.xdist_group(lane))


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    script = REPO / "scripts" / "make_tiny_models.py"
    return Path(subprocess.check_output([sys.executable, script], text=True).strip())


@pytest.fixture(scope="session")
def ingredients(tiny_models: Path) -> dict[str, Path]:
    overlay = REPO / "target" / "e2e-site"
    assert (overlay / "dp_sidecar_shim").is_dir(), "run scripts/vllm_env.py first"
    return {"binary": built("sidecar"), "overlay": overlay, "models": tiny_models}


@contextmanager
def new_world(
    ingredients: dict[str, Path], folder: Path, vllm: Path | None = None
) -> Iterator[World]:
    """A world that is checked for leftovers at the end, also when the block fails."""
    maker = make_world(ingredients, folder, vllm)
    world = next(maker)
    try:
        yield world
    except BaseException:
        # What failed counts, not what is left of it.
        world.clear()
        raise
    for _ in maker:
        pass


def make_world(
    ingredients: dict[str, Path], folder: Path, vllm: Path | None = None
) -> Iterator[World]:
    python = Path(sys.executable)
    world = World(
        binary=ingredients["binary"],
        python=python,
        vllm=str(vllm or python.parent / "vllm"),
        overlay=ingredients["overlay"],
        models=ingredients["models"],
        folder=folder,
        mark=uuid.uuid4().hex,
    )
    yield world
    complaints = world.clear()
    assert not complaints, "left behind:\n" + "\n".join(complaints)


@pytest.fixture(scope="session")
def fake_vllm() -> Path:
    return built("fake-vllm")


@contextmanager
def fake_deployment(
    ingredients: dict[str, Path],
    fake_vllm: Path,
    folder: Path,
    kind: str,
    *,
    hosts: int = 3,
    per_node: int = 2,
    shm: str = "256m",
    size: int = 8 << 20,
    env: dict[str, str] | None = None,
    flags: list[str] | None = None,
    http: bool = False,
    late: int | None = None,
) -> Iterator[Deployment]:
    """Fake engines on so many hosts, two fake frontends on one more. What the leader says to host
    `late` can be made to come late."""
    models = FakeModels(kind, folder, size=size)
    more = {
        "FAKE_VLLM_FORK": "0",
        # As fast as they can, they would take the cores from the other lane.
        "FAKE_VLLM_STEP_MS": "10",
        "FAKE_VLLM_CONTROL": str(folder),
        **(env or {}),
    }
    with (
        Cluster(hosts + 1, folder, shm=shm) as cluster,
        new_world(ingredients, folder, fake_vllm) as world,
        ExitStack() as stack,
    ):
        deployment = Deployment(
            world,
            cluster,
            models,
            per_node=per_node,
            env=more,
            flags=flags,
            http=http,
            start_limit=40,
        )
        if late is not None:
            port = int(deployment.leader_address.rpartition(":")[2])
            deployment.late = stack.enter_context(deployment.hosts[late].late(port, folder))
        deployment.start_frontend("alpha")
        deployment.start_frontend("beta", api_servers=2)
        deployment.start()
        yield deployment


@pytest.fixture
def world(ingredients, tmp_path) -> Iterator[World]:
    """For a test that starts its own; checked for leftovers at its end."""
    yield from make_world(ingredients, tmp_path)
