"""Where the Ray fleet puts its servers, with a stand-in for Ray."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "ray_fleet.py"
SETTINGS = {
    "SERVER_PROGRAM": "python -m server", "MODEL": "/models/a b", "SERVER_PORT": "30000", "SERVER_RESTARTS": "2",
    "SERVER_OPTIONS": "--tp 4",
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_fleet", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ray:
    """Answers as Ray does, and notes what is placed where."""

    def __init__(self, joined: int = 3) -> None:
        self.joined = joined
        self.placed: list[tuple[Any, ...]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": f"node{number}", "Alive": number < self.joined} for number in range(4)]

    def remote(self, kind: Any) -> Any:
        class Actor:
            @staticmethod
            def options(num_gpus: int, num_cpus: int, scheduling_strategy: str) -> Any:
                class Handle:
                    class run:  # noqa: N801
                        @staticmethod
                        def remote(command: list[str], restarts: int) -> int:
                            self.placed.append((scheduling_strategy, num_gpus, command, restarts))
                            return len(self.placed)

                class Made:
                    remote = staticmethod(Handle)

                return Made

        return Actor


def test_every_node_gets_its_servers_on_ports_of_their_own(fleet: ModuleType) -> None:
    ray = Ray()
    nodes = fleet.join(ray, 3, 1.0)
    assert fleet.start_servers(ray, str.upper, nodes, 2, 4, SETTINGS) == [1, 2, 3, 4, 5, 6]
    assert [(node, gpus, restarts) for node, gpus, _, restarts in ray.placed] == [
        (name, 4, 2) for name in ("NODE0", "NODE0", "NODE1", "NODE1", "NODE2", "NODE2")
    ]
    assert ray.placed[1][2] == [
        "python", "-m", "server", "--model-path", "/models/a b", "--host", "0.0.0.0", "--port", "30001", "--tp", "4"
    ]  # fmt: skip


def test_nodes_that_do_not_join_are_counted(fleet: ModuleType) -> None:
    with pytest.raises(TimeoutError, match="3 of 4 nodes joined"):
        fleet.join(Ray(), 4, 0.0)


def test_a_server_is_started_again_until_its_restarts_are_used_up(fleet: ModuleType, tmp_path: Path) -> None:
    note = tmp_path / "starts"
    program = f"open({str(note)!r}, 'a').write('x'); raise SystemExit(7)"
    assert fleet.Server().run([sys.executable, "-c", program], restarts=2, pause_s=0.0) == 7
    assert note.read_text() == "xxx"


def test_without_ray_the_remedy_is_named(
    fleet: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--address", "a:1", "--nodes", "1", "--servers-per-node", "1", "--tp", "1"]
    assert fleet.main(arguments) == 2
    assert "FLEET=srun" in capsys.readouterr().err
