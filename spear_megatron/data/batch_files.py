"""Training batches that something is wrong with, kept in the run directory to be looked at and computed again.

``<run directory>/<kind>/step_N[.update_K]/`` holds one safetensors file per data-parallel leader with rows, the
configuration as ``config.yaml``, and ``batch.json``, which is written last: a folder without it is no batch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from spear_megatron.algorithms.mismatch import turn_numbers
from spear_megatron.data.exchange import TensorRecord, decode_records, encode_records, record_to_row, row_to_record
from spear_megatron.data.packing import row_key
from spear_megatron.observability.files import sync_path, write_atomically
from spear_megatron.parallel.agreement import agreed, gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.types import Row

Kind = Literal["mismatch", "nonfinite"]
FORMAT_VERSION = 1
INFO_NAME, CONFIG_NAME = "batch.json", "config.yaml"
_FOLDER = re.compile(r"step_(\d+)(?:\.update_(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One row of a saved batch.

    Attributes:
        row: as it was trained on. replayed: whether it belongs to the self-imitation term.
        log_probs: float32 [n], the trainer's under the weights of the batch; None where they were not computed.
    """

    row: Row
    log_probs: torch.Tensor | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInfo:
    """What ``batch.json`` tells.

    Attributes:
        kind: mismatch or nonfinite. reason: in one sentence.
        step: 1-based training step; update: 0-based optimizer step within it.
        policy_version: of the weights when the step began (they are the weights after that many training steps).
        checkpoint: newest checkpoint at or before that version, relative to the run directory; None without one.
        model_path: what the run started from.
        figures: mismatch of the batch by bucket, as :class:`spear_megatron.algorithms.mismatch.BucketFigures`.
    """

    kind: Kind
    step: int
    update: int
    policy_version: int
    reason: str
    model_path: str = ""
    checkpoint: str | None = None
    figures: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class SavedBatch:
    """A batch that was read back: ``rows`` of all ranks in id order, ``info``, and the configuration's file."""

    info: BatchInfo
    rows: list[BatchRow]
    config_path: Path


class BatchFiles:
    """Writes the batches of a run. Methods are collective over all ranks."""

    def __init__(
        self, run_dir: Path, parallel: ParallelState, *, keep: int, config_yaml: str = "", model_path: str = ""
    ) -> None:
        """Bind what does not change.

        Args:
            keep: batches of one kind that stay, the newest by step.
            config_yaml: the resolved configuration. model_path: Hugging Face folder that the run started from.
        """
        self._run_dir, self._parallel, self._keep = run_dir, parallel, keep
        self._config_yaml, self._model_path = config_yaml, model_path

    def save(self, info: BatchInfo, rows: Sequence[BatchRow]) -> Path:
        """Write the batch of all ranks and delete what is beyond ``keep``; returns its folder.

        So are batches of later updates: they were made before the run went back to a checkpoint.

        Args:
            info: its model path is filled in.
            rows: of this data-parallel rank.

        Raises:
            RunError, OSError: a rank could not write.
        """
        name = f"step_{info.step:06d}" + (f".update_{info.update:03d}" if info.kind == "nonfinite" else "")
        folder = self._run_dir / info.kind / name
        first = self._parallel.rank == 0
        with agreed(self._parallel, "saving of a batch"):
            if first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        part: tuple[str, int] | None = None
        with agreed(self._parallel, "saving of a batch"):
            if self._parallel.is_leader and rows:
                part = (f"rank_{self._parallel.dp_rank:03d}.safetensors", len(rows))
                buffer = encode_records([_to_record(item) for item in rows])
                write_atomically(folder / part[0], buffer.numpy().tobytes())
        parts = [item for item in gather_objects(self._parallel, part) if item is not None]
        with agreed(self._parallel, "saving of a batch"):
            if first:
                self._complete(folder, replace(info, model_path=self._model_path), parts)
        return folder

    def _complete(self, folder: Path, info: BatchInfo, parts: Sequence[tuple[str, int]]) -> None:
        write_atomically(folder / CONFIG_NAME, self._config_yaml.encode())
        values = {name: getattr(info, name) for name in BatchInfo.__dataclass_fields__}
        files = [{"name": name, "rows": count} for name, count in parts]
        text = json.dumps({"format_version": FORMAT_VERSION, **values, "files": files}, indent=1)
        write_atomically(folder / INFO_NAME, text.encode())
        sync_path(folder.parent)
        places = {path: place for path in folder.parent.iterdir() if path.is_dir() and (place := _place(path))}
        later = [path for path, place in places.items() if place > (info.step, info.update)]
        others = sorted(places.keys() - {folder, *later}, key=lambda path: places[path])
        for path in [*later, *others[: max(len(others) + 1 - self._keep, 0)]]:
            shutil.rmtree(path)


def _place(folder: Path) -> tuple[int, int] | None:
    """(step, update) of a batch's folder; None of another one."""
    match = _FOLDER.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def read_batch(folder: Path) -> SavedBatch:
    """Inverse of :meth:`BatchFiles.save`.

    Raises:
        ValueError: the folder holds no complete batch, or one of a newer version.
    """
    try:
        values: dict[str, Any] = json.loads((folder / INFO_NAME).read_text())
    except (OSError, ValueError) as error:
        kinds = "mismatch/step_N or nonfinite/step_N.update_K"
        raise ValueError(f"{folder} is no saved batch ({error}): give a folder {kinds} of a run directory") from error
    if (found := values.pop("format_version", None)) != FORMAT_VERSION:
        raise ValueError(f"{folder / INFO_NAME} has format_version {found}, this code reads {FORMAT_VERSION}")
    files, known = values.pop("files", None), set(BatchInfo.__dataclass_fields__)
    if files is None or set(values) != known:
        raise ValueError(f"{folder / INFO_NAME} lacks or adds fields of {', '.join(sorted(known))}: copy it anew")
    rows: list[BatchRow] = []
    for part in files:
        path = folder / part["name"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: the batch is not complete, copy it anew")
        records = decode_records(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))
        if len(records) != part["rows"]:
            raise ValueError(f"{path} has {len(records)} rows instead of {part['rows']}: copy it anew")
        rows += [_from_record(record) for record in records]
    rows.sort(key=lambda item: (item.replayed, row_key(item.row)))
    return SavedBatch(info=BatchInfo(**values), rows=rows, config_path=folder / CONFIG_NAME)


def _to_record(item: BatchRow) -> TensorRecord:
    record = row_to_record(item.row)
    tensors = {**record.tensors, "turns": turn_numbers(item.row.response_mask, item.row.first_turn).to(torch.int32)}
    if item.log_probs is not None:
        tensors["log_probs"] = item.log_probs
    return TensorRecord(tensors=tensors, fields={**record.fields, "replayed": item.replayed})


def _from_record(record: TensorRecord) -> BatchRow:
    # The turns follow from mask and first turn; they are in the file for other readers.
    own = {name: tensor for name, tensor in record.tensors.items() if name not in ("turns", "log_probs")}
    row = record_to_row(TensorRecord(tensors=own, fields=record.fields))
    return BatchRow(row=row, log_probs=record.tensors.get("log_probs"), replayed=record.fields["replayed"])
