"""Samples per second of the data sources, all reading the same samples in the same order in one run.

    python tools/bench_data.py                   # 4000 sequences of 64-2048 tokens, batches of 32
    python tools/bench_data.py --quick           # small sizes, to see that it runs
    python tools/bench_data.py --json FILE       # write the figures, with facts of the machine

Every contender reads one epoch of a corpus on disk as padded batches: memory mapping over each of the three forms, and
DALI with its own reader of `.npy` files, its own reader of tars, and a callback that reads the mapped file. Rounds of
the contenders are interleaved, and medians compared; the first round, which fills the page cache, is not counted. A
checksum over everything that was read must be the same for all, and is printed. `wait` is how long a trainer waits for
a batch, in milliseconds, when it spends 20 ms on each on a device of its own: what was read ahead meanwhile is free.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_common import write_report  # noqa: E402

from spear_megatron.data.corpus_files import FORMS, open_corpus  # noqa: E402
from spear_megatron.data.corpus_write import write_corpus  # noqa: E402
from spear_megatron.data.dali import has_dali  # noqa: E402
from spear_megatron.data.dali_source import DaliSource  # noqa: E402
from spear_megatron.data.data_source import DataSource, MappedSource, Reading  # noqa: E402
from spear_megatron.data.sft import SftExample  # noqa: E402

NAMES = {"packed": "packed .bin/.idx", "numpy": ".npy files", "webdataset": "tar"}
STEP_S, WAITS = 0.02, 16
Contender = Callable[[], DataSource]


def make_examples(count: int, longest: int) -> list[SftExample]:
    """Made-up conversations of 64 to ``longest`` tokens."""
    random = np.random.default_rng(0)
    examples = []
    for length in random.integers(64, longest + 1, count):
        mask = torch.from_numpy(random.integers(0, 2, length).astype(np.bool_))
        mask[0] = False
        examples.append(SftExample(torch.from_numpy(random.integers(0, 150_000, length).astype(np.int32)), mask))
    return examples


def contenders(folder: Path, reading: Reading, threads: int) -> dict[str, Contender]:
    """How every contender is opened, by name."""

    def mapped(form: str) -> DataSource:
        return MappedSource(open_corpus(folder / form), reading)

    def dali(form: str) -> DataSource:
        return DaliSource(open_corpus(folder / form), reading, num_threads=threads)

    found = {f"mmap, {NAMES[form]}": functools.partial(mapped, form) for form in FORMS}
    if has_dali():
        how = {form: "callback" if form == "packed" else "own reader" for form in FORMS}
        found |= {f"DALI {how[form]}, {NAMES[form]}": functools.partial(dali, form) for form in FORMS}
    return found


def read_epoch(source: DataSource, batches: int) -> float:
    """Seconds for one epoch, the building of pipelines included."""
    begin = time.perf_counter()
    for _ in range(batches):
        source.next_batch()
    return time.perf_counter() - begin


def waiting(source: DataSource, batches: int) -> list[float]:
    """Milliseconds that each batch takes to come, with pauses in between; the first, which builds a pipeline, apart."""
    waits = []
    for _ in range(batches + 1):
        begin = time.perf_counter()
        source.next_batch()
        waits.append(1e3 * (time.perf_counter() - begin))
        time.sleep(STEP_S)
    return waits[1:]


def checksum(source: DataSource, batches: int) -> str:
    """Of every batch's samples, lengths and padded components."""
    digest = hashlib.sha256()
    for _ in range(batches):
        batch = source.next_batch()
        digest.update(repr(batch.places).encode())
        for part in (batch.ids, batch.loss_mask, batch.lengths):
            digest.update(np.ascontiguousarray(part.numpy()).data)
    return digest.hexdigest()[:16]


def main() -> int:
    """Write the corpora, read them in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a DALI pipeline (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    count, longest, batch_size = (64, 128, 8) if args.quick else (4000, 2048, 32)
    rounds = 2 if args.quick else args.rounds
    torch.set_num_threads(1)
    reading = Reading(batch_size=batch_size, seed=0)
    with tempfile.TemporaryDirectory(prefix="bench_data_") as temporary:
        folder = Path(temporary)
        examples = make_examples(count, longest)
        for form in FORMS:
            write_corpus(folder / form, examples, form=form, source="made up", vocabulary_sha256="")
        results = measure(contenders(folder, reading, args.threads), count // batch_size, batch_size, rounds)
    first = next(iter(results.values()))
    print(f"\n{count} sequences of 64-{longest} tokens, batches of {batch_size}, median of {rounds} rounds")
    print(f"{'source':32} {'samples/s':>10} {'least':>9} {'most':>9} {'ratio':>7} {'wait':>7}  checksum")
    for name, row in results.items():
        ratio = row["median"] / first["median"]
        figures = f"{row['median']:10.0f} {row['least']:9.0f} {row['most']:9.0f} {ratio:7.2f} {row['wait_ms']:7.2f}"
        print(f"{name:32} {figures}  {row['checksum']}")
    equal = len({row["checksum"] for row in results.values()}) == 1
    print("all read the same" if equal else "THE CHECKSUMS DIFFER")
    if args.json is not None:
        write_report(args.json, results, sequences=count, longest=longest, batch_size=batch_size, rounds=rounds)
    return int(not equal)


def measure(found: dict[str, Contender], batches: int, batch_size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Samples per second and checksum of every contender; each round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    waits: dict[str, list[float]] = {name: [] for name in found}
    sums = {}
    for name, contender in found.items():
        source = contender()
        sums[name] = checksum(source, batches)
        source.close()
        print(f"read once: {name}", flush=True)
    names = list(found)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            source = found[name]()
            seconds[name].append(read_epoch(source, batches))
            waits[name] += waiting(source, min(WAITS, batches))
            source.close()
        print(f"round {number + 1} of {rounds}", flush=True)
    results = {}
    for name, values in seconds.items():
        rates = [batches * batch_size / value for value in values]
        figures = {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
        results[name] = {**figures, "wait_ms": statistics.median(waits[name]), "checksum": sums[name]}
    return results


if __name__ == "__main__":
    raise SystemExit(main())
