"""The presets load, differ where docs/semantics.md says, and hold what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from spear_megatron.config.describe import flatten
from spear_megatron.config.loader import load, valid_keys
from spear_megatron.config.schema import Config

REPOSITORY = Path(__file__).parents[2]
PRESETS = REPOSITORY / "configs" / "presets"
NAMES = ("grpo", "drbot", "spear-paper", "spear-official")
FILTERS = [f"filter_{name}_responses" for name in ("overlong", "incomplete", "repetitive", "unreadable")]
PAGE = (REPOSITORY / "docs" / "semantics.md").read_text(encoding="utf-8")


def preset(name: str, *overrides: str) -> Config:
    return load(Config, PRESETS / f"{name}.yaml", overrides)


def differences(one: str, other: str) -> dict[str, tuple[object, object]]:
    a, b = flatten(preset(one)), flatten(preset(other))
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Cells of the table below a heading, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else f"{value}"


def test_the_presets_of_the_page_are_there() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(NAMES)


def test_paper_and_official_differ_exactly_as_documented() -> None:
    table = {cells[3].strip("`"): cells for cells in rows("Differences")}
    assert len(table) == len(rows("Differences"))
    found = differences("spear-paper", "spear-official")
    assert set(table) == set(found)
    for key, values in found.items():
        if key.endswith(".batch_size"):
            assert values == (None, 2048) and table[key][2] == "N_D"
            continue
        for value, cell in zip(values, table[key][1:3]):
            stated = cell.split(":")[0].split(",")[0].split(" ")[0].strip("`")
            same = float(stated) == value if isinstance(value, float) else stated == shown(value)
            assert same, (key, value, cell)


def test_official_sets_nothing_but_the_differences() -> None:
    tree = yaml.safe_load((PRESETS / "spear-official.yaml").read_text())
    assert tree.pop("base") == "spear-paper.yaml"

    def leaves(node: dict[str, object], prefix: str) -> set[str]:
        found = set()
        for name, value in node.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
        return found

    documented = {cells[3].strip("`") for cells in rows("Differences")}
    loss = "actor_rollout_ref.actor.policy_loss"
    assert leaves(tree, "") == documented | {f"{loss}.clip_cov_lb_replay"}


@pytest.mark.parametrize("size", [100, 4096])
def test_official_replays_as_many_as_the_buffer_is_large(size: int) -> None:
    actor = preset("spear-official", f"actor_rollout_ref.actor.trajectory_buffer_size={size}").actor_rollout_ref.actor
    assert actor.replay.batch_size == size


def test_official_reads_no_replay_bounds_of_its_own() -> None:
    loss = "actor_rollout_ref.actor.policy_loss"
    given = preset("spear-official", f"{loss}.clip_cov_ratio=0.01", f"{loss}.clip_cov_lb=2", f"{loss}.clip_cov_ub=9")
    policy_loss = given.actor_rollout_ref.actor.policy_loss
    assert policy_loss.clip_cov_ratio_replay == 0.01
    assert (policy_loss.clip_cov_lb_replay, policy_loss.clip_cov_ub_replay) == (2.0, 9.0)


def test_under_paper_only_successes_can_be_imitated() -> None:
    actor = preset("spear-paper").actor_rollout_ref.actor
    assert actor.enable_trajectory_replay and actor.replay.require == "success"
    assert actor.trajectory_score_threshold == 0.0  # and of them those that are better than their group
    assert Config().actor_rollout_ref.actor.replay.require == "success"


def test_defaults_of_the_differences_follow_the_paper() -> None:
    defaults, paper = flatten(Config()), flatten(preset("spear-paper"))
    assert [key for key in differences("spear-paper", "spear-official") if defaults[key] != paper[key]] == []


def test_values_that_the_method_fixes() -> None:
    config = preset("spear-paper")
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    assert actor.clip_range == (0.2, 0.28) and actor.clip_ratio_c == 10.0
    assert (actor.loss_agg_mode, actor.replay.update) == ("seq-mean-token-sum-norm", "joint")
    assert not algorithm.norm_adv_by_std_in_grpo and algorithm.use_toolcall_reward == "cosine"
    assert (algorithm.max_toolcall_steps, actor.max_replay_loss_steps) == (200, 300)
    assert all(getattr(algorithm, name) for name in FILTERS)
    assert config.actor_rollout_ref.rollout.rollout_filter_ratio == 0.75
    assert actor.policy_loss.mode(replayed=False) == actor.policy_loss.mode(replayed=True) == "clip_cov"


def test_the_ladder_from_grpo_to_spear() -> None:
    tricks = {key.rpartition(".")[2] for key in differences("grpo", "drbot")}
    others = {"clip_ratio_high", "loss_agg_mode", "rollout_filter_ratio", "norm_adv_by_std_in_grpo"}
    assert tricks == {*FILTERS, *others}
    added = set(differences("drbot", "spear-paper"))
    assert {"algorithm.use_toolcall_reward", "actor_rollout_ref.actor.enable_trajectory_replay"} <= added
    assert not any(key.startswith(("data.", "trainer.", "env.", "reward.", "sft.")) for key in added)
    plain = preset("grpo")
    assert not plain.actor_rollout_ref.actor.enable_trajectory_replay and plain.algorithm.use_toolcall_reward == "none"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_start_from_a_preset(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {PRESETS / name}.yaml\ndata: {{train_batch_size: 8}}\nalgorithm: {{gamma: 0.5}}\n")
    config = load(Config, path)
    assert (config.data.train_batch_size, config.algorithm.gamma) == (8, 0.5)
    assert config.algorithm.norm_adv_by_std_in_grpo == (name == "grpo")


def test_every_key_of_the_page_exists() -> None:
    keys = set(valid_keys(Config))
    pattern = r"`((?:actor_rollout_ref|algorithm|data|trainer|env|reward|sft)\.[a-z0-9_.]+)(?:=([^`{]*))?"
    named = re.findall(pattern, PAGE)
    assert len({key for key, _ in named}) > 30
    assert {key for key, _ in named} - keys == set()


def test_values_of_the_page_are_values_of_the_keys() -> None:
    for cells in rows("Choices that the paper leaves open"):
        for key, value in re.findall(r"`([a-z_.]+)=([^`]+)`", cells[1]):
            stated = flatten(load(Config, None, [f"{key}={value}"]))[key]
            assert flatten(preset("spear-paper"))[key] == stated, key


def test_the_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"tests/[\w/]+\.py", PAGE))
    assert len(named) > 4 and [name for name in named if not (REPOSITORY / name).is_file()] == []
