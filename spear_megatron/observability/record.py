"""Writing and reading the per-step record: ``metrics.jsonl`` first, console and TensorBoard fed from the same line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spear_megatron.observability.console import ConsoleLog
from spear_megatron.observability.schema import HEADER_KEYS, SCHEMA_VERSION, check_names
from spear_megatron.observability.step_lines import StepLines, read_step_lines

RECORD_NAME = "metrics.jsonl"
LOGGERS = ("console", "tensorboard", "jsonl")


class Recorder(Protocol):
    """Where a step's metrics go. Rank 0 has a :class:`RunRecorder`, all others a :class:`NullRecorder`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of ``step``; on return they survive a crash."""
        ...

    def message(self, text: str) -> None:
        """Show a line to the user between the steps."""
        ...

    def close(self) -> None:
        """Finish what is open. Safe to call twice."""
        ...


class NullRecorder:
    """Records nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the names, so that a bad one fails alike on every rank."""
        check_names(metrics)

    def message(self, text: str) -> None:
        """Ignore ``text``."""

    def close(self) -> None:
        """Do nothing."""


class RunRecorder:
    """The record of one run directory, written by one process.

    ``metrics.jsonl`` is always written, one fsynced line per step. To resume after the checkpoint of step k, give
    ``resume_step=k``: lines of later steps, and a line cut by a crash, are dropped. ``resume_step=None`` starts anew
    and moves an older record aside.

    A record must be written before its step's checkpoint: then a crash between the two re-runs the step, and nothing
    is lost.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[str] = LOGGERS,
        resume_step: int | None = None,
        total_steps: int | None = None,
        console_every: int = 1,
    ) -> None:
        """``total_steps`` is the length of the progress bar; the console shows every ``console_every``-th step.

        Raises:
            ValueError: unknown logger, or a damaged line in the middle of the record to resume.
        """
        check_loggers(loggers)
        self._run_dir = Path(run_dir)
        self._lines = StepLines(self._run_dir / RECORD_NAME, SCHEMA_VERSION, resume_step)
        self._tensorboard = self._open_tensorboard(resume_step) if "tensorboard" in loggers else None
        done = self._lines.last_step
        self._console = ConsoleLog(total_steps, done, every=console_every) if "console" in loggers else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of ``step`` and wait until it is on disk, then show it.

        Raises:
            ValueError: a metric is not in the schema, or ``step`` does not come after the last one recorded.
        """
        check_names(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        header = dict(zip(HEADER_KEYS, (SCHEMA_VERSION, step, round(time.time(), 3))))
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append(step, {**header, **finite})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._console is not None:
            self._console.step(step, values)

    def message(self, text: str) -> None:
        """Show a line to the user above the progress bar, if the console is a logger."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        """Close the files and stop the progress bar. Safe to call twice."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._console is not None:
            self._console.close()

    def _open_tensorboard(self, resume_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "trainer.logger names tensorboard, which is not installed; run 'pip install tensorboard' or remove it"
            ) from error
        purge_step = None if resume_step is None else resume_step + 1
        return SummaryWriter(log_dir=str(self._run_dir / "tensorboard"), purge_step=purge_step)


def check_loggers(loggers: Sequence[str]) -> None:
    """Raises ValueError naming the first logger that does not exist."""
    for name in loggers:
        if name not in LOGGERS:
            raise ValueError(f"trainer.logger contains {name!r}; choose among {', '.join(LOGGERS)}")


def read_record(run_dir: str | Path) -> list[dict[str, Any]]:
    """Lines of the record of ``run_dir`` in step order; a last line cut by a crash is left out.

    Raises:
        FileNotFoundError: the folder has no record.
        ValueError: another line is damaged, or the record has a newer schema version.
    """
    path = Path(run_dir) / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {run_dir} is not the directory of a run that recorded a step")
    return read_step_lines(path, SCHEMA_VERSION)
