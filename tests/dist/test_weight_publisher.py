"""The publisher against stand-ins for servers: failures, stale servers, damage on the way, several leaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf

from spear_megatron.rollout.engine import EngineError

DAMAGED = "model.layers.2.self_attn.k_proj.weight"


class Setting:
    """One rank with a model, stand-in servers and a publisher to them."""

    def __init__(self, folder: str, make_servers: Callable[[int], list[Any]], tp: int = 1, **keys: Any) -> None:
        from fake_control import toy_log_probs
        from safetensors.torch import load_file

        from spear_megatron.model.hf_io import load_hf_folder
        from spear_megatron.model.provider import build_model
        from spear_megatron.model.shape import ModelShape
        from spear_megatron.parallel.config import MegatronConfig
        from spear_megatron.parallel.state import initialize
        from spear_megatron.rollout.sglang.weights_config import WeightsConfig
        from spear_megatron.weights.build import build_publisher

        self.parallel = initialize(tp=tp, timeout_s=60)
        self.shape = ModelShape.from_folder(folder)
        megatron = MegatronConfig(tensor_model_parallel_size=tp)
        self.chunks = build_model(self.shape, megatron, dtype=torch.float32, parallel=self.parallel)
        load_hf_folder(self.chunks, self.shape, folder, self.parallel)
        self.true = load_file(Path(folder) / "model.safetensors")
        self.servers = {server.url: server for server in make_servers(self.parallel.rank)}
        for server in self.servers.values():
            server.in_session = self.parallel.rank > 0  # every process has its copy; rank 0 opens its own
        self.outcomes: list[Any] = []
        scratch = keys.pop("default_folder", "unused")

        def score(rows: list[Any]) -> list[Any]:
            from dataclasses import replace

            values = toy_log_probs(self.true, [row.ids.tolist() for row in rows])
            return [replace(row, old_log_probs=torch.tensor([0.0, *v])) for row, v in zip(rows, values, strict=True)]

        self.publisher = build_publisher(
            WeightsConfig(**{"max_gather_mb": 1, "timeout_s": 5.0, "probe_tolerance": 1e-6} | keys),
            self.chunks,
            self.shape,
            self.parallel,
            dtype=torch.float32,
            model_folder=folder,
            default_folder=scratch,
            urls=lambda: list(self.servers),
            score=score,
            published=self.outcomes.append,
            connect=self.servers.__getitem__,
        )
        # buckets far smaller than a MiB, so that there are many of a tiny model
        from spear_megatron.weights.plan import plan_sync

        shapes = self.shape.parameter_shapes()
        plan = plan_sync(shapes, torch.float32, limit_bytes=9000, num_owners=self.parallel.dp_size)
        self.publisher.plan = self.publisher._gatherer.plan = plan
        if hasattr(self.publisher.way, "_plan"):
            self.publisher.way._plan = plan

    def holds_the_truth(self, url: str) -> bool:
        held = self.servers[url].weights
        return held.keys() == self.true.keys() and all(torch.equal(held[n], t) for n, t in self.true.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("publisher") / "model"))


def _a_failing_server(folder: str) -> None:
    from fake_control import FakeControl

    setting = Setting(folder, lambda rank: [FakeControl("good", tp_size=2), FakeControl("bad", fails_at=3)])
    outcome = setting.publisher.publish(4)
    assert outcome.fresh == ("good",) and "out of memory" in outcome.stale["bad"] and outcome.resends == 0
    assert "sent alone: model.embed_tokens.weight; " in outcome.notes[0]
    assert "without version 4: bad: " in outcome.notes[1] and setting.outcomes == [outcome]
    good, bad = setting.servers["good"], setting.servers["bad"]
    assert good.label == "4" and not good.paused and not good.in_session and setting.holds_the_truth("good")
    assert bad.label == "default" and bad.paused and bad.num_updates == 3, "nothing follows a failure"
    assert good.calls == ["pause retract", "flush", "resume"]
    # the session that was left open does not stand in the way of the next update
    outcome = setting.publisher.publish(5)
    assert outcome.fresh == ("good", "bad") and not outcome.stale and outcome.notes == ()
    assert setting.holds_the_truth("bad") and bad.label == "5" and not bad.paused
    assert not good.flushed_with_update and not bad.flushed_with_update
    with pytest.raises(EngineError, match="c gets weights with the next publish"):
        setting.publisher.send_current("c")
    assert outcome.metrics()["weights/servers"] == 2.0 and 0 <= outcome.probe_difference < 1e-6
    assert outcome.num_bytes == sum(tensor.nbytes for tensor in setting.true.values())
    setting.publisher.close()


def test_a_server_that_fails_is_stale_and_paused_and_the_others_go_on(folder: str) -> None:
    run_ranks(_a_failing_server, 1, folder)


def _no_server_left(folder: str) -> str:
    from fake_control import FakeControl

    from spear_megatron.parallel.errors import RunError

    setting = Setting(folder, lambda rank: [FakeControl("a", fails_at=1), FakeControl("b", keeps_label=True)])
    with pytest.raises(RunError) as error:
        setting.publisher.publish(3)
    return str(error.value)


def test_a_publish_without_any_server_stops_the_run_on_every_rank(folder: str) -> None:
    messages = run_ranks(_no_server_left, 2, folder)
    assert messages[0] == messages[1]
    assert "no server took weights of version 3: a: a/update_weights_from_tensor: HTTP 400" in messages[0]
    assert "b: it names version 'default' after an update to 3" in messages[0]


def _other_model(folder: str, other: str) -> str:
    from fake_control import FakeControl

    servers = [FakeControl("mine", model_path=folder), FakeControl("other", model_path=other)]
    setting = Setting(folder, lambda rank: servers)
    outcome = setting.publisher.publish(1)
    assert outcome.fresh == ("mine",) and servers[1].num_updates == 0 and servers[1].calls == []
    return outcome.stale["other"]


def test_a_server_with_another_model_is_sent_nothing(folder: str, tmp_path: Path) -> None:
    other = make_tiny_hf(tmp_path / "other", intermediate_size=56)
    (text,) = run_ranks(_other_model, 1, folder, str(other))
    assert "model.layers.0.mlp.gate_proj.weight of shape (56, 32), the trainer sends (48, 32)" in text
    untied = make_tiny_hf(tmp_path / "untied", tie_word_embeddings=False)
    (text,) = run_ranks(_other_model, 1, folder, str(untied))
    assert "needs lm_head.weight of shape (101, 32), the trainer sends None" in text


def _damaged(folder: str, times: int, resend: bool, has_checksums: bool) -> tuple[str, int, int]:
    from fake_control import FakeControl
    from weight_sync import corrupt

    from spear_megatron.parallel.errors import RunError

    server = FakeControl("server", has_checksums=has_checksums)
    setting = Setting(folder, lambda rank: [server], resend_on_mismatch=resend)
    corrupt(setting.publisher, DAMAGED, times=times)
    try:
        outcome = setting.publisher.publish(1)
    except RunError as error:
        return str(error), server.num_probes, -1
    assert setting.holds_the_truth("server") and outcome.fresh == ("server",)
    return " ".join(outcome.notes), server.num_probes, outcome.resends


@pytest.mark.parametrize("has_checksums", [False, True])
def test_a_tensor_damaged_once_is_named_and_all_is_sent_again(has_checksums: bool, folder: str) -> None:
    ((text, num_probes, resends),) = run_ranks(_damaged, 1, folder, 1, True, has_checksums)
    name = f"server.{DAMAGED}" if has_checksums else DAMAGED
    assert f"wrong on server: {name}." in text and resends == 1
    assert (num_probes == 2) == has_checksums, "with checksums there are only the probes before and after"


@pytest.mark.parametrize(("times", "resend"), [(100, True), (1, False)])
def test_damage_that_stays_or_may_not_be_repaired_stops_the_run(times: int, resend: bool, folder: str) -> None:
    ((text, _, resends),) = run_ranks(_damaged, 1, folder, times, resend, False)
    assert resends == -1 and "weights of version 1 arrived wrong" in text and f"wrong on server: {DAMAGED}." in text


def _other_program(folder: str) -> str:
    from fake_control import FakeControl

    from spear_megatron.parallel.errors import RunError

    server = FakeControl("server")
    setting = Setting(folder, lambda rank: [server])
    score = server.prompt_log_probs
    server.prompt_log_probs = lambda prompts: [[v + 0.1 for v in part] for part in score(prompts)]  # type: ignore
    with pytest.raises(RunError) as error:
        setting.publisher.publish(1)
    return str(error.value)


def test_a_server_that_computes_something_else_is_told_from_wrong_weights(folder: str) -> None:
    (text,) = run_ranks(_other_program, 1, folder)
    assert "the trainer's forward pass and the server's model differ" in text and "server: 0.1)" in text


def _leaders(folder: str, tp: int) -> tuple[set[str], int, int]:
    """Names that this rank sent, bytes of them, and its peak; only rank 0's server is asked about itself."""
    from fake_control import FakeControl

    server = FakeControl("server", {})
    setting = Setting(folder, lambda rank: [server], tp=tp, probe_prompts=0)
    outcome = setting.publisher.publish(1)
    for name, tensor in server.weights.items():
        assert torch.equal(tensor, setting.true[name])
    assert outcome.peak_bytes <= 3 * 9000 + 101 * 32 * 4
    return set(server.weights), sum(tensor.nbytes for tensor in server.weights.values()), outcome.num_bytes


@pytest.mark.parametrize(("world_size", "tp"), [(2, 1), (4, 2)])
def test_leaders_share_the_work_and_no_tensor_is_sent_twice(world_size: int, tp: int, folder: str) -> None:
    results = run_ranks(_leaders, world_size, folder, tp)
    sent = [(names, size) for names, size, _ in results if names]
    assert len(sent) == 2 and not sent[0][0] & sent[1][0]
    assert sent[0][1] + sent[1][1] == results[0][2]
    assert abs(sent[0][1] - sent[1][1]) <= 101 * 32 * 4, "even but for the largest bucket, the embedding"


def _to_disk(folder: str, scratch: str, shared: bool) -> Any:
    import os

    from fake_control import FakeControl

    from spear_megatron.parallel.errors import RunError

    rank_folder = scratch if shared else f"{scratch}/rank_{os.environ['RANK']}"
    keys = {"way": "disk", "keep": 2, "default_folder": rank_folder}
    setting = Setting(folder, lambda rank: [FakeControl("server")], **keys)
    try:
        for version in (1, 2, 3):
            setting.publisher.publish(version)
    except RunError as error:
        return str(error)
    if setting.parallel.rank == 0:
        late = FakeControl("late")
        setting.servers["late"] = late
        setting.publisher.send_current("late")
        assert late.label == "3" and setting.holds_the_truth("late") and not late.flushed_with_update
    return setting.parallel.rank > 0 or setting.holds_the_truth("server")


def test_weights_on_disk_are_whole_and_old_versions_go(folder: str, tmp_path: Path) -> None:
    from spear_megatron.model.hf_folder import HFWeights
    from spear_megatron.model.shape import ModelShape

    assert run_ranks(_to_disk, 2, folder, str(tmp_path), True) == [True, True]
    names = ["version_00000002", "version_00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    shape = ModelShape.from_folder(tmp_path / names[1])
    with HFWeights.open(tmp_path / names[1], shape) as weights:
        assert weights.files.keys() == shape.parameter_shapes().keys()


def test_weights_of_a_course_that_was_left_do_not_displace_new_ones(folder: str, tmp_path: Path) -> None:
    for version in (8, 9):
        (tmp_path / f"version_{version:08d}").mkdir()
    assert run_ranks(_to_disk, 1, folder, str(tmp_path), True) == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_00000002", "version_00000003"]


def test_leaders_that_do_not_share_the_folder_are_told(folder: str, tmp_path: Path) -> None:
    messages = run_ranks(_to_disk, 2, folder, str(tmp_path), False)
    assert messages[0] == messages[1] and "sglang.weights.folder must be one folder" in messages[0]
