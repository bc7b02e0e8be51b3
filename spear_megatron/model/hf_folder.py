"""A folder in Hugging Face format: its safetensors files checked against the model's shape, and read in parts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.paths import check_input_folder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_POINTER = b"version https://git-lfs"
_DTYPES = ("F32", "BF16", "F16")


class HFWeights:
    """Open safetensors files of one model folder. Use as a context manager; reads map the files, they copy nothing.

    ``files`` maps a tensor's name to its file.
    """

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self.folder = folder
        self.files = files
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, shape: ModelShape) -> HFWeights:
        """Find and check the weights of ``folder``; only headers are read.

        A tied model may bring a redundant ``lm_head.weight``, which is ignored.

        Raises:
            ValueError: no weights, a damaged file, or a missing, unknown or misshapen tensor; names tensor and file.
            OSError: a file cannot be read.
        """
        folder = Path(folder)
        headers = {file: _read_header(file) for file in _weight_files(folder)}
        files: dict[str, Path] = {}
        for file, header in headers.items():
            for name in header:
                if name in files:
                    raise ValueError(f"tensor {name} is both in {files[name]} and in {file.name}: remove one")
                files[name] = file
        _check_tensors(folder, shape, files, headers)
        return cls(folder, files)

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> torch.Tensor:
        """``length`` rows (``dim`` 0) or columns (1) of a tensor from ``start``, in the file's dtype."""
        from safetensors import safe_open

        file = self.files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        part = self._open[file].get_slice(name)
        stop = None if length is None else start + length
        return part[start:stop] if dim == 0 else part[:, start:stop]


def _weight_files(folder: Path) -> list[Path]:
    check_input_folder(folder, "give a model folder in Hugging Face format")
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index.exists():
        if single.exists():
            return [single]
        raise ValueError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: save the model as safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} must be a JSON object with a weight_map of tensor names to file names") from None
    for name in names:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise ValueError(f"{index} names the file {name}, which is missing in {folder}")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, dtype name)."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:  # the library tells a file without permission as a missing one
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: fetch them with 'git lfs pull'")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}; copy it anew") from None


def _check_tensors(
    folder: Path,
    shape: ModelShape,
    files: dict[str, Path],
    headers: dict[Path, dict[str, tuple[tuple[int, ...], str]]],
) -> None:
    expected = shape.parameter_shapes()
    missing = [name for name in expected if name not in files]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}, which config.json asks for")
    allowed = dict(expected)
    if shape.tie_word_embeddings:
        allowed["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    unknown = [name for name in files if name not in allowed]
    if unknown:
        raise ValueError(f"{files[unknown[0]]} holds {_some(unknown)}, unknown to a {shape.architecture} model")
    for name, wanted in allowed.items():
        if name not in files:
            continue
        found, dtype = headers[files[name]][name]
        if found != wanted:
            raise ValueError(
                f"tensor {name} in {files[name]} has shape {list(found)}, but config.json asks for {list(wanted)}"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"tensor {name} in {files[name]} has dtype {dtype}, only {', '.join(_DTYPES)} are read")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"
