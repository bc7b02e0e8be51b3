"""Every shipped configuration passes a dry run in its own layout; recipes hold what the released scripts say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.__main__ import main
from spear_megatron.config.describe import flatten
from spear_megatron.config.loader import load, valid_keys
from spear_megatron.config.schema import Config
from spear_megatron.config.spear_script import parse_run_script
from spear_megatron.config.spear_translate import overrides_of, translate

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.stem: path for path in sorted((CONFIGS / "recipes").glob("*.yaml"))}
# Runs of their own beside the recipes; the other files there hold parts of them, or arms of the study.
OTHERS = (
    "quickstart", "quickstart_drbot", "quickstart_grpo", "quickstart_spear_official", "grid_world", "study_grid_world",
    "study_tool_math",
)  # fmt: skip
GPUS_PER_NODE = 8
PAGE = (CONFIGS.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
ACTOR, ROLLOUT, LOSS = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.policy_loss"

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5_32b": _COMMON | _QWEN2 | {
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 27648, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "qwen3_32b": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 25600, "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "qwen2.5_7b": _COMMON | _QWEN2 | {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "qwen2.5_1.5b": _COMMON | _QWEN2 | {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Shapes as the models' own config.json publish them."""


def model_of(name: str) -> str:
    """The model that a recipe trains, the longest name that it starts with."""
    return max((model for model in SHAPES if name.startswith(f"{model}_")), key=len)


def dry_run(
    command: str, path: Path, shape: dict[str, Any], world_size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.json").write_text(json.dumps(shape))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main([command, "--config", str(path), "--dry-run", f"actor_rollout_ref.model.path={folder}"]) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_a_dry_run_on_its_gpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, supervised = model_of(name), name.endswith("_sft")
    world_size = 8 if "32b" not in name else 16 if supervised else 128
    dry_run("sft" if supervised else "train", RECIPES[name], SHAPES[model], world_size, tmp_path, monkeypatch)
    shown = capsys.readouterr()
    layouts = {"qwen2.5_1.5b": (1, 1, 8), "qwen2.5_7b": (2, 1, 4)}
    tensor, pipeline, data = layouts.get(model, (8, 2, world_size // 16))
    assert f"{world_size} ranks = tensor {tensor} x pipeline {pipeline} x data {data}" in shown.out
    assert "warning" not in shown.err
    kind = ["--stage", "sft"] if supervised else ["--engine-tp", "4" if world_size == 128 else "1"]
    sizes = ["--nodes", str(world_size // GPUS_PER_NODE), "--top", "0", *kind]
    assert main(["plan", "--config", str(RECIPES[name]), *sizes, f"actor_rollout_ref.model.path={tmp_path}"]) == 0
    assert ("publish" in capsys.readouterr().out) == (not supervised)


def test_the_example_of_the_planner_passes_a_dry_run_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / "qwen3_32b.yaml"
    dry_run("train", path, SHAPES["qwen3_32b"], 128, tmp_path, monkeypatch)
    told = capsys.readouterr().out  # no time of what cannot run here
    assert "does not fit on this machine" in told and "plan --config" in told and "estimated step" not in told
    sizes = ["--nodes", "16", "--top", "0"]
    assert main(["plan", "--config", str(path), *sizes, f"actor_rollout_ref.model.path={tmp_path}"]) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_runs_pass_a_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["qwen2.5_1.5b"] | {"num_hidden_layers": 2}
    dry_run("train", CONFIGS / f"{name}.yaml", shape, 1, tmp_path, monkeypatch)


def test_runs_start_from_the_cold_start_and_keep_their_own_folder() -> None:
    folders = set()
    for name, path in RECIPES.items():
        config = load(Config, path)
        cold_start = f"outputs/recipes/{model_of(name)}_sft"
        if name.endswith("_sft"):
            assert config.sft.default_local_dir == cold_start
            continue
        assert config.actor_rollout_ref.model.path == f"{cold_start}/hf"
        assert config.trainer.default_local_dir == f"outputs/recipes/{name}"
        folders.add(config.trainer.default_local_dir)
    assert len(folders) == len(RECIPES) - len(SHAPES)


def test_every_model_has_the_whole_ladder() -> None:
    methods = ("grpo", "drbot", "spear")
    wanted = {f"{model}_sft" for model in SHAPES}
    for model in SHAPES:
        for kind in ("_official", "_paper") if "32b" in model else ("",):
            wanted |= {f"{model}_{method}{kind}" for method in methods}
    assert set(RECIPES) == wanted


# What the released script of Qwen3-32B with SPEAR passes on that has a counterpart here, without paths and engine.
RELEASED = {
    "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": "False", "data.train_batch_size": "128",
    "data.max_prompt_length": "2048", "data.max_response_length": "16384",
    "custom_reward_function.name": "default_compute_score_enforce_toolcall_posneg_decay_qwen3",
    f"{ACTOR}.use_kl_loss": "False", f"{ACTOR}.clip_ratio_low": "0.2", f"{ACTOR}.clip_ratio_high": "0.28",
    f"{LOSS}.loss_mode": "clip_cov", f"{LOSS}.clip_cov_ratio_replay": "0.02", f"{LOSS}.clip_cov_lb_replay": "1",
    f"{LOSS}.clip_cov_ub_replay": "40.0", f"{LOSS}.kl_cov_ratio_replay": "0.02", f"{ACTOR}.clip_ratio_c": "10.0",
    f"{ACTOR}.optim.lr": "1e-6", f"{ACTOR}.ppo_mini_batch_size": "64",
    f"{ROLLOUT}.multi_turn.max_user_turns": "8", f"{ROLLOUT}.multi_turn.max_assistant_turns": "8",
    f"{ROLLOUT}.n": "16", f"{ROLLOUT}.val_kwargs.top_p": "0.6",
    f"{ROLLOUT}.val_kwargs.temperature": "1.0", f"{ROLLOUT}.val_kwargs.n": "32",
    f"{ROLLOUT}.rollout_filter_type": "std", f"{ROLLOUT}.rollout_filter_ratio": "0.75",
    f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm", f"{ACTOR}.enable_trajectory_replay": "True",
    f"{ACTOR}.replay_loss_coef": "1", f"{ACTOR}.max_replay_loss_steps": "300",
    f"{ACTOR}.weight_decay_trajectory_replay": "-1", f"{ACTOR}.trajectory_buffer_size": "2048",
    f"{ACTOR}.trajectory_score_threshold": "1", f"{ACTOR}.trajectory_tolerate_steps": "5",
    f"{ACTOR}.baseline_buffer_size": "10240", "algorithm.norm_adv_by_std_in_grpo": "False",
    "algorithm.filter_overlong_responses": "True", "algorithm.filter_incomplete_responses": "True",
    "algorithm.filter_repetitive_responses": "True", "algorithm.filter_unreadable_responses": "True",
    "algorithm.use_toolcall_reward": "cosine", "algorithm.max_toolcall_steps": "200",
    "trainer.val_before_train": "True", "trainer.save_freq": "5", "trainer.test_freq": "5",
}  # fmt: skip
WITHOUT_REPLAY = {
    f"{LOSS}.loss_mode": "vanilla", f"{ACTOR}.enable_trajectory_replay": "False",
    "algorithm.use_toolcall_reward": "none",
}  # fmt: skip
SCRIPTS: dict[str, dict[str, str]] = {
    "spear": {},
    "drbot": WITHOUT_REPLAY,
    "grpo": WITHOUT_REPLAY | {
        f"{ACTOR}.clip_ratio_high": "0.2", f"{ROLLOUT}.rollout_filter_ratio": "1.0",
        f"{ACTOR}.loss_agg_mode": "token-mean", "algorithm.norm_adv_by_std_in_grpo": "True",
        **{f"algorithm.filter_{name}_responses": "False" for name in ("overlong", "repetitive", "unreadable")},
    },
}  # fmt: skip


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("model", ["qwen2.5_32b", "qwen3_32b"])
def test_official_recipes_are_the_scripts_as_translated(model: str, method: str) -> None:
    settings = RELEASED | SCRIPTS[method]
    if model == "qwen2.5_32b":
        settings["custom_reward_function.name"] = settings["custom_reward_function.name"].removesuffix("_qwen3")
    text = "python3 -m verl.trainer.main_ppo " + " ".join(f"{key}={value}" for key, value in settings.items())
    overrides = overrides_of(translate(parse_run_script(text, {})))
    recipe = load(Config, RECIPES[f"{model}_{method}_official"])
    scripted = load(Config, RECIPES[f"{model}_{method}_official"], overrides)
    ours, theirs = flatten(recipe), flatten(scripted)
    differing = {key for key in ours if ours[key] != theirs[key]}
    allowed = {"algorithm.filter_incomplete_responses"}  # true in the scripts, and inert in their code
    if method != "spear":  # no term reads them
        unread = ("trajectory_tolerate_steps", "max_replay_loss_steps", "policy_loss.kl_cov_ratio_replay")
        allowed |= {f"{ACTOR}.{name}" for name in unread}
        allowed |= {"algorithm.max_toolcall_steps", "algorithm.toolcall_reward_form"}
    assert differing <= allowed, differing
    assert len(overrides) > 40


def test_inert_values_of_the_scripts_are_not_taken_over() -> None:
    for model in ("qwen2.5_32b", "qwen3_32b"):
        config = load(Config, RECIPES[f"{model}_spear_official"])
        actor, loss = config.actor_rollout_ref.actor, config.actor_rollout_ref.actor.policy_loss
        assert (loss.clip_cov_ratio_replay, loss.clip_cov_lb_replay, loss.clip_cov_ub_replay) == (0.0002, 1.0, 5.0)
        assert actor.trajectory_score_threshold == 0.0 and not config.algorithm.filter_incomplete_responses
        assert (actor.replay.update, actor.replay.after_use) == ("separate", "clear")


def test_paper_recipes_take_the_choices_of_the_preset() -> None:
    method = flatten(load(Config, CONFIGS / "presets" / "spear-paper.yaml"))
    sizes = {f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.ppo_mini_batch_size"}
    for model in ("qwen2.5_32b", "qwen3_32b"):
        ours = flatten(load(Config, RECIPES[f"{model}_spear_paper"]))
        keys = [key for key in method if key.startswith((ACTOR, "algorithm.")) and ".megatron." not in key]
        assert [key for key in keys if ours[key] != method[key] and key not in sizes] == []


def test_the_engine_is_set_in_one_place_and_fills_the_machine() -> None:
    files = (CONFIGS / "recipes").rglob("*.yaml")
    engines = [path.name for path in files if "rollout:\n    name:" in path.read_text()]
    assert engines == ["engine.yaml"]
    for name, path in RECIPES.items():
        if name.endswith("_sft"):
            continue
        rollout = load(Config, path).actor_rollout_ref.rollout
        assert (rollout.name, rollout.sglang.colocated) == ("sglang", True)
        assert rollout.sglang.launch.num_servers * rollout.sglang.launch.tp_size == GPUS_PER_NODE
        heads = SHAPES[model_of(name)]["num_key_value_heads"]
        assert heads % rollout.sglang.launch.tp_size == 0


def test_the_page_lists_every_recipe_and_only_keys_that_exist() -> None:
    listed = set(re.findall(r"`((?:qwen2\.5|qwen3)_[\w.]+?)`", PAGE))
    assert listed == set(RECIPES)
    named = set(re.findall(r"`((?:actor_rollout_ref|algorithm|data|trainer|env|reward|sft)\.[a-z0-9_.]+)", PAGE))
    theirs = {"data.max_length", "data.filter_overlong_prompts"}  # of the released scripts, named as such
    assert {key.rstrip(".") for key in named} - set(valid_keys(Config)) == theirs
