"""The fleet over stand-in servers: replacement, hangs, stale weights, limits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from stand_in_fleet import StandInLaunch, gone, quick_config, until, weight_version

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.fleet import Fleet, restore_from_disk
from spear_megatron.rollout.sglang.member import Endpoint, Member, Published


def two(folder: Path, **options: Any) -> list[StandInLaunch]:
    return [StandInLaunch(folder, number=number, **options) for number in range(2)]


def post(endpoint: Endpoint, path: str) -> None:
    """A request whose answer may never come."""
    try:
        httpx.post(f"{endpoint.url}{path}", timeout=0.3, trust_env=False)
    except httpx.HTTPError:
        pass


def test_a_killed_server_is_replaced_at_its_address(tmp_path: Path) -> None:
    launches = two(tmp_path)
    with Fleet(launches, quick_config()) as fleet:
        fleet.start()
        first, second = fleet.serving()
        assert [first.member, second.member, first.attempt] == [0, 1, 0]
        launches[0].process().kill()
        fleet.suspect(first.url)
        until(lambda: fleet.serving() == (second,))
        replaced, same = until(lambda: len(fleet.serving()) == 2 and fleet.serving())
        assert same == second and replaced == Endpoint(first.url, 0, 1)
        metrics = fleet.metrics()
        assert metrics["sglang/restarts"] == 1 and metrics["sglang/hangs"] == 0 and metrics["sglang/servers"] == 2
        assert 0 < metrics["sglang/unavailable_s"] < 10
        time.sleep(0.2)
        assert fleet.metrics() == metrics
        pids = [launch.process().pid for launch in launches]
    assert all(gone(pid) for pid in pids)
    assert fleet.serving() == ()
    assert {path.name for path in (tmp_path / "server_0").iterdir()} == {"attempt_0.log", "attempt_1.log"}


@pytest.mark.parametrize("how", ["stopped", "scheduler"])
def test_a_hung_server_is_killed_and_replaced(tmp_path: Path, how: str) -> None:
    launch = StandInLaunch(tmp_path)
    with Fleet([launch], quick_config()) as fleet:
        fleet.start()
        process = launch.process()
        if how == "stopped":
            process.suspend()
        else:
            post(fleet.serving()[0], "/scheduler_hang")
        until(lambda: fleet.serving() and fleet.serving()[0].attempt == 1, 30.0)
        assert gone(process.pid)
        assert fleet.metrics()["sglang/hangs"] == fleet.metrics()["sglang/restarts"] == 1


def test_a_quiet_server_is_not_asked_to_generate_but_its_death_is_seen(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    with Fleet([launch], quick_config()) as fleet:
        fleet.start()
        with fleet.quiet():
            launch.journal.write_text("")
            post(fleet.serving()[0], "/scheduler_hang")
            time.sleep(1.5)
            assert "/health_generate" not in launch.journal.read_text()
            assert fleet.serving()[0].attempt == 0
            launch.process().kill()
            until(lambda: fleet.serving() and fleet.serving()[0].attempt == 1)


def test_quiet_waits_for_a_question_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def generates(url: str, timeout_s: float) -> bool:
        asked.set()
        return answer.wait(5.0)

    monkeypatch.setattr("spear_megatron.rollout.sglang.health.generates", generates)
    with Fleet([StandInLaunch(tmp_path)], quick_config(hung_after_s=0.4)) as fleet:
        fleet.start()
        assert asked.wait(5.0)
        entered = threading.Event()

        def enter() -> None:
            with fleet.quiet():
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        answer.set()
        assert entered.wait(5.0)
        thread.join()


def test_a_replaced_server_is_stale_until_the_weights_are_published_to_it(tmp_path: Path) -> None:
    launches = two(tmp_path)
    with Fleet(launches, quick_config()) as fleet:
        fleet.start()
        before = fleet.reachable()
        fleet.published(4, before)
        assert fleet.serving() == before
        launches[1].process().kill()
        until(lambda: any(endpoint.attempt == 1 for endpoint in fleet.reachable()))
        assert fleet.serving() == before[:1]
        fleet.published(5, before)  # the publisher's list is older than the replacement
        assert fleet.serving() == before[:1] and len(fleet.reachable()) == 2
        fleet.published(6, fleet.reachable())
        assert fleet.serving() == (before[0], Endpoint(before[1].url, 1, 1))


def test_a_replaced_server_gets_the_published_folder(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    with Fleet([launch], quick_config()) as fleet:
        fleet.start()
        fleet.published(7, fleet.reachable(), restore_from_disk(str(tmp_path), 7))
        launch.process().kill()
        until(lambda: fleet.serving() and fleet.serving()[0].attempt == 1)
        assert weight_version(fleet.serving()[0].url) == "7"
        assert ("/update_weights_from_disk", "7") in [
            (path, (body or {}).get("weight_version")) for path, body in launch.requests()
        ]


def test_a_server_that_missed_a_publication_is_restored_while_it_runs(tmp_path: Path) -> None:
    launches = two(tmp_path)
    with Fleet(launches, quick_config()) as fleet:
        fleet.start()
        fleet.published(2, fleet.reachable()[:1], restore_from_disk(str(tmp_path / "missing"), 2))
        time.sleep(0.3)
        assert [endpoint.member for endpoint in fleet.serving()] == [0]
        fleet.published(3, fleet.reachable()[:1], restore_from_disk(str(tmp_path), 3))
        until(lambda: len(fleet.serving()) == 2)
        assert weight_version(fleet.serving()[1].url) == "3"
        assert fleet.metrics()["sglang/restarts"] == 0


def test_a_server_that_always_fails_is_given_up_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launches = two(tmp_path)
    launches[1].options = lambda attempt: ["--exit", "5"]
    with caplog.at_level(logging.WARNING), Fleet(launches, quick_config()) as fleet:
        fleet.start()
        assert [endpoint.member for endpoint in fleet.serving()] == [0]
        fleet.check()
        assert len(launches[1].servers) == 3  # max_restarts=2
        assert fleet.metrics()["sglang/restarts"] == 2
    assert "of 2 SGLang servers only 1 started" in caplog.text and "exited with code 5" in caplog.text


def test_none_that_starts_is_one_clear_error_within_the_deadline(tmp_path: Path) -> None:
    launches = two(tmp_path, options=lambda attempt: ["--slow", "60"])
    began = time.monotonic()
    fleet = Fleet(launches, quick_config(ready_timeout_s=0.5, max_restarts=0))
    with pytest.raises(EngineError, match="(?s)of 2 SGLang servers none serves.*did not answer within ready_timeout_s"):
        fleet.start()
    assert time.monotonic() - began < 15
    assert all(server.death() for launch in launches for server in launch.servers)


def test_none_left_is_told_to_those_who_wait(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    with Fleet([launch], quick_config(max_restarts=0)) as fleet:
        fleet.start()
        fleet.check()
        launch.process().kill()
        with pytest.raises(EngineError, match="(?s)none is left.*server 0 .failed.: .*SIGKILL"):
            until(lambda: not fleet.serving())
            fleet.wait_serving(20.0)
        with pytest.raises(EngineError, match="none is left"):
            fleet.check()


def test_waiting_ends_at_its_deadline(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    with Fleet([launch], quick_config()) as fleet:
        fleet.start()
        fleet.published(1, ())
        assert len(fleet.wait_reachable(1.0)) == 1
        with pytest.raises(EngineError, match="none served within 0.2 s"):
            fleet.wait_serving(0.2)


def test_a_slow_start_is_waited_for(tmp_path: Path) -> None:
    with Fleet([StandInLaunch(tmp_path, options=lambda _: ["--slow", "1.5"])], quick_config()) as fleet:
        fleet.start()
        assert len(fleet.serving()) == 1 and fleet.metrics()["sglang/restarts"] == 0


def pauses(monkeypatch: pytest.MonkeyPatch, served_s: Sequence[float], **config: Any) -> list[float]:
    """Pauses between the lives of a member that served for ``served_s`` seconds in turn."""
    member = Member(0, lambda attempt, address: None, quick_config(**config), Published)
    lives, waited = iter(served_s), []
    monkeypatch.setattr(member, "_life", lambda attempt: ("it died", next(lives)))
    monkeypatch.setattr(member._stopping, "wait", waited.append)
    member._run()
    return waited


def test_pauses_double_and_service_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_restarts": 3, "restart_backoff_s": 25.0, "stable_s": 10.0}
    assert pauses(monkeypatch, [0, 0, 0, 0], **settings) == [25, 50, 60]
    assert pauses(monkeypatch, [0, 0, 11, 9, 0, 0], **settings) == [25, 50, 25, 50, 60]


def test_close_during_a_start_ends_it(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path, options=lambda _: ["--slow", "60"])
    fleet = Fleet([launch], quick_config())
    thread = threading.Thread(target=lambda: pytest.raises(EngineError, fleet.start))
    thread.start()
    until(lambda: launch.servers)
    began = time.monotonic()
    fleet.close()
    thread.join()
    assert time.monotonic() - began < 8 and launch.servers[-1].death()
    fleet.close()


