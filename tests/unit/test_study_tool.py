"""tools/study.py: its plan, its pool of runs with stand-ins for training, and its report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import study as tool  # noqa: E402
import study_plan as plan  # noqa: E402
import study_pool as pool  # noqa: E402
import study_report as report  # noqa: E402

STUDY: dict[str, Any] = {
    "arms": {
        "grpo": {"title": "GRPO"},
        "other": {"title": "Other", "preset": "child.yaml", "overrides": {"algorithm": {"gamma": 0.5}}},
    },
    "baselines": ["grpo"],
    "tasks": {
        "easy": {
            "title": "Easy",
            "config": "task.yaml",
            "prepare": [["-m", "made_up", "{start}/model"]],
            "overrides": {"algorithm.max_toolcall_steps": 7, "data.val_files": "{start}/val.jsonl"},
            "token_budget": 300,
            "learning_rates": [1e-4, 3e-4],
            "deadline_minutes": 0.2,
        }
    },
    "sweep": {"arm": "other", "variants": {"base": {}, "still": {plan.LR: 1e-9}}},
}


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    algorithm = "{gamma: 0.9, max_toolcall_steps: 200, use_toolcall_reward: cosine}"
    (tmp_path / "parent.yaml").write_text(f"algorithm: {algorithm}\n")
    (tmp_path / "child.yaml").write_text("base: parent.yaml\nreward: {kwargs: {wrong: -1.0}}\n")
    (tmp_path / "task.yaml").write_text("sft: {num_examples: 5}\n")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def test_later_layers_win_and_start_is_filled_in(study_file: Path, tmp_path: Path) -> None:
    study = plan.load_study(study_file)
    task, start = study.tasks["easy"], tmp_path / "start"
    spec = plan.run_spec(task, study.arms["other"], 3, tmp_path / "run", start=start, lr=2e-4)
    values = dict(text.split("=", 1) for text in spec.overrides)
    assert values["algorithm.use_toolcall_reward"] == '"cosine"', "from the preset's base"
    assert values["algorithm.max_toolcall_steps"] == "7", "the task scales the preset's schedule"
    assert values["algorithm.gamma"] == "0.5" and values["reward.kwargs.wrong"] == "-1.0"
    assert values["data.val_files"] == f'"{start}/val.jsonl"' and values[plan.LR] == "0.0002"
    assert values["trainer.seed"] == values["data.seed"] == "3"
    still = plan.run_spec(task, study.arms["other"], 3, tmp_path, start=start, lr=2e-4, variant=study.sweep["still"])
    assert f"{plan.LR}=1e-09" in still.overrides and still.fingerprint != spec.fingerprint
    elsewhere = plan.run_spec(task, study.arms["other"], 3, tmp_path / "moved", start=Path("/x/start"), lr=2e-4)
    assert elsewhere.fingerprint == spec.fingerprint, "places do not change what a run is"
    assert spec.command[1:4] == ["-m", "spear_megatron", "train"]


def test_every_run_loads_as_a_configuration(study_file: Path, tmp_path: Path) -> None:
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config

    study = plan.load_study(study_file)
    for arm in study.arms.values():
        spec = plan.run_spec(study.tasks["easy"], arm, 1, tmp_path / "run", start=tmp_path / "start")
        config = load(Config, spec.task.config, spec.overrides)
        assert config.trainer.seed == 1 and config.algorithm.max_toolcall_steps == 7
        assert config.data.val_files == (f"{tmp_path}/start/val.jsonl",)


def test_start_depends_on_what_makes_it(study_file: Path, tmp_path: Path) -> None:
    def folder() -> Path:
        return plan.start_folder(plan.load_study(study_file).tasks["easy"], tmp_path)

    first = folder()
    assert folder() == first and first.parent == tmp_path / "easy"
    (tmp_path / "task.yaml").write_text("sft: {num_examples: 5}\ntrainer: {test_freq: 3}\n")
    assert folder() == first, "how often a run is evaluated does not change its start"
    (tmp_path / "task.yaml").write_text("sft: {num_examples: 6}\n")
    assert folder() != first


def test_a_value_that_a_run_would_refuse_is_refused_before_anything_runs(study_file: Path, tmp_path: Path) -> None:
    arms = {"grpo": {"overrides": {"algorithm.gama": 1.0}}}
    study_file.write_text(yaml.safe_dump({**STUDY, "arms": arms, "sweep": {}}))
    study = plan.load_study(study_file)
    with pytest.raises(ValueError, match="algorithm.gama"):
        plan.run_spec(study.tasks["easy"], study.arms["grpo"], 1, tmp_path / "run", start=tmp_path / "start")


def test_plan_has_every_arm_with_every_seed(study_file: Path, tmp_path: Path) -> None:
    study = plan.load_study(study_file)
    task, starts = study.tasks["easy"], {"easy": tmp_path / "start"}
    stages = tool.plan(study, [task], tmp_path, list(study.arms), 3, starts, {"easy": {"grpo": 5e-4}})
    assert [(spec.seed, spec.arm) for spec in stages["study"]] == [
        (seed, arm) for seed in (1, 2, 3) for arm in ("grpo", "other")
    ]
    assert {spec.seed for spec in stages["tune"]}.isdisjoint({1, 2, 3}) and len(stages["tune"]) == 4
    assert len({spec.folder for specs in stages.values() for spec in specs}) == 6 + 4 + 2
    assert all(f"{plan.LR}=0.0005" in spec.overrides for spec in stages["study"] if spec.arm == "grpo")
    untuned = [text for spec in stages["study"] if spec.arm == "other" for text in spec.overrides]
    assert not any(text.startswith(plan.LR) for text in untuned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baselines": ["missing"]}, "missing not among the arms grpo, other"),
        ({"tasks": {"easy": {"config": "x.yaml"}}}, "not a study file: KeyError: 'token_budget'"),
        ({"arms": None}, "not a study file"),
        ({"arms": {"grpo": {"preset": ["a"]}}}, "not a study file"),
    ],
)
def test_bad_study_files_are_refused(study_file: Path, change: dict[str, Any], message: str) -> None:
    study_file.write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(ValueError, match=message):
        plan.load_study(study_file)


def test_unknown_names_and_missing_presets_end_with_one_line(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--study", str(study_file), "--out", str(study_file.parent / "out"), "--budget-only"]
    assert tool.main([*options, "--arms", "sper"]) == 2
    assert "--arms sper: the study file has grpo, other" in capsys.readouterr().err
    assert tool.main(options) == 0
    assert "study: 10 runs, 10 of them to do, 3,000 tokens in all, about 25 min" in capsys.readouterr().out
    (study_file.parent / "child.yaml").unlink()
    assert tool.main(options) == 2 and "child.yaml does not exist" in capsys.readouterr().err


STAND_IN = """
import json, signal, sys, time
from pathlib import Path
folder, mode = Path(sys.argv[1]), sys.argv[2]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
path = folder / "metrics.jsonl"
step = len(path.read_text().splitlines()) if path.exists() else 0
(folder / "begun").open("a").write(f"{step} ")
while step < 1000 and not stopped:
    line = {"step": step, "perf/response_tokens": 50.0 if step else 0.0, "timing_s/step": 0.1}
    line["val/success_rate"] = 0.01 * step
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\\n")
    step += 1
    if mode == "crash" and step == 3:
        sys.exit(3)
    time.sleep(5.0 if mode == "slow" else 0.05)
"""


@dataclass(frozen=True, kw_only=True)
class StandIn(plan.RunSpec):
    """A run whose process only writes a record."""

    mode: str = "good"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(self.folder), self.mode]


def stand_in(root: Path, name: str, mode: str = "good", minutes: float = 1.0) -> StandIn:
    task = plan.Task(name="t", title="T", config=Path("c"), token_budget=300, deadline_minutes=minutes)
    return StandIn(task=task, arm=name, seed=1, folder=root / name / "seed_1", overrides=(), fingerprint="f", mode=mode)


def test_runs_stop_at_the_budget_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    specs = [stand_in(tmp_path, name) for name in ("a", "b", "c")]
    said: list[str] = []
    assert pool.run_all(specs, 2, said.append) == []
    assert len(said) == 3 and said[-1].startswith("[3/3] t ")
    for spec in specs:
        done = json.loads((spec.folder / pool.DONE_NAME).read_text())
        assert done["reached_budget"] == 1.0 and 300 <= done["tokens"] < 5000
        assert done["seconds"] == pytest.approx(0.1 * (done["steps"] + 1))
    said.clear()
    assert pool.run_all(specs, 2, said.append) == [] and said == ["3 of 3 runs are done already"]
    assert (specs[0].folder / "begun").read_text() == "0 "


def test_a_crashed_run_is_reported_and_continued(tmp_path: Path) -> None:
    good, bad = stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "crash")
    (failure,) = pool.run_all([bad, good], 1, lambda text: None)
    assert "t b seed 1 FAILED: exit code 3" in failure and pool.LOG_NAME in failure
    assert pool.is_done(good) and not pool.is_done(bad)
    mended = stand_in(tmp_path, "b")
    assert pool.run_all([mended, good], 1, lambda text: None) == []
    assert (mended.folder / "begun").read_text() == "0 3 "


def test_a_run_beyond_its_deadline_fails(tmp_path: Path) -> None:
    began = time.monotonic()
    (failure,) = pool.run_all([stand_in(tmp_path, "a", "slow", minutes=0.02)], 1, lambda text: None)
    assert "did not finish within 0.02 min" in failure and time.monotonic() - began < 30


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    spec = stand_in(tmp_path, "a")
    pool.run_all([spec], 1, lambda text: None)
    other = StandIn(task=spec.task, arm="a", seed=1, folder=spec.folder, overrides=(), fingerprint="g")
    with pytest.raises(ValueError, match="holds a run of other settings"):
        pool.run_all([other], 1, lambda text: None)


def finished(folder: Path, start: float, end: float, **metrics: float) -> None:
    """A finished run of 400 tokens whose success goes from ``start`` to ``end``."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "val/success_rate": start}]
    for step in (1, 2, 3, 4):
        line = {"step": step, "perf/response_tokens": 100.0, "actor/entropy": 0.5, **metrics}
        lines.append({**line, "val/success_rate": start + (end - start) * step / 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / pool.DONE_NAME).write_text("{}")


def test_report_claims_what_the_intervals_show(study_file: Path, tmp_path: Path) -> None:
    study, out = plan.load_study(study_file), tmp_path / "out"
    for seed, luck in ((1, 0.0), (2, 0.1), (3, 0.05)):
        finished(out / "easy/runs/grpo" / f"seed_{seed}", 0.0, 0.2 + luck)
        finished(out / "easy/runs/other" / f"seed_{seed}", 0.0, 0.6 + 1.1 * luck, **{"cov/selected": 0.0})
    finished(out / "easy/sweep/still/seed_1", 0.0, 0.0, **{"replay/ratio_mean": 1.0})
    finished(out / "easy/tune/other-lr0.0003/seed_101", 0.0, 0.4)
    (tmp_path / "notes.md").write_text("## What was found\n")
    study = dataclasses.replace(study, notes=tmp_path / "notes.md")
    page = report.write_report(study, list(study.tasks.values()), out, tmp_path / "docs", {"easy": {"grpo": 5e-4}})
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| Other")]
    assert any(row.count("higher") == 2 and "| 3 |" in row for row in rows)
    assert "budget 300 sampled tokens" in text and "| GRPO | 0.0005 | 3 | 18.8 [" in text
    assert "covariance tokens" in text and "| still | `lr=1e-09` | 300 | 0.0 % | 0.0 % | – | 1 |" in text
    assert "| Other | – | 30.0 % (15.0) |" in text and "## What was found\n" in text
    for image in ("study_easy.png", "study_easy_mechanisms.png"):
        assert (tmp_path / "docs/images" / image).read_bytes().startswith(b"\x89PNG") and f"images/{image}" in text


def test_report_of_two_seeds_claims_nothing(study_file: Path, tmp_path: Path) -> None:
    study, out = plan.load_study(study_file), tmp_path / "out"
    for seed in (1, 2):
        finished(out / "easy/runs/grpo" / f"seed_{seed}", 0.0, 0.2)
        finished(out / "easy/runs/other" / f"seed_{seed}", 0.0, 0.9)
    text = report.write_report(study, list(study.tasks.values()), out, tmp_path / "docs", {}).read_text()
    tables = text.partition("## Easy")[2]
    assert "too few seeds" in tables and "| higher |" not in tables


def test_missing_notes_are_refused_before_anything_runs(study_file: Path) -> None:
    study_file.write_text(yaml.safe_dump({**STUDY, "notes": "nowhere.md"}))
    with pytest.raises(ValueError, match=r"notes names .*nowhere\.md, which does not exist"):
        plan.load_study(study_file)


def test_tuning_freezes_the_best_rate(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, frozen = plan.load_study(study_file), tmp_path / "frozen.json"
    ends = {"grpo-lr0.0001": 0.3, "grpo-lr0.0003": 0.2, "other-lr0.0001": 0.1}

    def run_all(specs: list[plan.RunSpec], jobs: int) -> list[str]:
        for spec in specs:
            if spec.folder.parent.name in ends:
                finished(spec.folder, 0.0, ends[spec.folder.parent.name])
        return ["other-lr0.0003 FAILED"]

    monkeypatch.setattr(tool, "run_all", run_all)
    starts = {"easy": tmp_path / "start"}
    failures = tool.tune(study, [study.tasks["easy"]], tmp_path / "out", ["grpo", "other"], starts, 1, frozen)
    assert failures == ["other-lr0.0003 FAILED"]
    assert tool.read_frozen(frozen) == {"easy": {"grpo": 1e-4}}, "an arm with a failed run is not frozen"
    assert json.loads((tmp_path / "out/frozen.json").read_text()) == json.loads(frozen.read_text())


def test_the_shipped_study_is_complete() -> None:
    study = plan.load_study(ROOT / "configs" / "study_arms.yaml")
    assert {"grpo", "drbot", "spear-paper", "spear-official"} < set(study.arms)
    assert study.baselines == ("grpo", "drbot", "spear-paper")
    assert all(len(task.learning_rates) >= 3 and task.token_budget > 0 for task in study.tasks.values())
    for task in study.tasks.values():
        for arm in study.arms.values():
            spec = plan.run_spec(task, arm, 1, Path("run"), start=Path("start"))
            assert task.config.is_file() and len(spec.fingerprint) == 12
