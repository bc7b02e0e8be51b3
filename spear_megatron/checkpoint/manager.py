"""Saving and resuming a training run: one atomic checkpoint per step, agreed upon by all ranks."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spear_megatron.checkpoint import assets as assets_module
from spear_megatron.checkpoint import sharded, states
from spear_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from spear_megatron.data.files import FileEntry, FileSystem
from spear_megatron.checkpoint.manifest import SHARDED, Manifest, StateEntry, read_manifest
from spear_megatron.checkpoint.optimizer_state import load_schedule_state
from spear_megatron.checkpoint.store import CheckpointStore
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState

logger = logging.getLogger(__name__)

POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class LoadedStates:
    """What ``load_latest`` found: model, optimizer and scheduler are loaded already, ``states`` is everything else."""

    step: int
    states: Mapping[str, Any]
    manifest: Manifest
    path: Path


@dataclass
class _Job:
    """One save on its way to disk on this rank."""

    step: int
    plan: sharded.ShardPlan
    small: dict[str, tuple[StateEntry, bytes]]
    states: dict[str, StateEntry]
    needed: int
    deadline: float
    external: tuple[FileEntry, ...] = ()
    results: list[Any] = field(default_factory=list)
    entries: list[FileEntry] = field(default_factory=list)
    error: str | None = None
    thread: threading.Thread | None = None


class CheckpointManager:
    """Writes, keeps and loads the checkpoints under ``root``.

    All methods are collective over all ranks and belong to the main thread; a failure on one rank raises the same
    ``CheckpointError`` on all of them. A failed save leaves earlier checkpoints as they are.
    """

    def __init__(
        self,
        root: Path,
        *,
        parallel: ParallelState,
        keep: int,
        async_save: bool = False,
        fingerprint: str = "",
        assets: Path | None = None,
        min_free_factor: float = 1.1,
        write_timeout_s: float = 3600.0,
        files: FileSystem | None = None,
        collect: Callable[[set[str]], None] | None = None,
    ) -> None:
        """Open ``root``, creating it if needed and clearing what an interrupted save left behind.

        Args:
            keep: number of newest checkpoints that stay.
            async_save: let ``save`` return once the state is copied; a background thread writes, and ``poll`` at a
                later step boundary completes the checkpoint.
            fingerprint: names the configuration; a checkpoint of another one is loaded with a warning.
            assets: Hugging Face folder whose config and tokenizer go into every checkpoint, so that it can be exported.
            min_free_factor: free space required, as a multiple of the size of the checkpoint.
            write_timeout_s: deadline of one write.
            collect: called on rank 0 after each completed checkpoint with the external files that kept checkpoints
                name (paths relative to the parent of ``root``); it may delete others.

        Raises:
            ValueError: ``keep`` or ``min_free_factor`` is below 1.
            CheckpointError: ``root`` cannot be used.
        """
        if keep < 1 or min_free_factor < 1.0:
            raise ValueError(f"keep and min_free_factor must be at least 1, got {keep} and {min_free_factor}")
        self._store = CheckpointStore(root, files)
        self._parallel = parallel
        self._keep = keep
        self._async = async_save
        self._fingerprint = fingerprint
        self._assets = assets
        self._min_free_factor = min_free_factor
        self._write_timeout_s = write_timeout_s
        self._collect = collect
        self._refused: set[int] = set()
        self._job: _Job | None = None
        self._agree(f"checkpoint folder {root} cannot be used", self._on_rank_0(self._store.clean))

    def steps(self) -> list[int]:
        """Steps with a completed checkpoint, oldest first, as rank 0 sees them."""
        return gather_objects(self._parallel, self._store.steps() if self._parallel.rank == 0 else [])[0]

    def save(
        self,
        step: int,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None,
        scheduler: Any | None,
        small_states: Mapping[str, Any],
        external: Sequence[FileEntry] = (),
    ) -> None:
        """Write the checkpoint of ``step`` and then delete those beyond ``keep``.

        Does nothing when a good checkpoint of this step exists already. A background save still under way is
        completed first.

        Args:
            optimizer: Megatron optimizer, or None to save the weights alone.
            scheduler: has a JSON-able ``state_dict()``; None leaves it out.
            small_states: every other state by name (JSON-able, or holding tensors); rank 0's are written.
            external: files of the run directory that belong to the checkpoint with their first bytes; durable already.

        Raises:
            CheckpointError: no space, or a rank failed; names the step, the folder and the reason.
        """
        self.wait()
        if self._is_good(step):
            logger.info("checkpoint of step %d exists already", step)
            return
        if scheduler is not None:
            small_states = {"scheduler": scheduler.state_dict(), **small_states}
        job = self._prepare(step, model_chunks, optimizer, small_states, tuple(external))
        job.thread = threading.Thread(target=self._write, args=(job,), name=f"checkpoint-{step}", daemon=True)
        job.thread.start()
        self._job = job
        if not self._async:
            self.wait()

    def poll(self) -> int | None:
        """Complete a background save that every rank has finished writing; call it at step boundaries.

        Returns:
            The step whose checkpoint was completed by this call, or None.

        Raises:
            CheckpointError: writing failed on some rank, or its deadline passed.
        """
        job = self._job
        if job is None or not self._all_written(job):
            return None
        self._job = None
        self._complete(job)
        return job.step

    def wait(self) -> None:
        """Complete the background save under way, if any. Raises as ``poll`` does."""
        while self._job is not None:
            if self.poll() is None:
                time.sleep(POLL_S)

    def load_latest(
        self,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None,
        scheduler: Any | None,
        required: Collection[str] = (),
    ) -> LoadedStates | None:
        """Load the newest good checkpoint into model, optimizer and scheduler (those that are not None).

        Damaged or partial checkpoints, and those lacking a required state, are passed over with a warning that names
        what is wrong; all ranks share the checking and agree on the choice.

        Args:
            required: names of the small states that must be there.

        Returns:
            The loaded states, or None when there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none is usable, or the newest good one is of another model.
        """
        self.wait()
        refusals: list[str] = []
        wanted = {"model": model_chunks, "optimizer": optimizer, "scheduler": scheduler}
        needed = {*required, *(name for name, part in wanted.items() if part is not None)}
        for step in reversed(self.steps()):
            problems = self._problems(step, needed)
            if not problems:
                if self._parallel.rank == 0:
                    for refusal in refusals:
                        logger.warning("checkpoint refused, trying an older one. %s", refusal)
                return self._load(step, model_chunks, optimizer, scheduler)
            refusals.append(f"{self._store.path(step).name}: {'; '.join(problems)}")
            self._refused.add(step)
        if refusals:
            raise CheckpointError(
                f"no usable checkpoint in {self._store.root} ({' | '.join(refusals)}); "
                "restore one, or move the folder away to start from the beginning"
            )
        return None

    def _load(
        self, step: int, model_chunks: Sequence[torch.nn.Module], optimizer: Any | None, scheduler: Any | None
    ) -> LoadedStates:
        path = self._store.path(step)
        manifest = read_manifest(path)
        if manifest.fingerprint != self._fingerprint and self._parallel.rank == 0:
            logger.warning("%s was written with another configuration; its states are used as they are", path)
        sharded.load_sharded(self._parallel, path / sharded.FOLDER, model_chunks, optimizer)
        small = states.decode_states(path, manifest)
        saved_schedule = small.pop("scheduler", None)
        if scheduler is not None:
            load_schedule_state(scheduler, saved_schedule)
        return LoadedStates(step=step, states=small, manifest=manifest, path=path)

    def _prepare(
        self,
        step: int,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any | None,
        small_states: Mapping[str, Any],
        external: tuple[FileEntry, ...],
    ) -> _Job:
        small: dict[str, tuple[StateEntry, bytes]] = {}

        def encode() -> None:
            small.update({name: states.encode_state(name, value) for name, value in small_states.items()})

        self._agree(f"checkpoint of step {step} cannot be written", self._on_rank_0(encode))
        plan = sharded.plan_save(self._parallel, model_chunks, optimizer, snapshot=self._async)
        local_bytes = plan.num_bytes + sum(len(data) for _, data in small.values())
        needed = int(sum(gather_objects(self._parallel, local_bytes)) * self._min_free_factor)

        folders = [sharded.FOLDER, states.FOLDER, *([assets_module.FOLDER] if self._assets else [])]

        def begin() -> None:
            self._store.check_space(step, needed)
            self._store.begin(step, folders)

        self._agree(f"checkpoint of step {step} cannot be written", self._on_rank_0(begin))
        names = ("model",) if optimizer is None else ("model", "optimizer")
        entries = {name: StateEntry(SHARDED, sharded.FOLDER) for name in names}
        entries |= {name: entry for name, (entry, _) in small.items()}
        return _Job(step, plan, small, entries, needed, time.monotonic() + self._write_timeout_s, external)

    def _write(self, job: _Job) -> None:
        """Body of the writing thread: no collectives; a failure is kept for ``poll``."""
        try:
            staging = self._store.staging_path(job.step)
            files = self._store.files
            job.results, job.entries = job.plan.write(files, staging / sharded.FOLDER)
            if self._parallel.rank == 0:
                for entry, data in job.small.values():
                    job.entries.append(files.write(staging / entry.path, data, entry.path))
                if self._assets is not None:
                    job.entries += assets_module.copy_assets(self._assets, staging / assets_module.FOLDER, files)
        except Exception as error:  # a thread has no caller: every failure travels through poll to all ranks
            job.error = _describe(error)

    def _all_written(self, job: _Job) -> bool:
        assert job.thread is not None
        done = not job.thread.is_alive()
        late = not done and time.monotonic() > job.deadline
        answers = gather_objects(self._parallel, (done, late))
        if any(late for _, late in answers):
            self._job = None
            ranks = [rank for rank, (_, late) in enumerate(answers) if late]
            raise CheckpointError(
                f"checkpoint of step {job.step} in {self._store.root} was not written within "
                f"{self._write_timeout_s:.0f} s on ranks {ranks}; earlier checkpoints are untouched"
            )
        return all(done for done, _ in answers)

    def _complete(self, job: _Job) -> None:
        reports = gather_objects(self._parallel, (job.error, job.results, job.entries))
        errors = [f"rank {rank}: {error}" for rank, (error, _, _) in enumerate(reports) if error]

        def commit() -> None:
            if errors:
                self._store.discard(job.step)
                free = self._store.files.free_bytes(self._store.root)
                raise CheckpointError(f"{'; '.join(errors)} (needed {job.needed} bytes, {free} were free)")
            assert job.plan.metadata is not None
            folder = self._store.staging_path(job.step) / sharded.FOLDER
            entries = sharded.complete_save(folder, job.plan.metadata, [results for _, results, _ in reports])
            entries += [entry for _, _, written in reports for entry in written]
            self._store.commit(job.step, self._manifest(job, entries))
            self._store.keep_last(self._keep, self._refused)
            self._collect_external()

        self._agree(f"checkpoint of step {job.step} in {self._store.root} failed", self._on_rank_0(commit))
        self._refused.discard(job.step)

    def _manifest(self, job: _Job, entries: list[FileEntry]) -> Manifest:
        parallel = self._parallel
        return Manifest(
            step=job.step,
            fingerprint=self._fingerprint,
            layout={
                "world_size": parallel.world_size,
                "tp": parallel.tp_size,
                "pp": parallel.pp_size,
                "vpp": parallel.vpp_size or 1,
                "cp": parallel.cp_size,
                "dp": parallel.dp_size,
            },
            software={name: importlib.metadata.version(name) for name in ("spear-megatron", "megatron-core", "torch")},
            states=job.states,
            external=job.external,
            files=tuple(sorted(entries, key=lambda entry: entry.path)),
        )

    def _collect_external(self) -> None:
        if self._collect is None:
            return
        try:
            named = self._store.external_files()
        except DamagedCheckpoint as error:
            logger.warning("external files are all kept for now: a manifest in %s: %s", self._store.root, error)
            return
        self._collect(named)

    def _is_good(self, step: int) -> bool:
        return step in self.steps() and not self._problems(step, ())

    def _problems(self, step: int, required: Collection[str]) -> list[str]:
        parallel = self._parallel
        found = self._store.problems(step, required, parallel.rank, parallel.world_size)
        return list(dict.fromkeys(text for part in gather_objects(parallel, found) for text in part))

    def _on_rank_0(self, action: Any) -> str | None:
        """Run ``action`` on rank 0 and return its failure as text."""
        if self._parallel.rank != 0:
            return None
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            return str(error)
        return None

    def _agree(self, what: str, error: str | None) -> None:
        errors = [text for text in gather_objects(self._parallel, error) if text]
        if errors:
            raise CheckpointError(f"{what}: {errors[0]}")


def _describe(error: BaseException) -> str:
    """The file system's complaint if there is one behind ``error`` (serialisers hide it), else ``error`` itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    return f"{type(shown).__name__}: {shown}"
