"""What watches a run, on two ranks: heartbeats, a slow rank by name, peak memory, spikes by agreement."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import run_ranks
from train_loop import command_on_rank

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.heartbeat import read_heartbeats
from spear_megatron.observability.record import read_record
from spear_megatron.observability.schema import lookup

SETTINGS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[]", "trainer.num_threads=1", "trainer.save_hf=false",
    "trainer.total_training_steps=6", "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false",
    "data.generator.levels=[1]", "data.generator.num_train=16", "data.max_prompt_length=64",
    "data.max_response_length=12", "data.train_batch_size=2", "env.sandbox.preload=[]",
    "reward.name=train_loop:EvenTokens", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=1", "trainer.profile.steps=[2, 3]", "trainer.profile.ranks=[1]",
    "trainer.loss_spike.action=stop", "trainer.loss_spike.window=4", "trainer.loss_spike.factor=1.01",
)  # fmt: skip


def test_a_run_of_two_ranks_is_watched_and_stops_itself_at_a_spike(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", seed=0)
    run_dir = tmp_path / "run"
    arguments = [
        "train", f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *SETTINGS
    ]  # fmt: skip
    # Two updates a step: the rule judges from the third step on, and a factor of 1.01 finds a spike soon.
    assert run_ranks(command_on_rank, 2, arguments) == [1, 1]
    record = read_record(run_dir)
    last = record[-1]
    assert 3 <= last["step"] < 6 and last["training/loss_spikes"] == 1
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{last['step']:08d}"]
    assert {line["training/loss_spikes"] for line in record[:-1]} == {0}
    assert [(sign["rank"], sign["step"], sign["phase"]) for sign in read_heartbeats(run_dir)] == [
        (rank, last["step"], "ended") for rank in (0, 1)
    ]
    trace = json.loads((run_dir / "profile" / "rank_1_steps_2_2.json").read_text())
    assert len(trace["traceEvents"]) > 100 and len(list((run_dir / "profile").iterdir())) == 1
    for line in record:
        assert line["perf/memory/update_actor"] > 100 and "perf/memory/gen" in line
        assert all(lookup(name) is not None for name in line if name.startswith(("perf/", "training/")))


def slow_rank(run_dir: str) -> dict[str, float]:
    """Rank 1 works 0.3 s in a phase that ends in a collective, rank 0 waits for it there."""
    from spear_megatron.parallel.agreement import gather_objects
    from spear_megatron.parallel.state import initialize
    from spear_megatron.trainer.run_config import TrainerConfig
    from spear_megatron.trainer.watch import Watch

    parallel = initialize()
    watch = Watch(TrainerConfig(default_local_dir=run_dir), parallel)
    watch.start()
    with watch.phase("pack"):
        time.sleep(0.3 * parallel.rank + 0.05)
        gather_objects(parallel, None)
    watch.close()
    return watch.take(0.4)


def test_a_slow_rank_is_named_though_all_ranks_are_in_the_phase_equally_long(tmp_path: Path) -> None:
    one, other = run_ranks(slow_rank, 2, str(tmp_path))
    assert one == other
    assert one["perf/slowest_rank/pack"] == 1.0 and one["perf/straggler/pack"] > 2.5


def refused_on_one_rank() -> Any:
    """An update that rank 1 alone refuses is left out on both."""
    import torch

    from spear_megatron.parallel.state import initialize
    from spear_megatron.trainer.actor import Actor
    from spear_megatron.trainer.figures import StepFigures

    parallel, applied = initialize(), list[float]()
    optimizer = SimpleNamespace(apply=lambda norm, advance_schedule: applied.append(norm))
    actor: Any = SimpleNamespace(_parallel=parallel, optimizer=optimizer)
    figures = StepFigures({"loss": 1.0}, {})
    told = list[tuple[float, float]]()

    def approve(loss: float, norm: float) -> bool:
        told.append((loss, norm))
        return parallel.rank == 0

    verdict = Actor._apply(actor, figures, 2.0, True, approve)
    assert told == [(1.0, 2.0)]
    agreed = Actor._apply(actor, figures, 3.0, True, lambda loss, norm: True)
    return verdict, agreed, applied, torch.is_grad_enabled()


def test_a_refusal_of_one_rank_holds_for_all() -> None:
    assert run_ranks(refused_on_one_rank, 2) == [("refused", None, [3.0], True)] * 2
