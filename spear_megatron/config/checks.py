"""Checks that need more than one key, done before anything starts. Each refusal names the keys and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_GROUP_ESTIMATORS = ("grpo", "rloo", "gigpo")


def check_config(config: Config, shape: ModelShape, world_size: int) -> None:
    """Refuse a configuration that cannot run with this model on this many ranks.

    Raises:
        ValueError: the first problem, naming its keys and the remedy.
    """
    from spear_megatron.config.checks_replay import check_trigger
    from spear_megatron.model.acceleration import check_acceleration
    from spear_megatron.model.transformer_config import check_layout

    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    megatron = actor.megatron
    sizes = (megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size)
    check_world_size(world_size, *sizes, megatron.context_parallel_size)
    check_context(megatron.context_parallel_size, actor.policy_loss.cov_scope, actor.policy_loss.loss_mode)
    check_layout(shape, megatron)
    check_acceleration(shape, megatron, actor.kernels, config.actor_rollout_ref.model.dtype)
    check_batch(data.train_batch_size, actor.ppo_mini_batch_size)
    if rollout.name == "sglang":
        check_in_flight(rollout.sglang.max_in_flight, rollout.max_num_seqs, world_size // megatron.model_parallel_size)
    check_lengths(
        data.max_prompt_length, data.max_response_length, rollout.max_model_len, shape.max_position_embeddings
    )
    multiple = megatron.token_multiple
    longest = data.max_prompt_length + data.max_response_length
    check_token_budget(actor.ppo_max_token_len_per_gpu, longest, multiple)
    check_kl("use_kl_loss", actor.use_kl_loss, actor.kl_loss_coef)
    check_kl("use_kl_in_reward", config.algorithm.use_kl_in_reward, config.algorithm.kl_ctrl.kl_coef)
    algorithm = config.algorithm
    check_group_size(algorithm.adv_estimator, rollout.n)
    check_group_filters(algorithm.filter_groups.enable, rollout.rollout_filter_ratio, rollout.n)
    check_old_log_prob(actor.old_log_prob, algorithm.rollout_correction.mode, algorithm.use_kl_in_reward)
    check_mismatch_mask(rollout.mismatch.mask, actor.old_log_prob)
    check_mismatch_async(config.trainer.async_, rollout.mismatch.mask, rollout.mismatch.stop)
    check_async(config.trainer.async_, rollout.name == "sglang" and rollout.sglang.colocated)
    causes = {"trainer.async=1": config.trainer.async_, f"{_ROLLOUT}.partial_rollout=true": rollout.partial_rollout}
    for cause in (cause for cause, given in causes.items() if given):
        loss_mode = actor.policy_loss.mode(replayed=False)
        check_off_policy(cause, algorithm.rollout_correction.mode, actor.old_log_prob, loss_mode)
    check_denominator(actor.sum_norm_denominator, actor.loss_agg_mode)
    check_trigger(config)
    check_train_sampling(rollout.top_p, rollout.top_k)
    validates = config.trainer.val_before_train or config.trainer.test_freq > 0
    check_validation(validates, data.train_files is not None, data.val_files is not None)
    steps_per_step = -(-data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs
    check_warmup(actor.optim.lr_warmup_steps, steps_per_step * config.trainer.total_training_steps)


def check_world_size(world_size: int, tp: int, pp: int, cp: int = 1) -> None:
    """The ranks must form whole model replicas. Raises ValueError."""
    size = tp * pp * cp
    if world_size % size:
        megatron = f"{_ACTOR}.megatron"
        context = f" x {megatron}.context_parallel_size={cp}" if cp > 1 else ""
        raise ValueError(
            f"{world_size} ranks cannot hold model replicas of {size} ranks ({megatron}.tensor_model_parallel_size="
            f"{tp} x {megatron}.pipeline_model_parallel_size={pp}{context}): start a multiple of {size} ranks or lower "
            "these"
        )


def check_context(cp: int, cov_scope: str, loss_mode: str) -> None:
    """A covariance selection inside a micro-batch needs all of its tokens on one rank. Raises ValueError."""
    if cp > 1 and cov_scope == "micro_batch" and loss_mode in ("clip-cov", "kl-cov"):
        raise ValueError(
            f"{_ACTOR}.policy_loss.cov_scope=micro_batch cannot see the tokens of other ranks of "
            f"{_ACTOR}.megatron.context_parallel_size={cp}: set cov_scope=mini_batch or the size to 1"
        )


def check_batch(train_batch_size: int, ppo_mini_batch_size: int) -> None:
    """A step's prompts must split into equal mini-batches. Raises ValueError."""
    if ppo_mini_batch_size > train_batch_size:
        raise ValueError(
            f"{_ACTOR}.ppo_mini_batch_size={ppo_mini_batch_size} exceeds data.train_batch_size={train_batch_size}: "
            f"lower it to at most {train_batch_size}"
        )
    if train_batch_size % ppo_mini_batch_size:
        raise ValueError(
            f"data.train_batch_size={train_batch_size} is not a multiple of {_ACTOR}.ppo_mini_batch_size="
            f"{ppo_mini_batch_size}: choose sizes that divide, so that every optimizer step sees as many prompts"
        )


def check_in_flight(max_in_flight: int | None, max_num_seqs: int, num_leaders: int) -> None:
    """The requests at a server must suffice for one of every leader. Raises ValueError."""
    key = "max_num_seqs" if max_in_flight is None else "sglang.max_in_flight"
    limit = max_num_seqs if max_in_flight is None else max_in_flight
    if limit < num_leaders:
        raise ValueError(
            f"{_ROLLOUT}.{key}={limit} is shared by {num_leaders} data-parallel leaders: "
            f"raise it to {num_leaders} or more"
        )


def check_lengths(prompt: int, response: int, model_len: int | None, positions: int) -> None:
    """A longest conversation must fit the engine and the model's positions. Raises ValueError.

    Args:
        model_len: ``rollout.max_model_len``; None stands for prompt + response.
        positions: ``max_position_embeddings`` of the model.
    """
    longest = prompt + response
    if model_len is not None and longest > model_len:
        raise ValueError(
            f"data.max_prompt_length={prompt} + data.max_response_length={response} = {longest} exceeds "
            f"{_ROLLOUT}.max_model_len={model_len}: raise it, or set it to null to follow the lengths"
        )
    if longest > positions:
        raise ValueError(
            f"data.max_prompt_length={prompt} + data.max_response_length={response} = {longest} exceeds the model's "
            f"max_position_embeddings={positions}: lower one of the lengths"
        )
    if model_len is not None and model_len > positions:
        raise ValueError(
            f"{_ROLLOUT}.max_model_len={model_len} exceeds the model's max_position_embeddings={positions}: "
            f"lower it to at most {positions}, or set it to null"
        )


def check_token_budget(budget: int, longest: int, multiple: int = 1) -> None:
    """One micro-batch must hold the longest row, padded to ``multiple`` tokens. Raises ValueError."""
    if budget // multiple * multiple < longest:
        needed = -(-longest // multiple) * multiple
        raise ValueError(
            f"{_ACTOR}.ppo_max_token_len_per_gpu={budget} cannot hold one row of data.max_prompt_length + "
            f"data.max_response_length = {longest} tokens: raise it to at least {needed}"
        )


def check_kl(switch: str, enabled: bool, coefficient: float) -> None:
    """A KL term that is switched on needs a coefficient above 0. Raises ValueError.

    Args:
        switch: ``use_kl_loss`` or ``use_kl_in_reward``.
    """
    flag, key = {
        "use_kl_loss": (f"{_ACTOR}.use_kl_loss", f"{_ACTOR}.kl_loss_coef"),
        "use_kl_in_reward": ("algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef"),
    }[switch]
    if enabled and coefficient == 0:
        raise ValueError(f"{flag}=true with {key}=0 computes a KL term without effect: raise {key} or set {flag}=false")


def check_group_size(adv_estimator: str, n: int) -> None:
    """Group-relative advantages need groups. Raises ValueError."""
    if adv_estimator in _GROUP_ESTIMATORS and n < 2:
        raise ValueError(
            f"{_ROLLOUT}.n={n} with algorithm.adv_estimator={adv_estimator} compares no trajectories with each other: "
            "sample at least 2 per prompt, or set algorithm.adv_estimator=reinforce_plus_plus"
        )


def check_group_filters(dynamic_sampling: bool, filter_ratio: float, n: int) -> None:
    """Groups are chosen by the spread of their rewards, in one way. Raises ValueError.

    Args:
        dynamic_sampling: ``algorithm.filter_groups.enable``.
        filter_ratio: ``rollout.rollout_filter_ratio``.
    """
    key = f"{_ROLLOUT}.rollout_filter_ratio"
    if dynamic_sampling and filter_ratio < 1:
        raise ValueError(
            f"algorithm.filter_groups.enable=true and {key}={filter_ratio} both drop groups: set {key}=1.0 for dynamic "
            "sampling, or algorithm.filter_groups.enable=false to keep a fixed share"
        )
    if (dynamic_sampling or filter_ratio < 1) and n < 2:
        chosen = "algorithm.filter_groups.enable=true" if dynamic_sampling else f"{key}={filter_ratio}"
        raise ValueError(
            f"{chosen} chooses groups by the spread of their rewards, which {_ROLLOUT}.n={n} leaves at 0: sample at "
            "least 2 per prompt, or keep all groups"
        )


def check_old_log_prob(old_log_prob: str, correction: str, kl_in_reward: bool) -> None:
    """What compares the trainer's log-probs with others needs the pass that computes them. Raises ValueError.

    Args:
        old_log_prob: ``actor.old_log_prob``.
        correction: ``algorithm.rollout_correction.mode``.
    """
    if old_log_prob != "rollout":
        return
    key = f"{_ACTOR}.old_log_prob"
    if correction != "none":
        raise ValueError(
            f"algorithm.rollout_correction.mode={correction} weighs the trainer's log-probs against the engine's, but "
            f"{key}=rollout takes the engine's for both: set {key}=trainer, or the mode to none"
        )
    if kl_in_reward:
        raise ValueError(
            f"algorithm.use_kl_in_reward=true compares the trainer's log-probs with the reference, but {key}=rollout "
            f"skips their pass: set {key}=trainer, or take {_ACTOR}.use_kl_loss instead"
        )


def check_mismatch_mask(mask: float | None, old_log_prob: str) -> None:
    """Masking before the update needs the pass that computes the trainer's log-probs. Raises ValueError.

    Args:
        mask: ``rollout.mismatch.mask``. old_log_prob: ``actor.old_log_prob``.
    """
    if mask is not None and old_log_prob == "rollout":
        raise ValueError(
            f"{_ROLLOUT}.mismatch.mask={mask} compares the trainer's log-probs with the engine's before the update, "
            f"but {_ACTOR}.old_log_prob=rollout skips their pass: set old_log_prob=trainer, or mask=null"
        )


def check_mismatch_async(async_steps: int, mask: float | None, stop: float | None) -> None:
    """The gate bounds tokens of the trainer's own weights, and ahead of training none are. Raises ValueError.

    Args:
        async_steps: ``trainer.async``. mask, stop: of ``rollout.mismatch``.
    """
    for name, bound in (("mask", mask), ("stop", stop)):
        if async_steps and bound is not None:
            raise ValueError(
                f"{_ROLLOUT}.mismatch.{name}={bound} compares tokens of the current weights, but with trainer.async="
                f"{async_steps} every token after the first step is a version old and nothing would be compared: set "
                f"mismatch.{name}=null and algorithm.rollout_correction for tokens of older weights, or trainer.async=0"
            )


def check_async(async_steps: int, colocated: bool) -> None:
    """Rollouts beside the update need a second copy of the weights to sample from. Raises ValueError."""
    if async_steps and colocated:
        raise ValueError(
            f"trainer.async={async_steps} samples while the trainer updates, but {_ROLLOUT}.sglang.colocated=true "
            "gives the servers' memory to the trainer then: set trainer.async=0 or colocated=false"
        )


def check_off_policy(cause: str, correction: str, old_log_prob: str, loss_mode: str) -> None:
    """Trajectories of older weights need something that corrects for it. Raises ValueError.

    The importance weights of a correction do, and so does the clipped ratio to the engine's own log-probs, which the
    loss ``gpg`` has not.

    Args:
        cause: the setting that makes trajectories older than the weights, as ``key=value``.
        correction: ``algorithm.rollout_correction.mode``.
        old_log_prob: ``actor.old_log_prob``. loss_mode: of trajectories that are not replayed.
    """
    if correction == "none" and (old_log_prob != "rollout" or loss_mode == "gpg"):
        ratio = "" if loss_mode == "gpg" else f", or {_ACTOR}.old_log_prob=rollout"
        raise ValueError(
            f"{cause} trains on trajectories of older weights, and nothing corrects for it: set "
            f"algorithm.rollout_correction.mode to tis, icepop or sequence_mask{ratio}"
        )


def check_denominator(sum_norm_denominator: str, loss_agg_mode: str) -> None:
    """The released weights of micro-batches belong to one aggregation. Raises ValueError."""
    if sum_norm_denominator != "rows" and loss_agg_mode != "seq-mean-token-sum-norm":
        raise ValueError(
            f"{_ACTOR}.sum_norm_denominator={sum_norm_denominator} acts only with {_ACTOR}.loss_agg_mode="
            f"seq-mean-token-sum-norm, which is {loss_agg_mode}: set sum_norm_denominator=rows"
        )


def check_train_sampling(top_p: float, top_k: int) -> None:
    """Training samples from the whole distribution, whose log-probs the loss uses. Raises ValueError."""
    for name, value, off in (("top_p", top_p, 1.0), ("top_k", top_k, -1)):
        if value != off:
            raise ValueError(
                f"{_ROLLOUT}.{name}={value} restricts the distribution that training samples from: set it to {off}; "
                f"{_ROLLOUT}.val_kwargs.{name} may restrict evaluation"
            )


def check_validation(validates: bool, own_train_files: bool, own_val_files: bool) -> None:
    """Evaluation must measure the tasks that are trained. Raises ValueError."""
    if validates and own_train_files and not own_val_files:
        raise ValueError(
            "data.val_files is null while data.train_files names files: name held-out files, or switch evaluation off "
            "with trainer.val_before_train=false and trainer.test_freq=-1"
        )


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """The learning rate must reach its peak within the run. Raises ValueError."""
    if warmup_steps >= total_steps:
        raise ValueError(
            f"{_ACTOR}.optim.lr_warmup_steps={warmup_steps} leaves nothing of the run's {total_steps} optimizer steps: "
            "lower it, or raise trainer.total_training_steps"
        )
