"""Corpora come back as they were written, in formats that others read, and every damage is found and named."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_samples import all_forms, made_up, written

from spear_megatron.data.corpus import CHECKSUM, LENGTH, PACKED, MemoryCorpus, examples_of
from spear_megatron.data.corpus_files import FORMS, TarCorpus, open_corpus
from spear_megatron.data.corpus_write import write_corpus
from spear_megatron.data.packing import packed_length
from spear_megatron.data.sft import SftExample
from spear_megatron.data.tar_index import read_index, scan_tar, write_index, write_tar

EXAMPLES = made_up(7)


@pytest.mark.parametrize("form", FORMS)
def test_samples_come_back(form: str, tmp_path: Path) -> None:
    corpus = written(tmp_path, EXAMPLES, form)
    memory = MemoryCorpus(EXAMPLES)
    assert corpus.identity() == memory.identity() and np.array_equal(corpus.table, memory.table)
    assert corpus.info.num_tokens == sum(len(example.ids) for example in EXAMPLES)
    assert corpus.table[:, LENGTH].tolist() == [len(example.ids) for example in EXAMPLES]
    assert corpus.table[:, PACKED].tolist() == [packed_length(example.loss_mask) for example in EXAMPLES]
    for example, found in zip(EXAMPLES, examples_of(corpus), strict=True):
        assert torch.equal(example.ids, found.ids) and torch.equal(example.loss_mask, found.loss_mask)
        assert found.ids.dtype == torch.int32 and found.loss_mask.dtype == torch.bool
    changed = [*EXAMPLES[:-1], dataclasses.replace(EXAMPLES[-1], ids=EXAMPLES[-1].ids + 1)]
    assert MemoryCorpus(changed).identity() != memory.identity()
    assert MemoryCorpus(EXAMPLES[::-1]).identity() != memory.identity()


def test_other_readers_read_the_files(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    all_forms(tmp_path, EXAMPLES)
    packed = IndexedDataset(str(tmp_path / "packed" / "ids"))
    assert [packed[i].tolist() for i in range(7)] == [example.ids.tolist() for example in EXAMPLES]
    with tarfile.open(tmp_path / "webdataset" / "corpus.tar") as tar:
        masks = [tar.extractfile(info) for info in tar if info.name.endswith(".loss_mask")]
        found = [np.frombuffer(part.read(), np.uint8).tolist() for part in masks if part is not None]
    assert found == [example.loss_mask.int().tolist() for example in EXAMPLES]
    single = np.load(tmp_path / "numpy" / "samples" / "000000" / "000000003.ids.npy")
    assert single.tolist() == EXAMPLES[3].ids.tolist()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DATA_FILES = {
    "packed": ("ids.bin", "loss_mask.bin"),
    "numpy": ("samples/000000/000000002.ids.npy", "samples/000000/000000002.loss_mask.npy"),
    "webdataset": ("corpus.tar",),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_byte_of_any_sample_is_found_and_the_file_named(form: str, tmp_path: Path) -> None:
    for name in DATA_FILES[form]:
        corpus = written(tmp_path / Path(name).name, EXAMPLES, form)
        flip(corpus.folder / name, corpus.samples[2][1].offset if isinstance(corpus, TarCorpus) else -1)
        with pytest.raises(ValueError, match=r"(corpus.tar|loss_mask.bin|loss_mask.npy): sample \d: the checksum"):
            list(examples_of(open_corpus(corpus.folder)))


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_or_missing_file_is_refused_by_name(form: str, tmp_path: Path) -> None:
    corpus = written(tmp_path, EXAMPLES, form)
    for name in DATA_FILES[form]:
        path = corpus.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path.name}.*(has|cannot be read)"):
            list(examples_of(open_corpus(corpus.folder)))
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}.*(is missing|cannot be read)"):
            list(examples_of(open_corpus(corpus.folder)))
        path.write_bytes(whole)
    assert len(list(examples_of(open_corpus(corpus.folder)))) == 7


def test_a_changed_table_or_description_is_refused(tmp_path: Path) -> None:
    corpus = written(tmp_path, EXAMPLES, "packed")
    flip(corpus.folder / "samples.npy", -1)
    with pytest.raises(ValueError, match="samples.npy was changed"):
        open_corpus(corpus.folder)
    path = corpus.folder / "corpus.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version"):
        open_corpus(corpus.folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no corpus"):
        open_corpus(corpus.folder)


def test_what_cannot_be_trained_on_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    ids, mask = torch.arange(3, dtype=torch.int32), torch.tensor([False, True, True])
    for bad, message in (
        (SftExample(ids, mask[:2]), "one mask value per token"),
        (SftExample(ids, ~mask), "at least one prompt token"),
        (SftExample(ids[:0], mask[:0]), "one mask value per token"),
    ):
        for form in FORMS:
            with pytest.raises(ValueError, match=f"sample 1: .*{message}"):
                written(tmp_path, [SftExample(ids, mask), bad], form)
    with pytest.raises(ValueError, match="holds no samples"):
        written(tmp_path, [], "numpy")
    assert list(tmp_path.iterdir()) == []
    written(tmp_path, EXAMPLES, "packed")
    with pytest.raises(ValueError, match="exists"):
        written(tmp_path, EXAMPLES, "packed")
    with pytest.raises(ValueError, match="of the form packed, numpy"):
        write_corpus(tmp_path / "x", EXAMPLES, form="zip", source="", vocabulary_sha256="")


PAIRS = [{"ids": bytes([i] * 4), "loss_mask": bytes([1])} for i in range(3)]


def test_a_tar_is_indexed_by_its_headers_as_by_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    members = write_tar(path, PAIRS)
    assert scan_tar(path, ("ids", "loss_mask")) == members
    write_index(tmp_path / "x.idx", members)
    assert read_index(tmp_path / "x.idx", ("ids", "loss_mask"), path.stat().st_size) == members


@pytest.mark.parametrize("damage", ["cut", "no end", "header", "first header", "component", "empty"])
def test_a_damaged_tar_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    samples = PAIRS[:-1] + [{"ids": b"1234"}] if damage == "component" else PAIRS
    members = write_tar(path, samples if damage != "empty" else [])
    whole = path.read_bytes()
    last = members[-1][-1].offset if members else 0
    if damage in ("cut", "no end"):
        path.write_bytes(whole[: last if damage == "cut" else last + 512])
    elif damage == "header":
        path.write_bytes(whole[: last - 512] + b"\xff" * 512 + whole[last:])
    elif damage == "first header":
        path.write_bytes(b"\xff" * 512 + whole[512:])
    message = "lacks the component 'loss_mask'" if damage == "component" else "x.tar (is|holds)"
    with pytest.raises(ValueError, match=message):
        scan_tar(path, ("ids", "loss_mask"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v1.2 2\nids 512 4 0.ids loss_mask 1536 1 0.loss_mask\n", "no complete"),
        ("v1.1 0\n", "no complete"),
        ("", "no complete"),
        ("v1.2 1\nids 512 4 0.ids\n", "x.idx:2 lacks the component 'loss_mask'"),
        ("v1.2 1\nids x 4 0.ids loss_mask 1536 1 0.loss_mask\n", "x.idx:2: a line holds"),
        ("v1.2 1\nids 512 4 0.ids loss_mask\n", "x.idx:2: a line holds"),
        ("v1.2 1\nids 512 4 0.ids loss_mask 9999999 1 0.loss_mask\n", "x.idx:2: a part lies beyond"),
    ],
)
def test_a_damaged_index_is_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "x.idx", ("ids", "loss_mask"), 4096)


def test_an_index_that_disagrees_with_the_table_is_refused(tmp_path: Path) -> None:
    corpus = written(tmp_path, EXAMPLES, "webdataset")
    path = corpus.folder / "corpus.idx"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:], lines[1]]) + "\n")  # same size, another order
    with pytest.raises(ValueError, match=r"corpus.idx: sample \d has another length"):
        open_corpus(corpus.folder)


def test_checksums_tell_samples_apart() -> None:
    table = MemoryCorpus(made_up(200)).table
    assert len(set(table[:, CHECKSUM].tolist())) == 200
