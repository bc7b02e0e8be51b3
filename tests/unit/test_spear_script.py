"""Run scripts of both forks become overrides: every key is accounted for, values mean the same, order is kept."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spear_megatron.cli.common import load_config
from spear_megatron.config.checks_replay import check_trigger
from spear_megatron.config import spear_rules
from spear_megatron.config.loader import load, valid_keys
from spear_megatron.config.schema import Config
from spear_megatron.config.spear_rules import counterpart
from spear_megatron.config.spear_script import KeyRow, RunScript, parse_run_script
from spear_megatron.config.spear_translate import describe_rows, overrides_of, translate

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PRESETS = Path(__file__).parents[2] / "configs" / "presets"
MATH = r"""
set -x
export ENGINE_FLAG=1
prompt=1024
response=3072
out_dir=${1:-$PWD}/results
mkdir -p $out_dir
train="['$out_dir/train.jsonl']"
threshold=1
budget=$(( (prompt + response) * 2 ))

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$train" \
    data.max_prompt_length=$prompt \
    data.max_response_length=${response} \
    data.max_length=$response \
    data.truncation='error' \
    data.train_batch_size=64 \
    data.custom_cls.name=CustomRLHFDataset \
    custom_reward_function.path=$out_dir/reward.py \
    custom_reward_function.name=default_compute_score_enforce_toolcall_posneg_decay_qwen3 \
    actor_rollout_ref.model.path=model \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$budget \
    actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov \
    actor_rollout_ref.actor.policy_loss.clip_cov_ratio_replay=0.3 \
    actor_rollout_ref.actor.enable_trajectory_replay=True \
    actor_rollout_ref.actor.trajectory_buffer_size=128 \
    actor_rollout_ref.actor.trajectory_score_threshold=$threshold \
    actor_rollout_ref.actor.fsdp_config.param_offload=True \
    +actor_rollout_ref.actor.clip_ratio_c=10.0 \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=$(( budget * 4 )) \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.multi_turn.format=hermes \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=8 \
    actor_rollout_ref.rollout.multi_turn.max_user_turns=8 \
    actor_rollout_ref.rollout.val_kwargs.n=4 \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    trainer.logger=['console','wandb'] \
    trainer.total_epochs=1 \
    trainer.default_local_dir=$out_dir $@
# $@
"""
AGENTS = r"""
ENGINE=${1:-vllm}
steps=20
group=4
mini=200
warm=77
max_replay_loss_ascending_steps=100
python3 -m examples.data_preprocess.prepare --mode 'text'
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=gigpo \
    algorithm.gamma=0.95 \
    algorithm.filter_overlong_responses=True \
    data.train_files=$HOME/text/train.parquet \
    data.train_batch_size=16 \
    data.max_prompt_length=2048 \
    data.max_response_length=512 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.actor.ppo_mini_batch_size=${mini} \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.trajectory_buffer_size=2048 \
    actor_rollout_ref.actor.trajectory_score_threshold=1 \
    actor_rollout_ref.actor.policy_loss.clip_cov_ratio_replay=0.3 \
    actor_rollout_ref.rollout.name=$ENGINE \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.4 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    env.env_name=Webshop \
    env.seed=3 \
    env.max_steps=$steps \
    env.rollout.n=$group \
    env.resources_per_worker.num_cpus=0.1 \
    trainer.critic_warmup=0 \
    trainer.total_epochs=150
"""
OUTSIDE = {"PWD": "/p", "HOME": "/h"}


def table(text: str) -> tuple[RunScript, dict[str, KeyRow]]:
    script = parse_run_script(text, OUTSIDE)
    return script, {row.key: row for row in translate(script)}


def config_of(text: str, *more: str, preset: str | None = None) -> Config:
    path = None if preset is None else PRESETS / f"{preset}.yaml"
    return load(Config, path, [*overrides_of(translate(parse_run_script(text, OUTSIDE))), *more])


@pytest.mark.parametrize("text", [MATH, AGENTS])
def test_every_key_has_one_row_and_a_place_in_the_text(text: str) -> None:
    script, rows = table(text)
    assert set(script.settings) | {f"${name}" for name in (*script.unused, *script.exported)} <= set(rows)
    shown = describe_rows(list(rows.values()), "run.sh", script)
    assert all(f"{key}={value}" in shown for key, value in script.settings.items())
    kinds = [row.kind for row in rows.values() if row.key in script.settings]
    assert len(kinds) == len(script.settings) and "default" not in kinds
    assert all(row.reason for row in rows.values() if row.kind in ("inert", "elsewhere"))
    assert "spear-paper" in shown and "spear-official" in shown


def test_a_math_script() -> None:
    script, rows = table(MATH)
    kinds = {key: row.kind for key, row in rows.items()}
    assert kinds[f"{ACTOR}.trajectory_score_threshold"] == kinds["data.max_length"] == "inert"
    assert kinds[f"{ACTOR}.policy_loss.clip_cov_ratio_replay"] == "inert"
    assert kinds["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"] == "inert"
    assert kinds["$ENGINE_FLAG"] == kinds[f"{ROLLOUT}.name"] == kinds["trainer.total_epochs"] == "elsewhere"
    assert kinds[f"{ACTOR}.clip_ratio_c"] == "same" and kinds[f"{ACTOR}.entropy_coeff"] == "default"
    assert script.others == ("set -x", "mkdir -p /p/results")
    config = config_of(MATH)
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    assert config.data.train_files == ("/p/results/train.jsonl",) and config.data.instruction.startswith("\n")
    assert (config.reward.name, config.reward.kwargs) == ("math", {"correct": 1.0, "wrong": -1.0})
    assert (algorithm.toolcall_reward_form, algorithm.use_toolcall_reward) == ("any_if_correct", "cosine")
    assert algorithm.filter_overlong_responses  # on unless a math script says otherwise
    assert (actor.ppo_max_token_len_per_gpu, actor.clip_ratio_c) == (8192, 10.0)
    assert actor.policy_loss.mode(replayed=True) == "clip_cov"
    assert (actor.trajectory_buffer_size, actor.trajectory_score_threshold) == (128, 0.0)
    assert (actor.replay_loss_coef, actor.max_replay_loss_steps) == (0.001, 200)
    assert config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns == 8
    assert config.trainer.logger == ("console", "tensorboard")


def test_an_agent_script() -> None:
    _, rows = table(AGENTS)
    config = config_of(AGENTS)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.env.name, config.env.kwargs, config.reward.name) == ("webshop", {"history": 2}, "environment")
    assert (rollout.n, rollout.multi_turn.max_assistant_turns, config.data.seed) == (4, 20, 3)
    assert config.trainer.total_training_steps == 150 and config.data.train_files is None
    assert (actor.ppo_mini_batch_size, actor.ppo_max_token_len_per_gpu) == (4, 4 * 2560)  # 200 / (4 * 20) = 2.5
    assert actor.trajectory_buffer_size == 2048 // 20
    assert (actor.entropy_coeff, actor.use_invalid_action_penalty) == (0.001, True)
    assert actor.policy_loss.clip_cov_ratio_replay == 0.3
    assert rows["algorithm.filter_overlong_responses"].kind == rows["$warm"].kind == "inert"
    reason = rows["$max_replay_loss_ascending_steps"].reason
    assert "max_replay_loss_steps" in reason and actor.max_replay_loss_steps == 200


def test_filters_of_agents_act_with_replay() -> None:
    text = AGENTS.rstrip() + f" {ACTOR}.enable_trajectory_replay=True"
    assert not config_of(AGENTS).algorithm.filter_overlong_responses
    assert config_of(text).algorithm.filter_overlong_responses


def test_the_reference_is_sized_where_it_is_used() -> None:
    text = MATH.replace("trainer.total_epochs=1", f"trainer.total_epochs=1 {ACTOR}.use_kl_loss=True")
    assert table(text)[1]["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"].kind == "elsewhere"


def test_an_inert_key_leaves_the_preset_in_charge() -> None:
    for preset, ratio in (("spear-paper", 0.02), ("spear-official", 0.0002)):
        actor = config_of(MATH, preset=preset).actor_rollout_ref.actor
        assert actor.policy_loss.clip_cov_ratio_replay == ratio and actor.trajectory_buffer_size == 128


def test_max_user_turns_bind_where_they_are_reached_first() -> None:
    text = MATH.replace("max_user_turns=8", "max_user_turns=3")
    assert config_of(text).actor_rollout_ref.rollout.multi_turn.max_assistant_turns == 4


def test_of_a_repeated_key_the_last_counts_and_the_other_is_told() -> None:
    text = MATH.replace("data.train_batch_size=64", "data.train_batch_size=64 data.train_batch_size=96")
    script = parse_run_script(text, OUTSIDE)
    assert config_of(text).data.train_batch_size == 96
    repeated = [row for row in translate(script) if row.reason.startswith("given again")]
    assert [(row.key, row.value, row.overrides) for row in repeated] == [("data.train_batch_size", "64", ())]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("data.max_length", "data.max_lenght", ["data.max_lenght", "did you mean"]),
        ("verl.trainer.main_ppo", "verl.trainer.fsdp_sft_trainer", ["no command", "main_ppo"]),
        ("truncation='error'", "truncation=left", ["data.truncation=left", "must have error"]),
        ("format=hermes", "format=llama3", ["format=llama3", "hermes"]),
        ("posneg_decay_qwen3", "other", ["custom_reward_function.name", "module:attribute"]),
        ("name=CustomRLHFDataset", "name=Mine", ["data.custom_cls.name=Mine"]),
        ("'wandb'", "'mlflow'", ["trainer.logger", "mlflow"]),
        ("trainer.total_epochs=1", "--config-name=other", ["--config-name=other", "key=value"]),
        ("trainer.total_epochs=1", "~data", ["'~data'"]),
        ("$(( budget * 4 ))", "$(nproc)", ["command substitution"]),
        ("max_user_turns=8", "max_user_turns=many", ["max_user_turns", "'many'"]),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(old: str, new: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        translate(parse_run_script(MATH.replace(old, new), OUTSIDE))
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


def test_order_is_file_then_script_then_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.sh").write_text(MATH)
    (tmp_path / "run.yaml").write_text("data: {train_batch_size: 7}\ntrainer: {seed: 5}\n")
    arguments = argparse.Namespace(
        config=str(tmp_path / "run.yaml"), from_spear_script=str(tmp_path / "run.sh"), overrides=[f"{ROLLOUT}.n=3"]
    )
    config = load_config(arguments)
    assert (config.trainer.seed, config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (5, 64, 3)
    shown = capsys.readouterr()
    assert shown.out == "" and f"{ROLLOUT}.n=8" in shown.err and "inert" in shown.err


def test_a_dry_run_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spear_megatron.__main__ import main
    from spear_megatron.data.tiny import make_tiny_model

    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
    make_tiny_model(tmp_path / "model", seed=0, **sizes)
    text = MATH.replace("prompt=1024", "prompt=128").replace("response=3072", "response=256")
    (tmp_path / "run.sh").write_text(text.replace("model.path=model", f"model.path={tmp_path}/model"))
    command = ["train", "--from-spear-script", str(tmp_path / "run.sh"), "--dry-run"]
    assert main([*command, "trainer.test_freq=-1", "trainer.val_before_train=false"]) == 0
    shown = capsys.readouterr()
    assert "adv_estimator: grpo" in shown.out and "keys of verl.trainer.main_ppo" in shown.err
    (tmp_path / "run.sh").write_text("if true; then")
    assert main(command) == 2 and "run.sh: line 1: 'if' needs a shell" in capsys.readouterr().err
    assert main(["train", "--from-spear-script", "none.sh"]) == 2


def released_scripts() -> dict[str, str]:
    """Name and text of the run scripts of the repository that SPEAR_REPO names, a checkout or a bare git directory."""
    folder = os.environ.get("SPEAR_REPO")
    if not folder:
        pytest.skip("SPEAR_REPO does not name a copy of the SPEAR repository")
    parts = ("verl/recipe/spear", "verl-agent/examples")
    if (Path(folder) / parts[0]).is_dir():
        found = {str(path): path.read_text() for part in parts for path in (Path(folder) / part).rglob("run_*.sh")}
    else:
        def git(*words: str) -> str:
            done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=60)
            return done.stdout

        names = git("ls-tree", "-r", "--name-only", "HEAD", *parts).splitlines()
        chosen = [name for name in names if Path(name).name.startswith("run_") and name.endswith(".sh")]
        found = {name: git("show", f"HEAD:{name}") for name in chosen}
    return {name: text for name, text in found.items() if "verl.trainer.main_ppo" in text}


def test_released_scripts(tmp_path: Path) -> None:
    scripts = released_scripts()
    assert len([name for name in scripts if "spear.sh" in name or "drbot.sh" in name]) >= 12
    for name, text in scripts.items():
        script = parse_run_script(text, OUTSIDE)
        assert list(script.settings.items()) == settings_by_bash(text, tmp_path), name
        rows = translate(script)
        shown = describe_rows(rows, name, script)
        assert all(f"{key}={value}" in shown for key, value in script.settings.items()), name
        estimator = ["algorithm.adv_estimator=grpo"] if script.settings["algorithm.adv_estimator"] == "gae" else []
        for preset in ("grpo", "drbot", "spear-paper", "spear-official"):
            check_trigger(load(Config, PRESETS / f"{preset}.yaml", [*overrides_of(rows), *estimator]))
        print(f"{name}: {len(script.settings)} keys, {len(rows)} rows")


def settings_by_bash(text: str, folder: Path) -> list[tuple[str, str]]:
    """What bash would pass to the trainer; every program is replaced by a function that does nothing."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash to compare with")
    stubs = (
        "mkdir() { :; }\n"
        "python3() { [ \"$2\" = verl.trainer.main_ppo ] || return 0; shift 2; printf '%s\\0' \"$@\" >&3; }\n"
    )
    done = subprocess.run(
        [bash, "--noprofile", "--norc", "-c", f"exec 3>&1 >/dev/null 2>/dev/null\nPWD=/p\n{stubs}{text}"],
        capture_output=True, text=True, timeout=30, cwd=folder, env={"HOME": "/h", "PATH": "/nowhere"}, check=False,
    )  # fmt: skip
    pairs = [word.partition("=") for word in done.stdout.split("\0")[:-1]]
    return [(key, value) for key, _, value in pairs]


def test_what_serves_in_place_of_a_key_exists() -> None:
    named = re.compile(r"(?:data|actor_rollout_ref|algorithm|env|reward|trainer)\.[a-z_.]*[a-z_]")
    known = set(valid_keys(Config))
    for key, text in spear_rules._BY_HAND.items():
        assert key not in known and counterpart(key) == text
        assert all(name in known or name.startswith("env.kwargs.") for name in named.findall(text)), text
    assert counterpart("trainer.seed") == "" == counterpart("critical")
