"""Servers on the trainer's GPUs: the order of requests, and no start while the memory is the trainer's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_fleet import StandInLaunch, quick_config, until

from spear_megatron.rollout.sglang.colocation import SharedGpus
from spear_megatron.rollout.sglang.fleet import Fleet

ALONE: Any = SimpleNamespace(world_size=1, rank=0)


class Trainer:
    """Writes down what is asked of it, in the journal of a server."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def note(self, what: str) -> None:
        with self._journal.open("a") as file:
            file.write(f'{{"path": "{what}", "body": null}}\n')

    def to_host(self) -> None:
        self.note("to_host")

    def to_device(self) -> None:
        self.note("to_device")


@pytest.fixture
def launch(tmp_path: Path) -> StandInLaunch:
    return StandInLaunch(tmp_path)


@pytest.fixture
def fleet(launch: StandInLaunch) -> Iterator[Fleet]:
    with Fleet([launch], quick_config()) as opened:
        opened.start()
        yield opened


def asked(launch: StandInLaunch) -> list[tuple[str, Any]]:
    """What was asked since the last call, in order."""
    found = launch.requests()
    launch.journal.write_text("")
    return [(path, body["tags"] if body else None) for path, body in found]


FLUSH, RELEASE = ("/flush_cache", None), ("/release_memory_occupation", ["kv_cache", "weights"])
RESUME = "/resume_memory_occupation"


@pytest.mark.parametrize("cache_first", [False, True])
def test_memory_changes_hands_in_order(launch: StandInLaunch, fleet: Fleet, cache_first: bool) -> None:
    trainer = Trainer(launch.journal)
    gpus = SharedGpus(ALONE, fleet, trainer, cache_first=cache_first)
    with gpus.publishing():  # nothing was released yet
        trainer.note("update")
    assert asked(launch) == [("to_host", None), ("update", None)]
    gpus.to_training()
    gpus.to_training()
    assert asked(launch) == [FLUSH, RELEASE, ("to_device", None)]
    with gpus.publishing():
        trainer.note("update")
    update = ("update", None)
    if cache_first:
        assert asked(launch) == [("to_host", None), (RESUME, ["weights", "kv_cache"]), update]
    else:
        assert asked(launch) == [("to_host", None), (RESUME, ["weights"]), update, (RESUME, ["kv_cache"])]
    gpus.to_training()
    assert asked(launch) == [FLUSH, RELEASE, ("to_device", None)]


def test_no_server_is_started_nor_asked_to_generate_while_the_trainer_has_the_memory(
    launch: StandInLaunch, fleet: Fleet
) -> None:
    gpus = SharedGpus(ALONE, fleet, Trainer(launch.journal))
    gpus.to_training()
    launch.journal.write_text("")
    time.sleep(0.6)
    assert "/health_generate" not in launch.journal.read_text()
    launch.process().kill()
    until(lambda: not fleet.reachable())
    time.sleep(0.5)
    assert len(launch.servers) == 1
    with gpus.publishing():
        assert RESUME not in launch.journal.read_text()
        assert fleet.wait_reachable(15.0)[0].attempt == 1
    assert fleet.serving() and RESUME not in launch.journal.read_text()
    assert fleet.metrics()["sglang/restarts"] == 1


def test_a_start_under_way_is_put_off(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path, options=lambda attempt: ["--slow", "60"] if attempt == 1 else [])
    with Fleet([launch], quick_config()) as fleet:
        fleet.start()
        launch.process().kill()
        until(lambda: len(launch.servers) == 2)
        with fleet.without_starts():
            assert launch.servers[-1].death()
            launch.options = lambda attempt: []
            time.sleep(0.3)
            assert len(launch.servers) == 2
        until(lambda: fleet.serving())
        assert fleet.metrics()["sglang/restarts"] == 1


def test_a_server_that_does_not_release_is_ended_and_replaced_after_training(
    launch: StandInLaunch, fleet: Fleet
) -> None:
    gpus = SharedGpus(ALONE, fleet, Trainer(launch.journal), timeout_s=5.0)
    launch.refuse("/release_memory_occupation", fleet.serving()[0].url)
    gpus.to_training()
    assert launch.servers[0].death() and fleet.reachable() == ()
    time.sleep(0.3)
    assert len(launch.servers) == 1
    with gpus.publishing():
        pass
    until(lambda: fleet.serving())
    assert len(launch.servers) == 2


def test_a_publisher_tells_by_url_who_took_the_weights(tmp_path: Path) -> None:
    launches = [StandInLaunch(tmp_path, number=number) for number in range(2)]
    with Fleet(launches, quick_config()) as fleet:
        fleet.start()
        first, second = fleet.serving()
        from spear_megatron.rollout.sglang.fleet import restore_from_disk

        restore_from_disk(str(tmp_path), 3)(first.url)
        fleet.took(3, [first.url, second.url], {})  # the second does not name version 3: it is another life
        assert fleet.serving() == (first,)
        fleet.took(4, [], {second.url: "it did not answer"}, restore_from_disk(str(tmp_path), 4))
        until(lambda: [end.attempt for end in fleet.serving()] == [0, 1])
        assert "it missed version 4: it did not answer" in fleet._members[1].counters.reasons[-1]
