"""``evaluate``: success of a model folder on held-out tasks, with the training's own agent loop."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.rollout.config import RolloutConfig

ENGINES = ("embedded", "sglang", "openai")


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """What samples: ``kind`` is one of :data:`ENGINES`; ``servers`` none where the run starts its own."""

    kind: str
    servers: tuple[str, ...] = ()
    served_model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate`` to ``parser``."""
    add_config_arguments(parser)
    parser.add_argument("--model", help="Hugging Face folder to evaluate (default: actor_rollout_ref.model.path)")
    parser.add_argument(
        "--dataset", action="append",
        help="JSONL of id, problem, answer; may come several times (default: data.val_files or built-in problems)",
    )  # fmt: skip
    parser.add_argument(
        "--n", "--samples", dest="n", type=int, metavar="N",
        help="samples per problem; torchrun takes --n for one of its own options and leaves --samples alone "
        "(default: actor_rollout_ref.rollout.val_kwargs.n)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: val_kwargs.temperature)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling (default: val_kwargs.top_p)")
    parser.add_argument(
        "--engine", choices=ENGINES,
        help="embedded: in this process; sglang: SGLang servers, started here unless named; openai: a server that "
        "speaks OpenAI's completions API (default: actor_rollout_ref.rollout.name)",
    )  # fmt: skip
    parser.add_argument(
        "--server", action="append", metavar="URL", help="server, or SGLang router, to ask; sglang takes several"
    )
    parser.add_argument(
        "--served-model", metavar="NAME",
        help="what the server serves, where it is not the path of --model: its model_path (sglang) or name (openai)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-env", default=EngineChoice.api_key_env, metavar="VAR",
        help="environment variable that holds the API key, if the server wants one (openai; default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="outputs/evaluation",
        help="folder of samples and reports; the same command goes on with what is missing there",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Sample what is missing, score, print the table and write ``report.json`` and ``report.html``."""
    config = load_config(args)
    choice = engine_choice(args, config)
    config = as_evaluation(config, args, choice)
    from spear_megatron.cli.preflight import check_agents, check_before_start, check_places, print_plan

    check_out(Path(args.out))
    check_before_start(config)
    check_agents(config)
    if args.dry_run:
        print_plan(config)
        return 0
    check_places(config, args.out, "--out", weights=choice.kind == "embedded")
    from spear_megatron.cli.evaluation import run_evaluation

    run_evaluation(config, choice, Path(args.out))
    return 0


def engine_choice(args: argparse.Namespace, config: Config) -> EngineChoice:
    """The engine that options and configuration ask for.

    Raises:
        ValueError: options that do not go together; names the remedy.
    """
    kind = args.engine or config.actor_rollout_ref.rollout.name
    servers = tuple(url.rstrip("/") for url in args.server or ())
    if servers and kind == "embedded":
        raise ValueError("--server names a server, but the engine is embedded: add --engine sglang or --engine openai")
    if kind == "openai" and len(servers) != 1:
        raise ValueError(f"--engine openai asks one server, got {len(servers)}: give --server URL once")
    if args.served_model and not (servers or (kind == "sglang" and config.actor_rollout_ref.rollout.sglang.servers)):
        raise ValueError("--served-model says what a server serves: give --server URL too")
    return EngineChoice(kind=kind, servers=servers, served_model=args.served_model, api_key_env=args.api_key_env)


def as_evaluation(config: Config, args: argparse.Namespace, choice: EngineChoice) -> Config:
    """The configuration with the command's options in place; every rank holds a whole model."""
    from spear_megatron.parallel.config import MegatronConfig

    ref = config.actor_rollout_ref
    options = {"n": args.n, "temperature": args.temperature, "top_p": args.top_p}
    given = {key: value for key, value in options.items() if value is not None}
    rollout = dataclasses.replace(ref.rollout, val_kwargs=dataclasses.replace(ref.rollout.val_kwargs, **given))
    rollout = _with_engine(rollout, choice)
    model = dataclasses.replace(ref.model, path=args.model or ref.model.path)
    actor = dataclasses.replace(ref.actor, megatron=MegatronConfig())
    data = config.data if not args.dataset else dataclasses.replace(config.data, val_files=tuple(args.dataset))
    trainer = dataclasses.replace(config.trainer, default_local_dir=str(args.out))  # logs of started servers go there
    return dataclasses.replace(
        config,
        data=data,
        trainer=trainer,
        actor_rollout_ref=dataclasses.replace(ref, model=model, actor=actor, rollout=rollout),
    )


def _with_engine(rollout: RolloutConfig, choice: EngineChoice) -> RolloutConfig:
    """``rollout`` with the chosen engine; that for OpenAI's API is made elsewhere and needs no server here."""
    if choice.kind == "sglang":
        servers = choice.servers or rollout.sglang.servers
        colocated = rollout.sglang.colocated and not servers
        router = None if choice.servers else rollout.sglang.router
        sglang = dataclasses.replace(rollout.sglang, servers=servers, colocated=colocated, router=router)
        return dataclasses.replace(rollout, name="sglang", sglang=sglang)
    sglang = dataclasses.replace(rollout.sglang, servers=(), router=None, colocated=False)
    return dataclasses.replace(rollout, name="embedded", sglang=sglang)


def check_out(out: Path) -> None:
    """ValueError if ``out`` is the directory of a training run, whose trajectories an evaluation would replace."""
    from spear_megatron.observability.record import RECORD_NAME

    if (out / RECORD_NAME).exists():
        raise ValueError(f"--out {out} is the directory of a run, whose trajectories would go: give another folder")
