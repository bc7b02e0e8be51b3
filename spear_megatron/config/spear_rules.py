"""What became of the keys of the released configurations that are not simply keys of this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spear_megatron.config.spear_script import RunScript

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
Translation = tuple[tuple[str, ...], str]

_ENGINE = f"the engine is chosen by {ROLLOUT}.name and sized by {ROLLOUT}.max_num_seqs"
_BUDGET = f"micro-batches are packed up to {ACTOR}.ppo_max_token_len_per_gpu"
_FSDP = f"the layout is Megatron's: {ACTOR}.megatron.*, states cut by use_distributed_optimizer"
ELSEWHERE: Mapping[str, str] = {
    "data.return_raw_chat": "prompts are always conversations",
    "data.truncation": "data.max_prompt_length refuses longer prompts",
    "data.val_batch_size": "all of data.val_files is evaluated",
    "data.custom_cls.path": "data.train_files are JSONL",
    "data.image_key": "observations are text",
    "data.trust_remote_code": "models and tokenizers never run code of their own",
    "reward_model.reward_manager": "reward.name",
    "custom_reward_function.path": "reward.name may be module:attribute",
    "actor_rollout_ref.model.use_remove_padding": _BUDGET,
    "actor_rollout_ref.model.enable_gradient_checkpointing": f"{ACTOR}.megatron.recompute_granularity",
    f"{ACTOR}.strategy": _FSDP,
    f"{ACTOR}.fsdp_config.": _FSDP,
    f"{ACTOR}.use_dynamic_bsz": _BUDGET,
    f"{ACTOR}.ulysses_sequence_parallel_size": f"{ACTOR}.megatron.tensor_model_parallel_size with sequence_parallel",
    "actor_rollout_ref.ref.": f"the reference has the actor's layout; {_BUDGET}",
    f"{ROLLOUT}.name": _ENGINE,
    f"{ROLLOUT}.mode": _ENGINE,
    f"{ROLLOUT}.tensor_model_parallel_size": _ENGINE,
    f"{ROLLOUT}.gpu_memory_utilization": _ENGINE,
    f"{ROLLOUT}.enable_chunked_prefill": _ENGINE,
    f"{ROLLOUT}.enforce_eager": _ENGINE,
    f"{ROLLOUT}.free_cache_engine": _ENGINE,
    f"{ROLLOUT}.max_num_batched_tokens": _ENGINE,
    f"{ROLLOUT}.calculate_log_probs": "the engine's log-probs are always kept",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": _BUDGET,
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": _BUDGET,
    f"{ROLLOUT}.log_prob_use_dynamic_bsz": _BUDGET,
    f"{ROLLOUT}.multi_turn.enable": "env.name decides how many turns an episode has",
    f"{ROLLOUT}.multi_turn.format": "tool calls are written in the form of the model's chat template",
    f"{ROLLOUT}.multi_turn.tool_config_path": "env.name=code_interpreter brings the tool, env.sandbox its limits",
    "critic.": "there is no critic: none of the estimators of algorithm.adv_estimator needs one",
    "algorithm.kl_ctrl.type": "algorithm.kl_ctrl.kl_coef is constant",
    "trainer.critic_warmup": "there is no critic",
    "trainer.balance_batch": "rows are always balanced, after all group statistics",
    "trainer.project_name": "trainer.default_local_dir names the run",
    "trainer.experiment_name": "trainer.default_local_dir names the run",
    "trainer.n_gpus_per_node": "torchrun --nproc-per-node",
    "trainer.nnodes": "torchrun --nnodes",
    "trainer.log_val_generations": "trainer.num_logged_trajectories",
    "trainer.rollout_data_dir": "trajectories/ in trainer.default_local_dir",
    "trainer.validation_data_dir": "trajectories/ in trainer.default_local_dir",
    "env.resources_per_worker.": "environments run in the data-parallel leaders",
}
"""Keys (or sections, with a final dot) without a counterpart, and what decides instead."""

_BY_HAND: Mapping[str, str] = {
    "trainer.total_epochs": "trainer.total_training_steps counts steps; an epoch has |train_files| / train_batch_size",
    "trainer.val_only": "the command evaluate measures a model",
    "data.filter_overlong_prompts": "data.max_prompt_length refuses longer prompts: remove them from the files",
    "data.prompt_key": "the rows of data.train_files have the keys id, problem, answer",
    f"{ACTOR}.ppo_micro_batch_size": _BUDGET,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": _BUDGET,
    f"{ACTOR}.optim.lr_warmup_steps_ratio": f"{ACTOR}.optim.lr_warmup_steps counts steps",
    f"{ROLLOUT}.gpu_memory_utilization": f"{ROLLOUT}.sglang.launch.args={{mem-fraction-static: 0.6}}",
    f"{ROLLOUT}.tensor_model_parallel_size": f"{ROLLOUT}.sglang.launch.tp_size",
    f"{ROLLOUT}.val_kwargs.do_sample": f"{ROLLOUT}.val_kwargs.temperature=0 is greedy, anything above it samples",
    f"{ROLLOUT}.multi_turn.max_turns": f"{ROLLOUT}.multi_turn.max_assistant_turns",
    f"{ROLLOUT}.multi_turn.tool_config_path": "env.name may be module:attribute, an environment with own tools",
    f"{ROLLOUT}.multi_turn.max_user_turns": f"{ROLLOUT}.multi_turn.max_assistant_turns bounds the model's turns",
    "custom_reward_function.name": "reward.name may be module:attribute, with the module's folder on PYTHONPATH",
    "custom_reward_function.path": "reward.name may be module:attribute, with the module's folder on PYTHONPATH",
}
"""What to tell who sets such a key by hand, where the translation of a script has rules or other words."""

ONLY: Mapping[str, tuple[str, ...]] = {
    "data.truncation": ("error",),
    "reward_model.reward_manager": ("agentConcurrent", "episode"),
    f"{ROLLOUT}.multi_turn.enable": ("True",),
    f"{ROLLOUT}.multi_turn.format": ("hermes",),
    "algorithm.kl_ctrl.type": ("fixed",),
    "trainer.critic_warmup": ("0",),
}
"""The only values of such keys that mean what is done here."""

RENAMED: Mapping[str, tuple[str, str]] = {
    f"{ACTOR}.grad_clip": (f"{ACTOR}.optim.clip_grad", ""),
    "env.rollout.n": (f"{ROLLOUT}.n", "episodes of one task"),
    "env.max_steps": (f"{ROLLOUT}.multi_turn.max_assistant_turns", "one model turn per environment step"),
    "env.seed": ("data.seed", "order of the tasks"),
    "env.history_length": ("env.kwargs.history", ""),
    "env.sokoban.mode": ("env.kwargs.mode", ""),
    "env.webshop.use_small": ("env.kwargs.use_small", ""),
    "env.webshop.human_goals": ("env.kwargs.human_goals", ""),
}


def counterpart(key: str) -> str:
    """What serves here in place of ``key`` of a released configuration, for those who write it by hand; or ''."""
    if key in RENAMED:
        return RENAMED[key][0]
    sections = (reason for start, reason in ELSEWHERE.items() if start.endswith(".") and key.startswith(start))
    return _BY_HAND.get(key) or ELSEWHERE.get(key) or next(sections, "")


def inert_reason(key: str, script: RunScript) -> str:
    """Why the released code ignores ``key`` in this script, or ''."""
    always = {
        f"{ACTOR}.trajectory_score_threshold": "never read: the released threshold is 0",
        f"{ACTOR}.enable_trajectory_posadv": "never read",
        "data.max_length": "not read by reinforcement learning",
        "data.tokenizer": "not read",
        "algorithm.debug": "not read",
    }
    if key in always:
        return always[key]
    if script.agents:
        if key in ("data.train_files", "data.val_files"):
            return "holds empty rows: the environment brings the tasks; name task files in this key"
        if key.startswith("algorithm.filter_") and key.endswith("_responses"):
            replays = script.flag(f"{ACTOR}.enable_trajectory_replay")
            return "" if replays else "the agent fork filters only when it replays"
        return ""
    if key.startswith(f"{ACTOR}.policy_loss.clip_cov_") and key.endswith("_replay"):
        return "the math fork takes clip_cov_ratio, clip_cov_lb and clip_cov_ub for replay too"
    if key == f"{ROLLOUT}.val_kwargs.do_sample":
        return "the agent loop of the math fork always samples"
    if key == "data.filter_overlong_prompts":
        return "the released dataset class does without the filter"
    return ""


def reference_unused(script: RunScript) -> bool:
    """Whether no KL term needs the reference model that ``actor_rollout_ref.ref.*`` sizes."""
    return not (script.flag(f"{ACTOR}.use_kl_loss") or script.flag("algorithm.use_kl_in_reward"))


def translation(key: str, value: str, script: RunScript) -> Translation | None:
    """(overrides, reason) for keys whose value means something else here, None for all others.

    Raises:
        ValueError: a value that has no counterpart; names the remedy.
    """
    rule = _RULES.get(key)
    return None if rule is None else rule(value, script)


def _reward_function(value: str, script: RunScript) -> Translation:
    forms = {
        "default_compute_score_enforce_toolcall_posneg_decay": "per_turn",
        "default_compute_score_enforce_toolcall_posneg_decay_qwen3": "any_if_correct",
    }
    if value not in forms:
        raise ValueError(
            f"custom_reward_function.name={value} is not a released reward: write it as a class or function, name it "
            "as reward.name=module:attribute and take the line out of the script"
        )
    overrides = (
        "reward.name=math",
        "reward.kwargs={correct: 1.0, wrong: -1.0}",
        f"algorithm.toolcall_reward_form={forms[value]}",
        "algorithm.toolcall_reward_max=1.0",
    )
    return overrides, "answers are compared by value, not as strings"


def _environment(value: str, script: RunScript) -> Translation:
    names = {"alfworld/AlfredTWEnv": "alfworld", "Webshop": "webshop", "Sokoban": "sokoban"}
    if value not in names:
        raise ValueError(f"env.env_name={value} is not a released environment: use one of {', '.join(names)}")
    overrides = (f"env.name={names[value]}", "reward.name=environment", "reward.kwargs={scale: 10.0}")
    return overrides, "success earns 10 as released, for an environment that rewards it with 1"


def _dataset_class(value: str, script: RunScript) -> Translation:
    if value != "CustomRLHFDataset":
        raise ValueError(f"data.custom_cls.name={value} is not a released class: convert its rows to data.train_files")
    return ('data.instruction="\\nGive the final answer in \\\\boxed{}."',), "an instruction of the same content"


def _logger(value: str, script: RunScript) -> Translation:
    names = {"console": "console", "tensorboard": "tensorboard", "wandb": "tensorboard"}
    asked = [name.strip(" '\"") for name in value.strip("[]").split(",")]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ValueError(f"trainer.logger={value}: {unknown[0]!r} is not known, use console or tensorboard")
    chosen = dict.fromkeys(names[name] for name in asked)
    return (f"trainer.logger=[{','.join(chosen)}]",), "curves go to TensorBoard" if "wandb" in asked else ""


def _epochs(value: str, script: RunScript) -> Translation:
    if script.agents:
        return (f"trainer.total_training_steps={value}",), "the released data set has one batch per epoch"
    return (), "trainer.total_training_steps counts steps; an epoch has |data.train_files| / data.train_batch_size"


def _mini_batch(value: str, script: RunScript) -> Translation:
    key = f"{ACTOR}.ppo_mini_batch_size"
    if not script.agents:
        return (f"{key}={value}",), ""
    prompts = int(script.number("data.train_batch_size", 1024))
    rows = script.number("env.max_steps", 50) * max(1.0, script.number("env.rollout.n", -1))
    wanted = script.number(key, 256) / rows
    size = next((size for size in range(1, prompts) if prompts % size == 0 and size >= wanted), prompts)
    reason = f"{value} environment steps there, prompts here: those of {size} prompts if episodes are at their longest"
    return (f"{key}={size}",), reason


def _micro_batch(value: str, script: RunScript) -> Translation:
    longest = script.number("data.max_prompt_length", 512) + script.number("data.max_response_length", 512)
    rows = script.number(f"{ACTOR}.ppo_micro_batch_size_per_gpu", 1)
    return (f"{ACTOR}.ppo_max_token_len_per_gpu={int(rows * longest)}",), f"{value} rows of the longest size"


def _buffer_size(value: str, script: RunScript) -> Translation:
    key = f"{ACTOR}.trajectory_buffer_size"
    if not script.agents:
        return (f"{key}={value}",), ""
    steps = script.number("env.max_steps", 50)
    return (f"{key}={max(1, int(script.number(key, 2048) // steps))}",), (
        f"{value} environment steps there, whole trajectories of at most {int(steps)} steps here"
    )


def _do_sample(value: str, script: RunScript) -> Translation:
    if value == "True":
        return (), f"{ROLLOUT}.val_kwargs.temperature"
    return (f"{ROLLOUT}.val_kwargs.temperature=0",), "greedy"


def _user_turns(value: str, script: RunScript) -> Translation:
    key = f"{ROLLOUT}.multi_turn.max_assistant_turns"
    limit = int(script.number(f"{ROLLOUT}.multi_turn.max_user_turns", 1)) + 1
    if key in script.settings and script.number(key, 1) <= limit:
        return (), f"{key} is reached first"
    return (f"{key}={limit}",), "the turn after the last tool message is the last"


def _warmup(value: str, script: RunScript) -> Translation:
    key = f"{ACTOR}.optim.lr_warmup_steps"
    return (f"{key}={max(0, int(script.number(key, 0)))}",), "no warm-up" if value.startswith("-") else ""


_RULES: Mapping[str, Callable[[str, RunScript], Translation]] = {
    "custom_reward_function.name": _reward_function,
    "env.env_name": _environment,
    "data.custom_cls.name": _dataset_class,
    "trainer.logger": _logger,
    "trainer.total_epochs": _epochs,
    "data.filter_overlong_prompts": lambda value, script: ((), "data.max_prompt_length refuses longer prompts"),
    f"{ACTOR}.ppo_mini_batch_size": _mini_batch,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": _micro_batch,
    f"{ACTOR}.trajectory_buffer_size": _buffer_size,
    f"{ACTOR}.optim.lr_warmup_steps": _warmup,
    f"{ROLLOUT}.val_kwargs.do_sample": _do_sample,
    f"{ROLLOUT}.multi_turn.max_user_turns": _user_turns,
}
NOTES: Mapping[str, str] = {
    "data.train_files": "JSONL here (id, problem, answer), a folder of Hugging Face datasets there: convert it",
    "data.val_files": "JSONL here (id, problem, answer), a folder of Hugging Face datasets there: convert it",
    "algorithm.filter_incomplete_responses": "never fires in the released math recipe; here it does",
    f"{ACTOR}.trajectory_tolerate_steps": "at most 10 and counted from the last push there; see replay.staleness",
}
"""Remarks on keys of the same name whose effect differs."""

_COMMON: Mapping[str, str] = {
    "algorithm.norm_adv_by_std_in_grpo": "True",
    "algorithm.use_kl_in_reward": "False",
    "algorithm.max_toolcall_steps": "100",
    f"{ACTOR}.clip_ratio_low": "0.2",
    f"{ACTOR}.clip_ratio_high": "0.2",
    f"{ACTOR}.clip_ratio_c": "3.0",
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.ppo_epochs": "1",
    f"{ACTOR}.ppo_mini_batch_size": "256",
    f"{ACTOR}.use_kl_loss": "False",
    f"{ACTOR}.optim.weight_decay": "0.01",
    f"{ACTOR}.grad_clip": "1.0",
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.policy_loss.clip_cov_ratio": "0.0002",
    f"{ACTOR}.policy_loss.clip_cov_lb": "1.0",
    f"{ACTOR}.policy_loss.clip_cov_ub": "5.0",
    f"{ACTOR}.policy_loss.kl_cov_ratio": "0.0002",
    f"{ACTOR}.policy_loss.kl_cov_ratio_replay": "0.0002",
    f"{ACTOR}.policy_loss.ppo_kl_coef": "0.1",
    f"{ACTOR}.enable_trajectory_replay": "False",
    f"{ACTOR}.trajectory_buffer_size": "2048",
    f"{ACTOR}.baseline_buffer_size": "10240",
    f"{ACTOR}.trajectory_tolerate_steps": "10",
    f"{ACTOR}.replay_loss_coef": "0.001",
    f"{ACTOR}.max_replay_loss_steps": "200",
    f"{ROLLOUT}.temperature": "1.0",
    f"{ROLLOUT}.rollout_filter_ratio": "1.0",
    f"{ROLLOUT}.val_kwargs.n": "1",
    f"{ROLLOUT}.val_kwargs.temperature": "0",
    f"{ROLLOUT}.val_kwargs.top_p": "1.0",
}
_FILTERS = [f"algorithm.filter_{name}_responses" for name in ("overlong", "incomplete", "repetitive", "unreadable")]
_MATH = {
    f"{ACTOR}.entropy_coeff": "0",
    f"{ACTOR}.weight_decay_trajectory_replay": "-1",
    "algorithm.use_toolcall_reward": "cosine",
    f"{ROLLOUT}.multi_turn.max_tool_response_length": "16384",
    **dict.fromkeys(_FILTERS, "True"),
}
_AGENTS = {
    f"{ACTOR}.entropy_coeff": "0.001",
    f"{ACTOR}.weight_decay_trajectory_replay": "0.1",
    f"{ACTOR}.use_invalid_action_penalty": "True",
    f"{ACTOR}.invalid_action_penalty_coef": "0.1",
    f"{ACTOR}.policy_loss.clip_cov_ratio_replay": "0.0002",
    f"{ACTOR}.policy_loss.clip_cov_lb_replay": "1.0",
    f"{ACTOR}.policy_loss.clip_cov_ub_replay": "5.0",
    "algorithm.use_toolcall_reward": "none",
    "algorithm.gamma": "1.0",
    "env.history_length": "2",
    **dict.fromkeys(_FILTERS, "False"),
}


def released_defaults(script: RunScript) -> dict[str, str]:
    """Values that the released configuration of the script's fork gives to keys that the script leaves out."""
    defaults = {**_COMMON, **(_AGENTS if script.agents else _MATH)}
    return {key: value for key, value in defaults.items() if key not in script.settings}
