"""Checks of a whole configuration before anything starts, and the resolved plan as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.parallel.launch import local_rank, world_size
from spear_megatron.parallel.paths import check_output_folder, os_error_text

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config


def check_before_start(config: Config) -> None:
    """Cross-field checks against the world size and the model's shape.

    Raises:
        ValueError: the first problem, naming its key and the remedy.
    """
    from spear_megatron.config.checks import check_config
    from spear_megatron.model.shape import ModelShape

    path = config.actor_rollout_ref.model.path
    if not path:
        raise ValueError("actor_rollout_ref.model.path is not set: give a model folder in Hugging Face format")
    check_config(config, ModelShape.from_folder(path), world_size=world_size())


def check_machine(config: Config) -> None:
    """Whether this machine has what the configuration asks for by name.

    Raises:
        ValueError: the first thing that is missing, naming its key, the cause and the remedy.
    """
    from spear_megatron.device.platform import detect_platform
    from spear_megatron.model.acceleration import choose_acceleration

    actor = config.actor_rollout_ref.actor
    platform = detect_platform(local_rank())
    choose_acceleration(actor.megatron, actor.kernels, platform, config.actor_rollout_ref.model.torch_dtype)


def check_places(config: Config, folder: str, key: str, *, weights: bool = True) -> None:
    """Whether the model's weights can be read, by their headers, and the results be written.

    Args:
        folder: of the results. key: configuration key or option that named it.
        weights: of ``actor_rollout_ref.model.path`` are read here.

    Raises:
        ValueError: a tensor or file is missing or damaged, or the folder cannot be written; names it and the remedy.
        OSError: a file cannot be read.
    """
    from spear_megatron.model.hf_folder import HFWeights
    from spear_megatron.model.shape import ModelShape

    check_output_folder(folder, key)
    if weights:
        path = config.actor_rollout_ref.model.path
        HFWeights.open(path, ModelShape.from_folder(path))


def machine_notes(config: Config, folder: str, key: str) -> list[str]:
    """What :func:`check_machine` and :func:`check_places` refuse, as notes: a dry run may be made on another machine
    than the run."""
    notes = []
    for check in (lambda: check_machine(config), lambda: check_places(config, folder, key)):
        try:
            check()
        except (ValueError, OSError) as error:
            told = os_error_text(error) if isinstance(error, OSError) else None
            notes.append(f"on this machine: {told or error}")
    return notes


def check_agents(config: Config) -> None:
    """Find the environment and the reward, for commands that roll out.

    Raises:
        ValueError: one of them is not there or does not take its arguments; names the key.
    """
    from spear_megatron.environments.registry import check_environment_settings
    from spear_megatron.rewards.registry import check_reward_settings

    check_environment_settings(config.env)
    check_reward_settings(config.reward)


def print_warnings(config: Config) -> None:
    """Tell on standard error, once for all ranks, what can run but most likely is not meant."""
    from spear_megatron.config.checks_replay import config_warnings
    from spear_megatron.parallel.once import is_first_to_say

    for text in (*config_warnings(config), *_machine_warnings()):
        if is_first_to_say(text):
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _machine_warnings() -> list[str]:
    """A GPU host whose Transformer Engine does not serve trains with the plain layers, which is seldom meant."""
    import torch

    if not torch.cuda.is_available():
        return []
    from spear_megatron.device.optional import transformer_engine

    part = transformer_engine()
    if not part.installed or part.usable:
        return []
    return [f"{part.name} is installed and not used, {part.reason}: the plain layers serve. {part.remedy}"]


def print_plan(config: Config) -> None:
    """The resolved configuration as YAML and what follows from it, as comments."""
    from spear_megatron.config.describe import to_yaml
    from spear_megatron.model.shape import ModelShape

    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    megatron = config.actor_rollout_ref.actor.megatron
    world = world_size()
    print(to_yaml(config), end="")
    print(f"# model: {shape.architecture}, {shape.num_parameters():,} parameters, {shape.num_layers} layers")
    context = f"x context {megatron.context_parallel_size} " if megatron.context_parallel_size > 1 else ""
    print(
        f"# layout: {world} ranks = tensor {megatron.tensor_model_parallel_size} x pipeline "
        f"{megatron.pipeline_model_parallel_size} {context}x data {world // megatron.model_parallel_size}"
    )
    print(
        f"# step: {config.data.train_batch_size} prompts x {config.actor_rollout_ref.rollout.n} samples, "
        f"{config.trainer.total_training_steps} steps, results in {config.trainer.default_local_dir}"
    )


def save_resolved(config: Config) -> None:
    """Keep the resolved configuration in the run directory."""
    from spear_megatron.config.describe import to_yaml
    from spear_megatron.observability.files import write_atomically

    folder = Path(config.trainer.default_local_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
