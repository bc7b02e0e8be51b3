"""The work of ``evaluate``: what is missing of an evaluation is sampled, then everything there is reported."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_megatron.cli.agents import (
    Agents,
    load_engine,
    load_episode_prompts,
    load_renderer,
    max_model_len,
    open_agents,
    samplings,
)
from spear_megatron.cli.evaluate import EngineChoice
from spear_megatron.cli.session import open_parallel
from spear_megatron.config.describe import flatten
from spear_megatron.config.schema import Config
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.prompts import prompts_fingerprint
from spear_megatron.evaluation.journal import COUNT, Journal, claim_identity, claimed, read_samples
from spear_megatron.evaluation.page import write_page
from spear_megatron.evaluation.progress import EvaluationProgress
from spear_megatron.evaluation.sampled_report import report_samples
from spear_megatron.evaluation.samples import Sample, all_keys, sample_maker
from spear_megatron.model.fingerprint import model_fingerprint
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.trajectories import evenly_spaced, write_kept
from spear_megatron.parallel.agreement import agreed, gather_objects
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.collect import Tasks
from spear_megatron.rollout.engine import Engine
from spear_megatron.rollout.openai.engine import OpenAIEngine
from spear_megatron.rollout.openai.models import served_model
from spear_megatron.rollout.sglang.servers import serve_already
from spear_megatron.types import Prompt

Key = tuple[int, int]
# What decides the samples besides model, prompts and the command's own options.
_DECISIVE = (
    "data.max_prompt_length", "data.max_response_length", "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.rollout.multi_turn", "actor_rollout_ref.rollout.val_kwargs.top_k",
    "actor_rollout_ref.model.dtype", "env.name", "env.kwargs", "env.sandbox.memory_mb", "env.sandbox.cpu_s",
    "env.sandbox.wall_s", "env.sandbox.output_bytes", "env.sandbox.processes", "env.sandbox.disk_mb", "reward",
    "trainer.seed",
)  # fmt: skip


@dataclass(frozen=True)
class _Subject:
    """What is evaluated on this rank."""

    config: Config
    choice: EngineChoice
    renderer: ChatRenderer
    shape: ModelShape
    prompts: Sequence[Prompt]

    @property
    def model(self) -> str:
        return self.config.actor_rollout_ref.model.path

    @property
    def num_samples(self) -> int:
        return self.config.actor_rollout_ref.rollout.val_kwargs.n


def run_evaluation(config: Config, choice: EngineChoice, out: Path) -> None:
    """Evaluate ``actor_rollout_ref.model.path`` into ``out``; rank 0 prints and writes the reports.

    Samples that ``out`` holds are kept, those whose infrastructure failed are taken again.

    Raises:
        ValueError: the dataset or the model cannot be used, or ``out`` belongs to another evaluation; names the key.
        RunError: no sample could be measured, or a rank failed. What was finished stays in ``out``.
    """
    model = config.actor_rollout_ref.model.path
    shape = ModelShape.from_folder(model)
    renderer = load_renderer(model, shape.vocab_size)
    subject = _Subject(
        config, choice, renderer, shape, load_episode_prompts(config, "val", renderer)
    )
    with open_parallel(config) as parallel, contextlib.ExitStack() as stack:
        samples: dict[Key, Sample] = {}
        with agreed(parallel, "opening of the evaluation"):
            if parallel.rank == 0:
                stack.enter_context(claimed(out))
                claim_identity(out, identity_of(subject))
                samples = read_samples(out)
        done: list[Key] = gather_objects(parallel, [key for key, sample in samples.items() if sample.valid])[0]
        missing = set(all_keys(len(subject.prompts), subject.num_samples)) - set(done)
        if parallel.rank == 0 and done:
            print(f"{len(done)} samples are in {out}, {len(missing)} are missing", flush=True)
        if missing:
            _sample(subject, parallel, out, done, len(missing))
        with agreed(parallel, "report of the evaluation"):
            if parallel.rank == 0:
                _report(subject, out)


def identity_of(subject: _Subject) -> dict[str, Any]:
    """Every setting that decides what the samples are, by the name that a user knows it by."""
    settings = flatten(subject.config)
    val = subject.config.actor_rollout_ref.rollout.val_kwargs
    decisive = {
        key: value
        for key, value in settings.items()
        if any(key == name or key.startswith(f"{name}.") for name in _DECISIVE)
    }
    return {
        "--model": model_fingerprint(subject.model),
        "--dataset": prompts_fingerprint(subject.prompts),
        "--engine": subject.choice.kind,
        "--served-model": subject.choice.served_model,
        COUNT: val.n,
        "--temperature": val.temperature,
        "--top-p": val.top_p,
        **{key: _plain(value) for key, value in decisive.items()},
    }


def _plain(value: Any) -> Any:
    """A setting as JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _sample(subject: _Subject, parallel: ParallelState, out: Path, done: Sequence[Key], num_missing: int) -> None:
    """Take the missing samples. Collective."""
    config = subject.config
    total = len(subject.prompts) * subject.num_samples
    keys = all_keys(len(subject.prompts), subject.num_samples)
    whole = {keys[index] for index in evenly_spaced(total, config.trainer.num_logged_trajectories)}
    plain = functools.partial(subject.renderer.tokenizer.decode, skip_special_tokens=True)
    progress = EvaluationProgress(-(-num_missing // parallel.dp_size), shown=parallel.rank == 0)
    maker = sample_maker(subject.renderer.decode, plain, whole)
    with _opened(subject, parallel) as agents, contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        with agreed(parallel, "opening of the samples"):
            journal = Journal(out, parallel.dp_rank, maker, done, progress.add)
        stack.callback(journal.close)
        prompts = tuple(enumerate(subject.prompts))
        tasks = Tasks("evaluate", 0, prompts, subject.num_samples, samplings(config)[1], keeper=journal)
        try:
            agents.collector.collect(tasks)
        except RunError as error:
            raise RunError(
                f"{error}. The finished samples are in {out}: the same command goes on from there"
            ) from error
    if parallel.rank == 0:
        share = " of rank 0" if parallel.dp_size > 1 else ""
        print(
            f"{progress.num_samples} samples{share} in {progress.seconds:.1f} s, {progress.num_tokens} sampled tokens, "
            f"{progress.num_tokens / max(progress.seconds, 1e-9):.0f} tokens/s",
            flush=True,
        )


@contextlib.contextmanager
def _opened(subject: _Subject, parallel: ParallelState) -> Iterator[Agents]:
    """Agents whose engine holds the model. Collective."""
    config, shape = subject.config, subject.shape
    factory: Callable[[int], Engine] | None = None
    with agreed(parallel, "asking the server for its model"):
        if subject.choice.kind == "openai":
            factory = _openai_factory(subject)
    with open_agents(config, parallel, subject.renderer, shape, engine_factory=factory) as agents:
        assert agents.engine is not None
        serve = subject.choice.kind == "openai"
        with agreed(parallel, "loading of the weights"):  # all wait: servers that they share must have them first
            if subject.choice.kind == "sglang" and parallel.rank == 0:
                sglang = config.actor_rollout_ref.rollout.sglang
                serve = serve_already(agents.servers.urls, subject.model, sglang, subject.choice.served_model)
        if not gather_objects(parallel, serve)[0]:
            with agreed(parallel, "loading of the weights"):
                load_engine(agents.engine, subject.model, shape)
        elif parallel.rank == 0 and subject.choice.kind == "sglang":
            print("the server has the model already: no weights are sent", flush=True)
        yield agents


def _openai_factory(subject: _Subject) -> Callable[[int], Engine]:
    """What makes the engine for OpenAI's API on every leader."""
    choice, rollout = subject.choice, subject.config.actor_rollout_ref.rollout
    settings, length = rollout.sglang, max_model_len(subject.config)
    api_key = os.environ.get(choice.api_key_env)
    name = served_model(
        choice.servers[0],
        subject.model,
        choice.served_model,
        api_key=api_key,
        max_model_len=length,
        timeout_s=settings.control_timeout_s,
    )
    encode = functools.partial(subject.renderer.tokenizer.encode, add_special_tokens=False)

    def make(dp_size: int) -> Engine:
        return OpenAIEngine(
            choice.servers[0],
            model=name,
            settings=settings,
            vocab_size=subject.shape.vocab_size,
            encode=encode,
            decode=subject.renderer.decode,
            max_in_flight=max(1, (settings.max_in_flight or rollout.max_num_seqs) // dp_size),
            max_model_len=length,
            api_key=api_key,
            api_key_name=f"the environment variable {choice.api_key_env} (--api-key-env)",
        )

    return make


def _report(subject: _Subject, out: Path) -> None:
    """Everything from what is on disk."""
    wanted = set(all_keys(len(subject.prompts), subject.num_samples))
    samples = [sample for key, sample in read_samples(out).items() if key in wanted]
    seed = subject.config.trainer.seed
    report = report_samples(subject.model, subject.prompts, samples, num_samples=subject.num_samples, seed=seed)
    report.write_json(out / "report.json")
    write_page(out / "report.html", report, subject.prompts, samples)
    whole = sorted((sample.key, sample.trajectory) for sample in samples if sample.trajectory is not None)
    write_kept(out, [trajectory for _, trajectory in whole])
    print(report.to_table(), flush=True)
    print(f"problems and conversations: {out / 'report.html'}", flush=True)
