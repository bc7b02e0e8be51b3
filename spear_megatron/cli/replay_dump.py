"""``replay-dump DIR``: compute a batch again that a run saved, and hold it against the engine and the trainer then.

Under ``torchrun`` it runs on as many ranks; without overrides every rank holds a whole model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.algorithms.mismatch import Mismatch
    from spear_megatron.config.schema import Config
    from spear_megatron.data.batch_files import BatchInfo
    from spear_megatron.trainer.replay_batch import ReplayedBatch

_MEGATRON = "actor_rollout_ref.actor.megatron"
_WHOLE_MODEL = (
    f"{_MEGATRON}.tensor_model_parallel_size=1", f"{_MEGATRON}.pipeline_model_parallel_size=1",
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size=null", f"{_MEGATRON}.sequence_parallel=false",
    f"{_MEGATRON}.context_parallel_size=1",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``replay-dump`` to ``parser``."""
    parser.add_argument("batch", type=Path, metavar="DIR", help="mismatch/step_N or nonfinite/step_N.update_K of a run")
    parser.add_argument(
        "--model", metavar="FOLDER",
        help="Hugging Face folder with the weights; if absent, the run's newest checkpoint at or before the batch's "
        "weights, and without one the folder that the run started from",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, metavar="NATS",
        help="mean difference to the engine above which the exit code is 1 (default: mismatch.warn of the run)",
    )  # fmt: skip
    picture = "picture of the tokens' differences; DIR/mismatch.png if absent"
    parser.add_argument("--out", type=Path, metavar="FILE.png", help=picture)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one key of the run's configuration")


def run(args: argparse.Namespace) -> int:
    """Print the table, draw the picture; 1 if engine and trainer are too far apart or a log-prob is not finite."""
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.data.batch_files import read_batch

    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out writes PNG files, got {args.out}: give a name that ends in .png")
    batch = read_batch(args.batch)
    model = [] if args.model is None else [f"actor_rollout_ref.model.path={args.model}"]
    config = load(Config, batch.config_path, [*_WHOLE_MODEL, *model, *args.overrides])
    limit = threshold(config, args.threshold)

    from spear_megatron.cli.build import build_actor
    from spear_megatron.cli.preflight import check_before_start
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.trainer.replay_batch import replay_batch

    check_before_start(config)
    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    checkpoint = None if args.model else newest_checkpoint(args.batch, batch.info.policy_version)
    with open_parallel(config) as parallel:
        actor, _ = build_actor(config, parallel, shape, config.actor_rollout_ref.actor.optim, 1)
        if checkpoint is not None:
            from spear_megatron.checkpoint.sharded import FOLDER, load_sharded

            load_sharded(parallel, checkpoint[1] / FOLDER, actor.chunks, None)
        bound = config.actor_rollout_ref.rollout.mismatch.token_bound
        result = replay_batch(actor, parallel, batch, token_bound=bound)
        level = result.engine["all"].abs_diff_mean
        if parallel.rank == 0:
            weights = (
                f"{config.actor_rollout_ref.model.path} ({'as given' if args.model else 'version 0'})"
                if checkpoint is None else f"{checkpoint[1]} (version {checkpoint[0]})"
            )  # fmt: skip
            is_exact = bool(args.model) or (checkpoint[0] if checkpoint else 0) == batch.info.policy_version
            _report(batch.info, result, weights, is_exact, args.out or args.batch / "mismatch.png")
            verdict = "above" if level > limit else "within"
            print(f"mean difference to the engine: {level:.3g} nats, {verdict} {limit:g}")
    return int(level > limit or result.nonfinite > 0)


def threshold(config: Config, given: float | None) -> float:
    """The mean difference that decides the exit code, nats: given, or the run's own bound.

    Raises:
        ValueError: neither is there, or the given one is not positive.
    """
    bounds = config.actor_rollout_ref.rollout.mismatch
    limit = given if given is not None else bounds.warn if bounds.warn is not None else bounds.stop
    if limit is None:
        raise ValueError("actor_rollout_ref.rollout.mismatch.warn and stop of the run are null: give --threshold NATS")
    if limit <= 0:
        raise ValueError(f"--threshold must be a positive number of nats, got {limit}")
    return limit


def newest_checkpoint(batch: Path, version: int) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint of the batch's run at or before ``version``; None without one.

    Raises:
        ValueError: that checkpoint is damaged.
    """
    from spear_megatron.checkpoint.locate import RUN_FOLDER, find_checkpoint
    from spear_megatron.checkpoint.store import CheckpointStore

    root = batch.resolve().parents[1] / RUN_FOLDER
    if not root.is_dir():
        return None
    store = CheckpointStore(root)
    steps = [step for step in store.steps() if step <= version]
    if not steps:
        return None
    folder, _ = find_checkpoint(store.path(max(steps)))
    return max(steps), folder


def _report(info: BatchInfo, result: ReplayedBatch, weights: str, is_exact: bool, picture: Path) -> None:
    from dataclasses import asdict

    from spear_megatron.observability.mismatch_view import print_mismatch, save_mismatch_plot

    def plain(mismatch: Mismatch | None) -> dict[str, dict[str, float]]:
        return {name: asdict(value) for name, value in (mismatch or {}).items()}

    print(f"{info.kind} batch: {info.reason}")
    print(f"weights: {weights}; the batch was computed with version {info.policy_version}, update {info.update}")
    if not is_exact or info.update:
        print("these are not the weights of the batch: differences hold what they learned in between")
    if result.nonfinite:
        print(f"{result.nonfinite} log-probs are not finite")
    print_mismatch(plain(result.engine), plain(result.saved_engine), plain(result.saved))
    print(f"picture: {save_mismatch_plot(picture, *result.tokens, title=f'{info.kind} batch of step {info.step}')}")
