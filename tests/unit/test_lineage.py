"""Lineage of trajectories: exact round trip, resume, tracing against a plain search, and its page in the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from spear_megatron.__main__ import main
from spear_megatron.observability.lineage import (
    Lineage,
    LineageStore,
    Pushed,
    StepLineage,
    Used,
    most_replayed,
    read_lineage,
    trace,
    trace_in,
)
from spear_megatron.observability.trajectories import TrajectoryStore
from spear_megatron.types import TrajectoryId
from test_view_trajectories import decode, groups

Id = TrajectoryId


def pushed(id: Id, advantage: float = 1.25) -> Pushed:
    return Pushed(id, advantage, reward=1.18, base=1.0, bonus=0.2, tokens=143)


def used(id: Id, step: int, update: int = 0) -> Used:
    return Used(id, step - id.step, reward=1.1, advantage=0.7, tokens=143, selected=5, update=update, weight=2.5e-5)


def history() -> list[StepLineage]:
    """(1, 0, 0) is pushed, used at 2 and twice at 3, expires at 4; the others meet every other fate."""
    one, two = Id(1, 0, 0), Id(1, 0, 1)
    return [
        StepLineage(
            1, mu=0.9, gamma=0.1, p50=None, pushed=(pushed(one), pushed(two)),
            rejected={"advantage": (Id(1, 1, 0),), "requirement": (Id(1, 1, 1),)},
            filtered={"overlong": (Id(1, 2, 0),)},
        ),
        StepLineage(2, mu=0.8, gamma=0.2, p50=0.4, used=(used(one, 2),)),
        StepLineage(3, mu=0.7, gamma=0.3, p50=0.5, used=(used(one, 3), used(one, 3, 1), used(two, 3))),
        StepLineage(4, mu=0.6, gamma=0.4, p50=0.6, expired=(one,), evicted=(two,)),
    ]  # fmt: skip


def write(run_dir: Path, events: list[StepLineage], resume_step: int | None = None) -> None:
    store = LineageStore(run_dir, resume_step)
    for event in events:
        store.write(event.step, event)
    store.close()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    write(tmp_path, history())
    assert read_lineage(tmp_path) == history()
    ids = [item.id for event in read_lineage(tmp_path) for item in (*event.pushed, *event.used)]
    assert all(type(id) is Id for id in ids)
    line = json.loads((tmp_path / "lineage.jsonl").read_text().splitlines()[0])
    assert line["pushed"][0]["id"] == [1, 0, 0]
    assert line["rejected"] == {"advantage": [[1, 1, 0]], "requirement": [[1, 1, 1]]}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    item = dataclasses.replace(used(Id(1, 0, 0), 2), advantage=math.nan)
    write(tmp_path, [StepLineage(2, mu=math.inf, gamma=0.5, p50=math.nan, used=(item,))])
    assert "NaN" not in (tmp_path / "lineage.jsonl").read_text()
    (event,) = read_lineage(tmp_path)
    assert math.isnan(event.mu) and event.p50 is None and math.isnan(event.used[0].advantage)


@pytest.mark.parametrize("cut", ["", '{"step": 5, "mu"'])
def test_resume_drops_later_steps_and_a_cut_line(tmp_path: Path, cut: str) -> None:
    write(tmp_path, history())
    with (tmp_path / "lineage.jsonl").open("a") as stream:
        stream.write(cut)
    assert read_lineage(tmp_path) == history()
    again = dataclasses.replace(history()[2], mu=0.25)
    write(tmp_path, [again], resume_step=2)
    assert read_lineage(tmp_path) == [*history()[:2], again]


def test_a_new_start_moves_the_old_lineage_aside(tmp_path: Path) -> None:
    write(tmp_path, history())
    write(tmp_path, history()[:1])
    assert len(read_lineage(tmp_path)) == 1 and (tmp_path / "lineage.previous-1.jsonl").is_file()


def test_wrong_steps_and_damage_are_refused(tmp_path: Path) -> None:
    store = LineageStore(tmp_path)
    with pytest.raises(ValueError, match="step 2 cannot be written as that of step 3"):
        store.write(3, StepLineage(2))
    store.write(3, StepLineage(3))
    with pytest.raises(ValueError, match="already recorded"):
        store.write(3, StepLineage(3))
    path = tmp_path / "lineage.jsonl"
    path.write_text(path.read_text().replace('"gamma"', '"gama"'))
    with pytest.raises(ValueError, match="step 3 is damaged: KeyError"):
        read_lineage(tmp_path)
    with pytest.raises(FileNotFoundError, match="not the directory of a run that kept its lineage"):
        read_lineage(tmp_path / "none")


def test_trace_follows_one_trajectory(tmp_path: Path) -> None:
    write(tmp_path, history())
    lineage = trace(tmp_path, Id(1, 0, 0))
    assert lineage.pushed == pushed(Id(1, 0, 0)) and lineage.mu == 0.9 and lineage.left == (4, "expired")
    assert [(use.step, use.used.update, use.mu, use.gamma, use.p50) for use in lineage.uses] == [
        (2, 0, 0.8, 0.2, 0.4), (3, 0, 0.7, 0.3, 0.5), (3, 1, 0.7, 0.3, 0.5),
    ]  # fmt: skip
    assert trace(tmp_path, Id(1, 0, 1)).left == (4, "evicted")
    assert trace(tmp_path, Id(1, 1, 1)).rejected == "requirement"
    assert trace(tmp_path, Id(1, 2, 0)).filtered == "overlong"
    unknown = trace(tmp_path, Id(9, 9, 9))
    assert not unknown.known and unknown.last_step == 4


def test_a_trajectory_that_went_on_later_has_the_figures_of_the_step_that_judged_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = Id(1, 0, 0), Id(3, 5, 0)
    events = [StepLineage(1, mu=0.9), StepLineage(2, mu=0.8), StepLineage(3, mu=0.7), StepLineage(4, mu=0.6)]
    events[2] = dataclasses.replace(events[2], pushed=(pushed(early),), filtered={"overlong": (Id(1, 0, 1),)})
    events[3] = dataclasses.replace(events[3], rejected={"advantage": (late,)})
    write(tmp_path, events)
    for id, step, mu in ((early, 3, 0.7), (Id(1, 0, 1), 3, 0.7), (late, 4, 0.6), (Id(1, 9, 9), None, None)):
        lineage = trace(tmp_path, id)
        assert (lineage.step, lineage.mu) == (step, mu)
    TrajectoryStore(tmp_path, 8, decode).write(3, groups(1), {})
    assert main(["view", str(tmp_path), "--lineage", "1-0-0"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "problem 0" in text and "step 3 mu 0.700 pushed into" in text


def test_many_traces_equal_a_plain_search() -> None:
    rng = random.Random(7)
    ids = [Id(step, task, sample) for step in range(1, 6) for task in range(3) for sample in range(2)]
    events = []
    for step in range(1, 12):
        old = [id for id in ids if id.step < step]
        uses = tuple(used(id, step, rng.randrange(2)) for id in rng.sample(old, min(len(old), 4)))
        gone = tuple(rng.sample(old, min(len(old), 1)))
        new = tuple(pushed(id) for id in ids if id.step == step)
        events.append(StepLineage(step, pushed=new, used=uses, expired=gone))
    for id, lineage in trace_in(events, ids).items():
        wanted = [(event.step, item) for event in events for item in event.used if item.id == id]
        assert [(use.step, use.used) for use in lineage.uses] == wanted
        assert (lineage.left is None) == all(id not in event.expired for event in events)
    counts = [len(lineage.uses) for lineage in most_replayed(events, 5)]
    every = sorted((len(lineage.uses) for lineage in trace_in(events, ids).values()), reverse=True)
    assert counts == every[:5] and isinstance(most_replayed(events, 1)[0], Lineage)


@pytest.mark.parametrize(
    ("id", "parts"),
    [
        ("1-0-0", ["problem 0", "assistant", "stop: answer", "outcome +0", "pushed into", "group advantage +1.250",
                   "reward +1.180 = base +1.000 + mu * tool bonus 0.200", "step 2", "+0.400", "2.50e-05", "0.300",
                   "left the buffer at step 4: expired (too old), after 3 uses"]),
        ("1-1-0", ["not pushed, rule 'advantage'", "trajectory_score_threshold"]),
        ("1-2-0", ["filtered: overlong", "filter_overlong_responses"]),
        ("2-0-0", ["conversation not kept", "step 3", "still in the buffer at step 4"]),
    ],
)  # fmt: skip
def test_view_of_one_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str], id: str, parts: list[str]) -> None:
    events = history()
    events[1] = dataclasses.replace(events[1], pushed=(pushed(Id(2, 0, 0)),))
    events[2] = dataclasses.replace(events[2], used=(*events[2].used, used(Id(2, 0, 0), 3)))
    write(tmp_path, events)
    TrajectoryStore(tmp_path, 8, decode).write(1, groups(1), {})
    assert main(["view", str(tmp_path), "--lineage", id]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(part in text for part in parts), text


def test_view_lists_the_most_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, history())
    assert main(["view", str(tmp_path), "--lineage"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith("1-0-")]
    assert [row[:3] for row in rows] == [["1-0-0", "3", "2-3"], ["1-0-1", "1", "3-3"]]
    assert rows[0][-2:] == ["expired", "4"] and "…" not in text and max(map(len, text.splitlines()[1:])) <= 80


def test_view_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path), "--lineage"]) == 2
    assert "lineage.jsonl does not exist" in capsys.readouterr().err
    write(tmp_path, [StepLineage(1)])
    assert main(["view", str(tmp_path), "--lineage"]) == 0 and "nothing was replayed" in capsys.readouterr().out
    assert main(["view", str(tmp_path), "--lineage", "1-2-3"]) == 2
    assert "does not mention trajectory 1-2-3" in capsys.readouterr().err
    assert main(["view", str(tmp_path), "--lineage", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --lineage 'x'")
