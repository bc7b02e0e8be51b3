"""Continuing a run: what a checkpoint may not be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_trainer_deal import one_rank_run

from spear_megatron.trainer.run_config import TrainerConfig


def restored(checkpoint_step: int | None, total_training_steps: int) -> tuple[int | None, list[int]]:
    """Step that a run continues from, and the steps that it still has to do."""
    states = {"progress": {"step": checkpoint_step}, "prompt_source": {}}
    loaded = None if checkpoint_step is None else SimpleNamespace(step=checkpoint_step, states=states)
    run = one_rank_run()
    run.trainer = TrainerConfig(total_training_steps=total_training_steps, default_local_dir="runs/a")
    optimizer = SimpleNamespace(megatron=None, scheduler=None, follow_configuration=lambda: None)
    parts: Any = SimpleNamespace(
        actor=SimpleNamespace(chunks=[], optimizer=optimizer),
        checkpoints=SimpleNamespace(load_latest=lambda *args, **options: loaded),
        prompts=SimpleNamespace(load_state_dict=lambda state: None),
        imitation=None,
    )
    run.parts = parts
    return run.restore(), list(run.remaining_steps())


def test_a_run_goes_on_after_its_checkpoint() -> None:
    assert restored(None, 3) == (None, [1, 2, 3])
    assert restored(2, 3) == (2, [3])
    assert restored(3, 3) == (3, [])


def test_a_run_that_was_shortened_below_its_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="runs/a is already at step 4, beyond trainer.total_training_steps=3"):
        restored(4, 3)
