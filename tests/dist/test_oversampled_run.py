"""A run with over-sampling on two ranks, and the same run again from its record, on two ranks and on one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from async_run import STEPS, arguments, course, run_command

from spear_megatron.data.tiny import make_tiny_model

OVER = ("actor_rollout_ref.rollout.over_sampling=1.75", "actor_rollout_ref.rollout.max_num_seqs=4")


def test_a_run_is_repeated_from_its_record_also_on_another_number_of_ranks(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model", seed=0))
    run_command(2, arguments(model, tmp_path / "two", *OVER))
    record = tmp_path / "two" / "acceptance.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(len(line["accepted"]) == 4 and len(line["candidates"]) == 7 for line in lines)
    assert {group["owner"] for line in lines for group in line["groups"]} == {0, 1}
    expected, weights = course(tmp_path / "two")
    assert all(
        figures["oversampling/prompts_returned"] == 3 and figures["oversampling/response_length_started"] > 0
        for figures in expected.metrics.values()
    )
    for name, world_size in (("again", 2), ("one", 1)):
        (tmp_path / name).mkdir()
        shutil.copy(record, tmp_path / name)
        run_command(world_size, arguments(model, tmp_path / name, *OVER))
        assert (tmp_path / name / "acceptance.jsonl").read_bytes() == record.read_bytes()
    again, same = course(tmp_path / "again")
    assert again.metrics == expected.metrics and again.tokens == expected.tokens and same == weights
    one, _ = course(tmp_path / "one")  # rounding differs: a token of a later step may, and then all that follow
    assert one.tokens[1] == expected.tokens[1]
    assert {step: one.tokens[step].keys() for step in one.tokens} == {
        step: expected.tokens[step].keys() for step in expected.tokens
    }
