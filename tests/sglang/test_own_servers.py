"""A run with servers of its own: started, published to, sampled from, killed under it, and ended with it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import psutil
import pytest
from fleet import commands_with, launch_config, processes_of, until

from spear_megatron.__main__ import main
from spear_megatron.cli.agents import load_renderer, open_agents, samplings
from spear_megatron.cli.servers import Publishing
from spear_megatron.cli.session import open_parallel
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.prompts import load_prompts
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.record import read_record
from spear_megatron.rollout.collect import Tasks
from spear_megatron.types import Trajectory
from spear_megatron.weights.publisher import Published

_SGLANG = "actor_rollout_ref.rollout.sglang"


def config_of(folder: Path, run_dir: Path) -> Config:
    """Two servers of the run's own."""
    python = launch_config().python
    overrides = [
        f"actor_rollout_ref.model.path={folder}", "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1",
        f"trainer.default_local_dir={run_dir}", "actor_rollout_ref.rollout.name=sglang", "env.sandbox.preload=[]",
        f"{_SGLANG}.launch.python={python}", f"{_SGLANG}.launch.num_servers=2", f"{_SGLANG}.launch.hung_after_s=20",
        f"{_SGLANG}.launch.args={{max-total-tokens: 4096}}", f"{_SGLANG}.launch.restart_backoff_s=0.1",
        f"{_SGLANG}.health_interval_s=0.5", f"{_SGLANG}.health_failures=1", "data.max_prompt_length=64",
        "data.max_response_length=160", "data.generator.levels=[1]", "data.generator.num_train=8",
        "actor_rollout_ref.rollout.max_num_seqs=8",
    ]  # fmt: skip
    return load(Config, None, overrides)


def sampled(tasks_of: list[Trajectory]) -> list[int]:
    """Policy versions of all sampled tokens."""
    versions = []
    for trajectory in tasks_of:
        for segment in trajectory.segments:
            assert segment.policy_versions is not None
            versions += segment.policy_versions[segment.response_mask].tolist()
    return versions


def test_a_run_with_a_server_of_its_own_takes_turns_with_it(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir, key = tmp_path / "run", _SGLANG
    command = [
        "train", f"actor_rollout_ref.model.path={tiny_folder}", "actor_rollout_ref.model.dtype=fp32",
        f"trainer.default_local_dir={run_dir}", "trainer.num_threads=1", "trainer.total_training_steps=2",
        "trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.save_freq=-1", "trainer.save_hf=false",
        "trainer.logger=[]", "data.generator.levels=[1]", "data.generator.num_train=8", "data.train_batch_size=2",
        "data.max_prompt_length=128", "data.max_response_length=48", "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "env.sandbox.preload=[]", "actor_rollout_ref.rollout.name=sglang", f"{key}.colocated=true",
        f"{key}.weights.way=disk", f"{key}.launch.python={launch_config().python}",
        f"{key}.launch.args={{max-total-tokens: 4096}}",
    ]  # fmt: skip
    assert main(command) == 0
    steps = [line for line in read_record(run_dir) if line["step"] > 0]
    assert [line["sglang/servers"] for line in steps] == [1.0, 1.0]
    assert [line["sglang/restarts"] for line in steps] == [0.0, 0.0]
    log = (run_dir / "sglang" / "server_0" / "attempt_0.log").read_text(errors="replace")
    asked = re.findall(r"POST /(\w*memory_occupation|update_weights_from_disk|flush_cache\?timeout)", log)
    update = "update_weights_from_disk"
    turns = [word.partition("_memory")[0] for word in asked if word != "flush_cache?timeout"]
    # First of all the servers make room for the optimizer's states of a checkpoint that there might be.
    assert turns == ["release", "resume", update] * 3
    releases = [index for index, word in enumerate(asked) if word.startswith("release")]
    assert all(asked[index - 1] == "flush_cache?timeout" for index in releases)
    assert not commands_with(str(run_dir))


@pytest.mark.slow
def test_a_step_completes_though_one_of_two_servers_is_killed_in_it(tiny_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_folder, tmp_path / "run")
    shape, prompts = ModelShape.from_folder(tiny_folder), load_prompts(config.data, "train")
    with open_parallel(config) as parallel, open_agents(
        config, parallel, load_renderer(tiny_folder), shape
    ) as agents:
        fleet, engine = agents.servers.fleet, agents.engine
        assert fleet is not None and engine is not None and len(agents.servers.urls) == 2
        servers = [processes_of(url) for url in agents.servers.urls]

        def send(version: int) -> Published:
            with HFWeights.open(tiny_folder, shape) as weights:
                engine.update_weights(((name, weights.read(name)) for name in shape.parameter_shapes()), version)
            return Published(version, agents.servers.urls, {}, resends=0, num_bytes=0, peak_bytes=0)

        publishing = Publishing(parallel, agents.servers, send, None)
        publishing.publish(3)
        assert len(fleet.serving()) == 2

        def kill_soon() -> None:
            until(lambda: agents.engine._active)
            time.sleep(0.2)
            servers[0][0].kill()

        killer = threading.Thread(target=kill_soon)
        killer.start()
        tasks = Tasks("train", 4, tuple(enumerate(prompts[:6])), 4, samplings(config)[0])
        collected = agents.collector.collect(tasks)
        killer.join()
        found = [trajectory for group in collected.groups for trajectory in group.trajectories]
        assert [trajectory.id for trajectory in found] == sorted({trajectory.id for trajectory in found})
        assert len(found) == 24 and all(trajectory.valid for trajectory in found)
        assert set(sampled(found)) == {3}
        assert agents.take_metrics()["engine/lost"] >= 1
        until(lambda: len(fleet.serving()) == 1)  # the step may end before anybody misses the server
        publishing.publish(4)  # waits for the replacement, which takes the weights too
        assert [end.attempt for end in fleet.serving()] == [1, 0]
        again = agents.collector.collect(Tasks("train", 5, ((0, prompts[0]),), 4, samplings(config)[0]))
        versions = sampled([trajectory for group in again.groups for trajectory in group.trajectories])
        assert set(versions) == {4}
        metrics = agents.take_metrics()
        assert metrics["sglang/restarts"] == 1 and metrics["sglang/servers"] == 2
        last = [process for url in agents.servers.urls for process in processes_of(url)]
    every = [process for group in servers for process in group] + last
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in every)
