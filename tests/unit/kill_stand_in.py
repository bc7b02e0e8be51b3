"""A stand-in for training: state in the checkpoint file layer, a record, an export."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from spear_megatron.data.files import FileSystem
from spear_megatron.checkpoint.manifest import JSON, Manifest, StateEntry
from spear_megatron.checkpoint.store import CheckpointStore

NUM_STEPS = 8


class SlowFiles(FileSystem):
    """Takes its time, so that kills fall into saves."""

    def sync_folder(self, path: Path) -> None:
        time.sleep(0.03)
        super().sync_folder(path)


def main(run_dir: Path, *, forgetful: bool) -> None:
    """Hash-chain "weights" over the steps. ``forgetful``: the state is not restored, an error the test must find."""
    store = CheckpointStore(run_dir / "checkpoints", SlowFiles())
    store.clean()
    step, weights = 0, "start"
    good = [candidate for candidate in store.steps() if not store.problems(candidate, ("model",))]
    if good:
        step = good[-1]
        weights = json.loads((store.path(step) / "model.json").read_text())
    if forgetful and step:
        weights = "forgotten"
    record = run_dir / "metrics.jsonl"
    lines = record.read_text().splitlines(keepends=True)[:step] if record.exists() else []
    record.write_text("".join(lines))
    with open(record, "a") as stream:
        for number in range(step + 1, NUM_STEPS + 1):
            weights = hashlib.sha256(f"{weights}{number}".encode()).hexdigest()
            time.sleep(0.03)
            loss = int(weights[:8], 16) / 7
            line = {"step": number, "unix_time": time.time(), "timing_s/step": time.time(), "loss": loss}
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            staging = store.begin(number)
            entry = store.files.write(staging / "model.json", json.dumps(weights).encode(), "model.json")
            states = {"model": StateEntry(JSON, "model.json")}
            store.commit(
                number, Manifest(step=number, fingerprint="", layout={}, software={}, states=states, files=(entry,))
            )
            store.keep_last(2)
    (run_dir / "hf").mkdir(exist_ok=True)
    (run_dir / "hf" / "weights").write_text(weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), forgetful="--forgetful" in sys.argv)
