"""Faults of real servers: killed, hung, paused, port taken, too slow. One server goes through all but the last."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fleet import commands_with, generate, in_background, open_fleet, processes_of, scheduler_of, until

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.fleet import Fleet, restore_from_disk
from spear_megatron.rollout.sglang.member import Endpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def fleet(tiny_folder: Path, run_dir: Path) -> Iterator[Fleet]:
    with open_fleet(tiny_folder, run_dir, max_restarts=6) as opened:
        opened.start()
        yield opened


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that say something else than those of ``tiny_folder``."""
    folder = tmp_path_factory.mktemp("other") / "model"
    make_tiny_model(folder, seed=4)
    return folder


def replaced(fleet: Fleet, before: Endpoint) -> Endpoint:
    """The next life of a server, once it serves."""
    serving = until(lambda: [end for end in fleet.serving() if end.attempt > before.attempt])
    assert serving[0].url == before.url
    return serving[0]


def test_a_server_killed_mid_generation_is_replaced_with_the_published_weights(
    fleet: Fleet, other_folder: Path, run_dir: Path
) -> None:
    (before,) = fleet.serving()
    first_words = generate(before.url, 8)["output_ids"]
    client = ControlClient(before.url)
    client.update_from_disk(str(other_folder), "5")
    client.close()
    fleet.published(5, [before], restore_from_disk(str(other_folder), 5))
    words = generate(before.url, 8)
    assert words["output_ids"] != first_words and words["meta_info"]["weight_version"] == "5"
    running = in_background(generate, before.url, 450)
    time.sleep(0.2)
    assert not running.done()
    processes = processes_of(before.url)
    scheduler_of(processes).kill()
    with pytest.raises(httpx.HTTPError):
        running.result(60)
    fleet.suspect(before.url)
    after = replaced(fleet, before)
    again = generate(after.url, 8)
    assert again["output_ids"] == words["output_ids"] and again["meta_info"]["weight_version"] == "5"
    metrics = fleet.metrics()
    assert metrics["sglang/restarts"] == 1 and metrics["sglang/hangs"] == 0 and metrics["sglang/unavailable_s"] > 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert {path.name for path in (run_dir / "sglang" / "server_0").iterdir()} == {"attempt_0.log", "attempt_1.log"}


def test_a_server_paused_for_a_minute_is_left_alone(fleet: Fleet) -> None:
    """Longer than hung_after_s, and than the 20 s after which a paused server calls itself unhealthy."""
    (before,) = fleet.serving()
    client = ControlClient(before.url)
    with fleet.quiet():
        client.pause("retract")
        running = in_background(generate, before.url, 8, 120.0)
        time.sleep(60.0)
        assert fleet.serving() == (before,) and not running.done()
        client.resume()
        assert len(running.result(30)["output_ids"]) == 8
    client.close()
    assert fleet.serving() == (before,)


def test_a_server_that_hangs_while_it_takes_weights_waits_for_the_next_publication(
    fleet: Fleet, tiny_folder: Path
) -> None:
    (before,) = fleet.serving()
    hangs, processes = fleet.metrics()["sglang/hangs"], processes_of(before.url)
    client = ControlClient(before.url, timeout_s=120.0)
    running = in_background(generate, before.url, 450, 120.0)
    scheduler_of(processes).suspend()
    with pytest.raises(EngineError, match=f"{before.url}/update_weights_from_disk"):
        client.update_from_disk(str(tiny_folder), "6", flush=False)
    with pytest.raises(httpx.HTTPError):
        running.result(120)
    fleet.published(6, ())  # nobody took it, and only the trainer could send it again
    (after,) = until(lambda: [end for end in fleet.reachable() if end.attempt > before.attempt])
    assert fleet.metrics()["sglang/hangs"] == hangs + 1
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert fleet.serving() == () and after.url == before.url
    with pytest.raises(EngineError, match="none served within 0.3 s"):
        fleet.wait_serving(0.3)
    client.update_from_disk(str(tiny_folder), "7")
    client.close()
    fleet.published(7, [after])
    assert fleet.serving() == (after,)
    assert generate(after.url, 4)["meta_info"]["weight_version"] == "7"


def test_a_port_taken_meanwhile_is_tried_again_until_it_is_free(fleet: Fleet, tiny_folder: Path) -> None:
    """Every rank knows the address of a server, so that it comes back to its own port."""
    (before,) = fleet.serving()
    restarts, processes = fleet.metrics()["sglang/restarts"], processes_of(before.url)
    with socket.socket() as taken:
        with fleet.without_starts():
            for process in reversed(processes):
                process.kill()
            psutil.wait_procs(processes, timeout=30)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", int(before.url.rpartition(":")[2])))
            taken.listen()
            until(lambda: not fleet.serving())
        with pytest.raises(EngineError, match=f"{before.url} is taken by another program"):
            fleet.wait_serving(1.0)
    (after,) = until(lambda: [end for end in fleet.reachable() if end.attempt > before.attempt])
    assert after.url == before.url and fleet.metrics()["sglang/restarts"] > restarts + 1  # vain ones count too
    client = ControlClient(after.url)
    client.update_from_disk(str(tiny_folder), "8")
    client.close()
    fleet.published(8, [after])
    assert generate(after.url, 4)["meta_info"]["weight_version"] == "8"


def test_a_start_that_takes_too_long_is_ended_and_said(tiny_folder: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    with open_fleet(tiny_folder, tmp_path, ready_timeout_s=2.0) as fleet:
        starting = in_background(fleet.start)
        until(lambda: commands_with(str(tmp_path)))
        with pytest.raises(EngineError, match="none serves after 2 s(.|\n)*did not answer within ready_timeout_s=2 s"):
            starting.result(60)
        assert not commands_with(str(tmp_path))
    assert time.monotonic() - begin < 30
