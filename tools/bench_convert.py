"""Generate a checkpoint, convert it both ways, compare every tensor, and measure time and anonymous memory.

    python tools/bench_convert.py                              # 4 GB, one and two ranks
    python tools/bench_convert.py --gigabytes 0.02 --ranks 1 --kill

Memory is sampled from /proc of every process of a conversion: ``RssAnon`` is what the process itself holds; the peak of
the resident set also counts pages of mapped files, which the system takes back whenever it likes. ``--kill`` ends the
first conversion with SIGKILL in the middle of a file, once one is finished, and starts the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SAMPLE_S = 0.02
TIMEOUT_S = 3600.0
# Smallest size in bytes -> dimensions: of Qwen3-1.7B, of Qwen3-0.6B with a small vocabulary, of a tiny model.
_DIMENSIONS = {
    10**9: dict(hidden_size=2048, heads=16, groups=8, head_dim=128, intermediate_size=6144, vocab_size=151936),
    10**8: dict(hidden_size=1024, heads=16, groups=8, head_dim=128, intermediate_size=3072, vocab_size=32000),
    0: dict(hidden_size=256, heads=8, groups=4, head_dim=32, intermediate_size=768, vocab_size=4001),
}


@dataclass
class Measured:
    """One conversion: wall time, and the largest peaks among its processes in bytes."""

    what: str
    ranks: int
    seconds: float
    gigabytes_per_s: float
    peak_anonymous: int
    peak_resident: int
    told: list[str]


class MemoryWatch:
    """Samples the memory of a process and of all its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_anonymous = 0
        self.peak_resident = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        known = {self._pid: psutil.Process(self._pid)}
        while not self._over.wait(SAMPLE_S):
            try:
                known |= {child.pid: child for child in known[self._pid].children(recursive=True)}
            except psutil.NoSuchProcess:
                return
            for pid in known:
                anonymous, peak = memory(pid)
                self.peak_anonymous = max(self.peak_anonymous, anonymous)
                self.peak_resident = max(self.peak_resident, peak)


def memory(pid: int) -> tuple[int, int]:
    """(RssAnon, VmHWM) in bytes; zeros when the process is gone."""
    from spear_megatron.device.host_memory import status_bytes

    try:
        return status_bytes("RssAnon", pid), status_bytes("VmHWM", pid)
    except OSError:
        return 0, 0


def generate(folder: Path, num_bytes: int, shard_bytes: int, seed: int = 0) -> int:
    """Write a random bfloat16 Qwen3 of about ``num_bytes``, sharded, with an index; returns the weights' bytes."""
    import torch

    from spear_megatron.checkpoint.conversion.tensors import pieces, raw_bytes
    from spear_megatron.checkpoint.conversion.to_hf import header, plan_files
    from spear_megatron.model.hf_export import write_index
    from spear_megatron.model.shape import ModelShape

    folder.mkdir(parents=True)
    config = _config(num_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}\n')
    shape = ModelShape.from_hf_config(config)
    shapes, generator = shape.parameter_shapes(), torch.Generator().manual_seed(seed)
    weight_map = {}
    for file in plan_files(shape, torch.bfloat16, shard_bytes):
        weight_map.update(dict.fromkeys(file.names, file.path))
        with open(folder / file.path, "wb") as stream:
            stream.write(header({name: shapes[name] for name in file.names}, torch.bfloat16))
            for name in file.names:
                for _, rows in pieces(shapes[name][0], prod(shapes[name][1:]) * 4):
                    part = torch.randn(rows, *shapes[name][1:], generator=generator).mul_(0.02).bfloat16()
                    stream.write(raw_bytes(part))
    total = shape.num_parameters() * 2
    if len(set(weight_map.values())) > 1:
        write_index(folder, weight_map, total)
    return total


def _config(num_bytes: int) -> dict[str, object]:
    size = next(size for size in _DIMENSIONS if num_bytes >= size)
    dims = _DIMENSIONS[size]
    hidden, head_dim = dims["hidden_size"], dims["head_dim"]
    layer = hidden * (2 * (dims["heads"] + dims["groups"]) * head_dim + 3 * dims["intermediate_size"])
    layers = max(2, round((num_bytes / 2 - dims["vocab_size"] * hidden) / layer))
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": dims["heads"],
        "num_key_value_heads": dims["groups"],
        "head_dim": head_dim,
        "intermediate_size": dims["intermediate_size"],
        "vocab_size": dims["vocab_size"],
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def convert(what: str, ranks: int, arguments: Sequence[str], num_bytes: int, kill_in: Path | None = None) -> Measured:
    """Run one conversion and watch it; with ``kill_in``, its working folder, kill it on the way.

    ``num_bytes`` are those it moves, 0 if that is not the whole model.

    Raises:
        RuntimeError: it failed; carries what it said.
    """
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *arguments]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [command[0], *launcher, *command[1:]]
    start = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    with MemoryWatch(process.pid) as watch:
        if kill_in is not None:
            _kill_on_the_way(process, kill_in)
        told = process.communicate(timeout=TIMEOUT_S)[0]
    seconds = time.monotonic() - start
    if process.returncode and kill_in is None:
        raise RuntimeError(f"{' '.join(command)} failed: {told}")
    rate = num_bytes / 1e9 / seconds
    return Measured(what, ranks, seconds, rate, watch.peak_anonymous, watch.peak_resident, told.strip().splitlines())


def _kill_on_the_way(process: subprocess.Popen[str], folder: Path) -> None:
    while process.poll() is None:
        written = sum(path.stat().st_size for path in (folder / "out").rglob("*.distcp")) if folder.exists() else 0
        if written and len(list((folder / "files").glob("*.json"))) >= 1:
            os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(SAMPLE_S)


def equal_tensors(first: Path, second: Path) -> int:
    """Compare all tensors of two folders bit by bit through safetensors' own reader; returns their number.

    Raises:
        ValueError: names the first that differs.
    """
    import torch
    from safetensors import safe_open

    def opened(folder: Path) -> dict[str, object]:
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118

    ours, theirs = opened(first), opened(second)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{first} and {second} have different tensors")
    for name, part in ours.items():
        other = theirs[name]
        for start in range(0, part.get_shape()[0], 4096):  # type: ignore[attr-defined]
            a, b = part[start : start + 4096], other[start : start + 4096]  # type: ignore[index]
            if a.dtype != b.dtype or not torch.equal(a.view(torch.int16), b.view(torch.int16)):
                raise ValueError(f"tensor {name} differs")
    return len(ours)


def measure(work: Path, num_bytes: int, ranks: Sequence[int], shard_size: str, kill: bool) -> list[Measured]:
    """Generate in ``work``, convert both ways on every number of ranks, compare; the measurements in order.

    Raises:
        RuntimeError, ValueError: a conversion failed, or a tensor differs.
    """
    from spear_megatron.cli.convert import parse_size

    total = generate(work / "hf", num_bytes, parse_size(shard_size))
    size = ["--shard-size", shard_size]
    results = []
    for count in ranks:
        mcore, back = work / f"mcore_{count}", work / f"back_{count}"
        there = ["hf-to-mcore", "--hf", str(work / "hf"), "--out", str(mcore), *size]
        if kill and count == ranks[0]:
            working = mcore.with_name(f".{mcore.name}.converting")
            results.append(convert("hf-to-mcore, killed", count, there, 0, kill_in=working))
            results.append(convert("hf-to-mcore, resumed", count, there, 0))
        else:
            results.append(convert("hf-to-mcore", count, there, total))
        results.append(
            convert("mcore-to-hf", count, ["mcore-to-hf", "--mcore", str(mcore), "--out", str(back), *size], total)
        )
        results.append(
            convert("verify", count, ["verify", "--hf", str(work / "hf"), "--mcore", str(mcore)], 2 * total)
        )
        print(f"{count} rank{'s' if count > 1 else ''}: {equal_tensors(work / 'hf', back)} tensors equal bit by bit")
        for folder in (mcore, back):
            shutil.rmtree(folder)
    return results


def main() -> int:
    """Measure and print the table."""
    from bench_common import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--kill", action="store_true", help="kill the first conversion and start it again")
    parser.add_argument("--work", type=Path, help="folder for three copies of the model (default: temporary)")
    parser.add_argument("--report", type=Path, help="write the measurements as JSON")
    args = parser.parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        results = measure(Path(folder), int(args.gigabytes * 1e9), args.ranks, args.shard_size, args.kill)
    print(f"\n{machine()}\n{'conversion':22}{'ranks':>6}{'s':>8}{'GB/s':>7}{'anonymous MB':>14}{'resident MB':>13}")
    for row in results:
        rate = f"{row.gigabytes_per_s:.2f}" if row.gigabytes_per_s else "-"
        print(
            f"{row.what:22}{row.ranks:6}{row.seconds:8.1f}{rate:>7}"
            f"{row.peak_anonymous / 1e6:14.0f}{row.peak_resident / 1e6:13.0f}"
        )
        for line in row.told:
            print(f"    {line}")
    if args.report:
        args.report.write_text(json.dumps([asdict(row) for row in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
