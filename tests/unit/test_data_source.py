"""Every data source gives the same batches, covers every sample once an epoch, and resumes exactly or not at all."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from corpus_samples import all_forms, made_up, written

from spear_megatron.data.balance import assign
from spear_megatron.data.corpus import Corpus, MemoryCorpus
from spear_megatron.data.dali import has_dali, open_source, resolve
from spear_megatron.data.dali_source import DaliSource
from spear_megatron.data.data_source import Batch, DataSource, MappedSource, Reading
from spear_megatron.data.packing import packed_length
from spear_megatron.parallel.seeds import generator

SIZE, BATCH = 23, 6
EXAMPLES = made_up(SIZE)
READING = Reading(batch_size=BATCH, seed=3)
needs_dali = pytest.mark.skipif(not has_dali(), reason="NVIDIA DALI is not installed")
Make = Callable[[Corpus, Reading], DataSource]


def dali(corpus: Corpus, reading: Reading) -> DataSource:
    """Windows of five batches of 6, so that epochs, windows and batches end at different places."""
    return DaliSource(corpus, reading, window=30)


KINDS = [pytest.param(MappedSource, id="mmap"), pytest.param(dali, id="dali", marks=needs_dali)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return {"memory": MemoryCorpus(EXAMPLES), **all_forms(tmp_path_factory.mktemp("corpora"), EXAMPLES)}


@pytest.fixture
def opened() -> Iterator[Callable[[Make, Corpus, Reading], DataSource]]:
    sources: list[DataSource] = []

    def make(kind: Make, corpus: Corpus, reading: Reading) -> DataSource:
        sources.append(kind(corpus, reading))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def reference(position: int, reading: Reading) -> list[tuple[int, int]]:
    """(position, sample) of one shard's share, from the definition."""
    places = []
    for at in range(position, position + reading.batch_size):
        epoch, offset = divmod(at, SIZE)
        keyed = generator(reading.seed, "order/sft", epoch)
        places.append((at, int(torch.randperm(SIZE, generator=keyed)[offset])))
    costs = [packed_length(EXAMPLES[sample].loss_mask) for _, sample in places]
    owners = assign(costs, [0] * len(costs), reading.num_shards)
    return [place for place, owner in zip(places, owners, strict=True) if owner == reading.shard_id]


def assert_is(batch: Batch, expected: list[tuple[int, int]]) -> None:
    assert [(place.position, place.sample) for place in batch.places] == expected
    lengths = [len(EXAMPLES[sample].ids) for _, sample in expected]
    assert batch.lengths.tolist() == lengths and batch.lengths.dtype == torch.int64
    shape = (len(expected), max(lengths, default=0))
    ids, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    for row, (_, sample) in enumerate(expected):
        ids[row, : lengths[row]], mask[row, : lengths[row]] = EXAMPLES[sample].ids, EXAMPLES[sample].loss_mask
    assert batch.ids.dtype == torch.int32 and torch.equal(batch.ids, ids)
    assert batch.loss_mask.dtype == torch.bool and torch.equal(batch.loss_mask, mask)
    for example, (_, sample) in zip(batch.examples(), expected, strict=True):
        assert torch.equal(example.ids, EXAMPLES[sample].ids)


@pytest.mark.parametrize("form", ["memory", "packed", "numpy", "webdataset"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_definition_on_any_number_of_shards(
    kind: Make, form: str, corpora: dict[str, Corpus], opened: Callable[..., DataSource]
) -> None:
    for num_shards in (1, 2, 3, 8):  # 8 shards of 6 samples: some have none
        for shard_id in {0, num_shards // 2, num_shards - 1}:
            reading = Reading(batch_size=BATCH, seed=3, shard_id=shard_id, num_shards=num_shards)
            source = opened(kind, corpora[form], reading)
            batches = []
            for number in range(9):  # beyond two epochs and one window
                assert source.epoch == BATCH * number // SIZE
                batches.append(source.next_batch())
            for number, batch in enumerate(batches):  # no later batch has overwritten an earlier one
                assert_is(batch, reference(BATCH * number, reading))


def test_in_order_without_shuffling(corpora: dict[str, Corpus], opened: Callable[..., DataSource]) -> None:
    source = opened(MappedSource, corpora["packed"], dataclasses.replace(READING, shuffle=False))
    samples = [place.sample for _ in range(8) for place in source.next_batch().places]
    assert samples == [*range(SIZE)] * 2 + [0, 1]


def covered(sources: list[DataSource], batches: int) -> Counter[int]:
    """How often each position was given by any shard."""
    return Counter(place.position for _ in range(batches) for source in sources for place in source.next_batch().places)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("before", "after", "batch_after", "batches"),
    [(1, 2, BATCH, 2), (4, 3, BATCH, 5), (2, 2, BATCH, 4), (3, 1, 4, 1), (2, 4, 9, 0)],
)
def test_resumed_on_other_shards_every_sample_is_covered_once(
    kind: Make,
    before: int,
    after: int,
    batch_after: int,
    batches: int,
    corpora: dict[str, Corpus],
    opened: Callable[..., DataSource],
) -> None:
    def shards(count: int, batch_size: int, form: str) -> list[DataSource]:
        readings = [Reading(batch_size=batch_size, seed=3, shard_id=i, num_shards=count) for i in range(count)]
        return [opened(kind, corpora[form], reading) for reading in readings]

    first = shards(before, BATCH, "webdataset")
    seen = covered(first, batches)
    states = [source.state_dict() for source in first]
    assert all(state == states[0] for state in states)
    continued = shards(after, batch_after, "numpy")  # the same corpus in another form
    for source in continued:
        covered([source], 3)  # what was read before must leave no trace
        source.load_state_dict(states[0])
    rest = -(-(2 * SIZE - batches * BATCH) // batch_after)
    seen += covered(continued, rest)
    assert seen == Counter(range(batches * BATCH + rest * batch_after))
    whole = opened(MappedSource, corpora["memory"], Reading(batch_size=len(seen), seed=3))
    order = [place.sample for place in whole.next_batch().places]
    assert sorted(order[:SIZE]) == sorted(order[SIZE : 2 * SIZE]) == list(range(SIZE))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_an_epoch_the_next_batches_are_equal(
    kind: Make, corpora: dict[str, Corpus], opened: Callable[..., DataSource]
) -> None:
    reading = Reading(batch_size=BATCH, seed=3, shard_id=1, num_shards=2)
    source = opened(kind, corpora["numpy"], reading)
    for number in range(6):
        state = source.state_dict()
        resumed = opened(kind, corpora["numpy"], reading)
        resumed.load_state_dict(state)
        one, other = source.next_batch(), resumed.next_batch()
        assert one.places == other.places and torch.equal(one.ids, other.ids), number


def test_another_corpus_seed_or_order_is_refused(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    state = MappedSource(corpora["packed"], READING).state_dict()
    changed = [*EXAMPLES[:-1], dataclasses.replace(EXAMPLES[-1], ids=EXAMPLES[-1].ids + 1)]
    other = written(tmp_path, changed, "packed")
    for source, key in (
        (MappedSource(other, READING), f"{other.folder}: corpus was .* changed since"),
        (MappedSource(MemoryCorpus(EXAMPLES[:-1]), READING), "size was 23 and is 22"),
        (MappedSource(corpora["packed"], dataclasses.replace(READING, seed=4)), "seed was 3 and is 4"),
        (MappedSource(corpora["packed"], dataclasses.replace(READING, shuffle=False)), "shuffle was True"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume on .*{key}"):
            source.load_state_dict(state)
        assert source.position == 0
    source = MappedSource(corpora["packed"], READING)
    with pytest.raises(ValueError, match="lacks num_shards"):
        source.load_state_dict({key: value for key, value in state.items() if key != "num_shards"})
    with pytest.raises(ValueError, match="position"):
        source.load_state_dict({**state, "position": -1})


def test_a_shard_that_does_not_exist_is_refused() -> None:
    for wrong in ({"shard_id": 2, "num_shards": 2}, {"shard_id": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="shard .* of|at least one sample"):
            Reading(**{"batch_size": 4, "seed": 0, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "form"), [("changed", "packed"), ("changed", "numpy"), ("changed", "webdataset"), ("gone", "numpy")]
)
def test_damage_under_an_open_source_is_named(
    kind: Make, damage: str, form: str, tmp_path: Path, opened: Callable[..., DataSource]
) -> None:
    corpus = written(tmp_path, EXAMPLES, form)
    name = {"packed": "ids.bin", "numpy": "samples/000000/000000007.ids.npy", "webdataset": "corpus.tar"}[form]
    path = corpus.folder / name
    if damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        at = corpus.samples[7][0].offset if form == "webdataset" else len(data) - 1  # type: ignore[attr-defined]
        data[at] ^= 1
        path.write_bytes(data)
    source = opened(kind, corpus, READING)
    with pytest.raises(ValueError, match=rf"{path.name}.*: sample (7|22)"):
        for _ in range(4):
            source.next_batch()


def test_auto_takes_dali_where_it_is_faster(corpora: dict[str, Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    with_dali = {"memory": "mmap", "packed": "mmap", "numpy": "dali", "webdataset": "mmap"}
    for present in (True, False):
        monkeypatch.setattr("spear_megatron.data.dali.has_dali", lambda present=present: present)
        for form, expected in with_dali.items():
            assert resolve("auto", corpora[form]) == (expected if present else "mmap")
            assert resolve("dali", corpora[form]) == "dali" and resolve("mmap", corpora[form]) == "mmap"


def test_without_dali_one_error_names_the_extra(corpora: dict[str, Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"sft.data_source=dali needs .*spear-megatron\[dali\].*cuda120.*=mmap"):
        open_source("dali", corpora["packed"], READING)
    open_source("mmap", corpora["packed"], READING).close()
