"""Publications to a fleet of real servers of which one is killed in the middle, on one rank."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
from fleet import generate, open_fleet, processes_of, scheduler_of
from train_step import Layout, build_actor
from weight_sync import open_publisher, train

from spear_megatron.cli.servers import Publishing
from spear_megatron.rollout.sglang.start import Servers


def kill_in_update(publisher: Any, url: str, scheduler: psutil.Process) -> list[str]:
    """Have the server at ``url`` killed with kill -9 while it takes a message in the middle of the next update.

    Its scheduler is stopped just before, so that the message arrives, is never answered, and half a second later there
    is nobody to answer. Returns a list that gets the name of that message.
    """
    client, sent, killed = publisher.servers.client(url), [0], list[str]()

    def counted(send: Any) -> Any:
        def wrapped(*args: Any, **keys: Any) -> Any:
            sent[0] += 1
            if not killed and sent[0] == (1 if send.__name__ == "update_from_disk" else 2):
                killed.append(send.__name__)
                scheduler.suspend()
                threading.Timer(0.5, scheduler.kill).start()
            return send(*args, **keys)

        return wrapped

    for name in ("update_from_disk", "update_from_tensors", "update_from_group"):
        setattr(client, name, counted(getattr(client, name)))
    return killed


def killed_on_rank(folder: str, scratch: str, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By way: what came of an update in which the first of two servers was killed, and of the next one."""
    actor, shape, parallel = build_actor(folder, Layout("1 rank"), lr=1e-2)
    results, version = {}, 0
    with open_fleet(Path(folder), Path(scratch), 2) as fleet:
        fleet.start()

        def publish(publisher: Any) -> Any:
            nonlocal version
            version += 1
            train(actor, parallel, version)
            return Publishing(parallel, Servers(fleet.addresses(), fleet), publisher.publish, None).publish(version)

        for way, keys in ways.items():
            publisher = open_publisher(actor, shape, parallel, folder, list(fleet.addresses()), scratch, **keys)
            try:
                publish(publisher)
                before = fleet.serving()
                killed = kill_in_update(publisher, before[0].url, scheduler_of(processes_of(before[0].url)))
                outcome, serving = publish(publisher), fleet.serving()
                again = publish(publisher)
                answers = [generate(end.url, 16) for end in fleet.serving()]
            finally:
                publisher.close()
            results[way] = {
                "killed": killed, "before": before, "outcome": outcome, "serving": serving, "again": again,
                "after": fleet.serving(), "answers": answers,
            }  # fmt: skip
    return results
