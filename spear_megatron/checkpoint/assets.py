"""The files of a Hugging Face model folder that are not weights: configs, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

from spear_megatron.data.files import FileEntry, FileSystem

FOLDER = "hf"
TEMPLATE_FOLDER = "additional_chat_templates"
_WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".checksums.json",
)  # fmt: skip


def asset_files(folder: Path) -> list[Path]:
    """Files of ``folder`` that are not weights, those of its template sub-folder included, by name.

    Raises:
        ValueError: the folder has no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    candidates = [*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]
    return sorted(
        path
        for path in candidates
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_SUFFIXES)
    )


def copy_assets(source: Path, target: Path, files: FileSystem) -> list[FileEntry]:
    """Copy the asset files into ``target`` (an existing folder) byte for byte; returns their entries under ``hf/``."""
    entries = []
    for path in asset_files(source):
        name = path.relative_to(source)
        if name.parent != Path() and not (target / name.parent).exists():
            files.mkdir(target / name.parent)
        entries.append(files.write(target / name, path.read_bytes(), f"{FOLDER}/{name}"))
    return entries
