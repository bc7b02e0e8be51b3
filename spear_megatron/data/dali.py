"""NVIDIA DALI where it is installed, and which implementation of the data source to use."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from spear_megatron.data.corpus import Corpus
from spear_megatron.data.data_source import DataSource, MappedSource, Reading

SOURCES = ("auto", "mmap", "dali")


def dali_modules() -> tuple[ModuleType, Any, Any]:
    """(nvidia.dali, its functions, its types).

    Raises:
        ValueError: it is not installed or cannot be loaded; names the extra.
    """
    try:
        names = ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types")
        dali, fn, types = (importlib.import_module(name) for name in names)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"sft.data_source=dali needs NVIDIA DALI ({error}): pip install 'spear-megatron[dali]' (CUDA 13, also "
            "without a GPU; on a CUDA 12 cluster pip install nvidia-dali-cuda120), or set sft.data_source=mmap"
        ) from error
    return dali, fn, types


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def resolve(kind: str, corpus: Corpus) -> str:
    """mmap or dali: what ``auto`` stands for is DALI, if it is installed, for single ``.npy`` files.

    There it is faster, and on one mapped file or tar it is not (tools/bench_data.py); all give the same batches.
    """
    if kind != "auto":
        return kind
    return "dali" if corpus.form == "numpy" and has_dali() else "mmap"


def open_source(kind: str, corpus: Corpus, reading: Reading) -> DataSource:
    """The data source ``kind`` (auto, mmap or dali) over a corpus, with samples in the host's memory.

    Raises:
        ValueError: DALI is asked for and is not installed.
    """
    if resolve(kind, corpus) == "mmap":
        return MappedSource(corpus, reading)
    from spear_megatron.data.dali_source import DaliSource

    return DaliSource(corpus, reading)
