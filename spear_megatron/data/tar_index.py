"""Tars of samples in webdataset's layout, and the index files (DALI's ``v1.2``) that say where their parts lie.

A sample is a run of members with one name before the first dot; what follows the dot tells the component. Components
are stored raw, so that any reader finds them by offset and size.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "v1.2"


@dataclass(frozen=True, slots=True)
class Member:
    """One component of a sample: ``offset`` and ``num_bytes`` of its content in the tar, ``name`` of the member."""

    component: str
    offset: int
    num_bytes: int
    name: str


TarSample = tuple[Member, ...]


def write_tar(path: Path, samples: Iterable[Mapping[str, bytes]]) -> list[TarSample]:
    """Write samples, each as contents by component, into a new tar; returns where everything lies."""
    written = []
    with tarfile.open(path, "x", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples):
            members = []
            for component, content in sample.items():
                info = tarfile.TarInfo(f"{number:09d}.{component}")
                info.size = len(content)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(content))
                members.append(Member(component, offset, len(content), info.name))
            written.append(tuple(members))
    return written


def write_index(path: Path, samples: Sequence[TarSample]) -> None:
    """Write an index; DALI's reader gives the samples in the order of its lines, and a sample may come twice."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(f"{VERSION} {len(samples)}\n")
        for sample in samples:
            parts = (f"{part.component} {part.offset} {part.num_bytes} {part.name}" for part in sample)
            stream.write(" ".join(parts) + "\n")


def read_index(path: Path, components: Sequence[str], tar_bytes: int) -> list[TarSample]:
    """The samples of an index, each with ``components`` in this order.

    Args:
        tar_bytes: size of the tar; nothing may lie beyond it.

    Raises:
        ValueError: the index is missing or damaged, or a sample lacks a component; names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write the corpus anew") from error
    if not lines or lines[0].split() != [VERSION, str(len(lines) - 1)]:
        raise ValueError(f"{path} is no complete {VERSION} index: write the corpus anew")
    samples = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        try:
            quads = [words[i : i + 4] for i in range(0, len(words), 4)]
            found = {kind: Member(kind, int(offset), int(size), name) for kind, offset, size, name in quads}
        except ValueError as error:
            raise ValueError(f"{path}:{number}: a line holds component, offset, size and name of each part") from error
        if any(part.offset < 0 or part.offset + part.num_bytes > tar_bytes for part in found.values()):
            raise ValueError(f"{path}:{number}: a part lies beyond the end of the tar: write the corpus anew")
        samples.append(_complete(found, components, f"{path}:{number}"))
    return samples


def scan_tar(path: Path, components: Sequence[str]) -> list[TarSample]:
    """The samples of a tar without an index, each with ``components`` in this order; others are passed over.

    Raises:
        ValueError: the tar is damaged, or a sample lacks a component; names the file and the sample.
    """
    groups: dict[str, dict[str, Member]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, component = base.partition(".")
                if info.offset_data + info.size > size:
                    raise ValueError(f"{path} is cut: {info.name} ends beyond it; copy it anew")
                member = Member(component, info.offset_data, info.size, info.name)
                groups.setdefault(f"{folder}/{stem}", {})[component] = member
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no intact tar ({error}): copy it anew") from error
    # A damaged header ends the iteration just as the end of the archive does.
    with open(path, "rb") as stream:
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is no intact tar: neither a member nor the end at byte {end}; copy it anew")
    if not groups:
        raise ValueError(f"{path} holds no samples")
    return [_complete(found, components, f"{path}: sample {name.strip('/')}") for name, found in groups.items()]


def _complete(found: Mapping[str, Member], components: Sequence[str], where: str) -> TarSample:
    missing = [name for name in components if name not in found]
    if missing:
        raise ValueError(
            f"{where} lacks the component {missing[0]!r} (it has {', '.join(found) or 'none'}): "
            f"every sample needs {', '.join(components)}"
        )
    return tuple(found[name] for name in components)
