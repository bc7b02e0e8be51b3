"""The files of a Hugging Face model folder that are not weights: config, tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path

from spear_megatron.checkpoint.files import FileEntry, FileSystem

FOLDER = "hf"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def asset_files(folder: Path) -> list[Path]:
    """Regular files directly inside ``folder`` that are not weights, by name.

    Raises:
        ValueError: the folder has no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_SUFFIXES)
    )


def copy_assets(source: Path, target: Path, files: FileSystem) -> list[FileEntry]:
    """Copy the asset files into ``target`` (an existing folder) byte for byte; returns their entries under ``hf/``."""
    return [files.write(target / path.name, path.read_bytes(), f"{FOLDER}/{path.name}") for path in asset_files(source)]
