"""The whole job at small scale: tiny model, cold start, reinforcement learning, evaluation, export, a look at it.

``python tools/quickstart.py [--out outputs/quickstart] [--ranks 2] [key=value ...]`` runs the same commands as a user
and writes ``<out>/summary.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.parallel.paths import check_output_folder

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 1800


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage in order and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--out", default="outputs/quickstart", help="folder of all results; an earlier one is replaced")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the trainer")
    parser.add_argument("overrides", nargs="*", help="key=value, handed to every command")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if args.ranks < 1:
        parser.error(f"--ranks must be at least 1, got {args.ranks}")
    try:
        check_output_folder(out, "--out")
        load(Config, args.config, args.overrides)
        if out.is_dir() and next(out.iterdir(), None) is not None and not (out / "model").is_dir():
            raise ValueError(f"--out {out} holds something else than an earlier quickstart: name another folder")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    runner = Runner(out, args.config, args.ranks, args.overrides)
    runner.stage("model", [sys.executable, "-m", "spear_megatron.data.tiny", str(out / "model")])
    runner.stage("sft", runner.command("sft"))
    runner.stage("sft_evaluation", runner.evaluation(out / "sft" / "hf", "sft"))
    runner.stage("rl", runner.command("train"))
    runner.stage("final_evaluation", runner.evaluation(out / "rl" / "hf", "final"))
    check_plain_transformers(out / "rl" / "hf")
    summary = summarise(out, runner.seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(out, summary)
    return 0


class Runner:
    """Runs the commands, each under a deadline, and keeps their seconds."""

    def __init__(self, out: Path, config: str, ranks: int, overrides: Sequence[str]) -> None:
        self._out, self._config, self._ranks = out, config, ranks
        self._overrides = [
            f"actor_rollout_ref.model.path={out / 'model'}",
            f"sft.default_local_dir={out / 'sft'}",
            f"trainer.default_local_dir={out / 'rl'}",
            *overrides,
        ]
        self.seconds: dict[str, float] = {}

    def _torchrun(self) -> list[str]:
        return [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._ranks}",
            "-m", "spear_megatron",
        ]  # fmt: skip

    def command(self, name: str) -> list[str]:
        """``sft`` or ``train`` on all ranks; ``train`` starts from the cold start's export."""
        overrides = list(self._overrides)
        if name == "train":
            overrides[0] = f"actor_rollout_ref.model.path={self._out / 'sft' / 'hf'}"
        return [*self._torchrun(), name, "--config", self._config, *overrides]

    def evaluation(self, model: Path, name: str) -> list[str]:
        """``evaluate`` of an exported model on the held-out problems."""
        target = str(self._out / f"evaluation_{name}")
        return [
            *self._torchrun(), "evaluate", "--config", self._config, "--model", str(model), "--out", target,
            *self._overrides,
        ]  # fmt: skip

    def stage(self, name: str, command: Sequence[str]) -> None:
        """Run one command.

        Raises:
            SystemExit: it failed or overran the deadline; names the stage.
        """
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        start = time.perf_counter()
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S).returncode
        except subprocess.TimeoutExpired:
            raise SystemExit(f"quickstart: stage {name} did not finish within {DEADLINE_S} s") from None
        if code:
            raise SystemExit(f"quickstart: stage {name} failed with exit code {code}")
        self.seconds[name] = round(time.perf_counter() - start, 1)


def check_plain_transformers(folder: Path) -> None:
    """Load the export the way any Hugging Face user would, and generate with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    messages = [{"role": "user", "content": "Compute 12 + 30."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    print(f"\n== plain transformers loads {folder}: {type(model).__name__}, {model.num_parameters():,} parameters")
    print(repr(text))


def summarise(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Figures of both evaluations, the number of steps, seconds per stage and where the export lies."""
    from spear_megatron.observability.record import read_record

    def result(name: str) -> dict[str, Any]:
        success = json.loads((out / f"evaluation_{name}" / "report.json").read_text())["metrics"]["success_rate"]
        return {"success_rate": success["value"], "ci95": [success["low"], success["high"]]}

    record = [line for line in read_record(out / "rl") if line["step"] > 0]
    return {
        "sft": result("sft"),
        "final": result("final"),
        "steps": len(record),
        "spear": summarise_spear(record),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "hf_export": str(out / "rl" / "hf"),
    }


def summarise_spear(record: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What self-imitation and covariance clipping did over the run; empty for a recipe without them."""
    replayed = [line.get("replay/replayed", 0.0) for line in record]
    if not any("spear/gamma" in line for line in record):
        return {}

    def total(name: str) -> int:
        steps = [line.get(name, 0.0) * line["training/num_optimizer_steps"] for line in record]
        return round(sum(steps))

    return {
        "replayed_trajectories": round(sum(replayed)),
        "steps_with_replay": sum(count > 0 for count in replayed),
        "replayed_tokens": total("replay/tokens"),
        "mean_gamma": round(sum(line.get("spear/gamma", 0.0) for line in record) / len(record), 4),
        "covariance_tokens": total("cov/selected"),
        "covariance_tokens_replayed": total("cov/replay_selected"),
    }


def show(out: Path, summary: dict[str, Any]) -> None:
    """The curve in the terminal and as a PNG, one problem before and after, and the figures."""
    from rich.console import Console

    from spear_megatron.observability.plots import curve, save_learning_curve, text_chart
    from spear_megatron.observability.record import read_record
    from spear_megatron.observability.view import find_learned, side_by_side

    record = read_record(out / "rl")
    print("\n" + text_chart(curve(record, "success/mean"), "success of the training rollouts", limits=(0.0, 1.0)))
    save_learning_curve(record, out / "learning_curve.png", title="quickstart")
    learned = find_learned(str(out / "rl"))
    if learned is not None:
        Console().print(side_by_side(*learned, titles=("before", "after")))
    for name in ("sft", "final"):
        part = summary[name]
        low, high = (100 * bound for bound in part["ci95"])
        print(f"{name:>6}: {100 * part['success_rate']:5.1f} % solved (95 % interval {low:.1f} - {high:.1f} %)")
    if spear := summary["spear"]:
        print(
            f"replayed {spear['replayed_trajectories']} trajectories in {spear['steps_with_replay']} of "
            f"{summary['steps']} steps, mean gamma {spear['mean_gamma']:.2f}; covariance clipping stopped "
            f"{spear['covariance_tokens']} fresh and {spear['covariance_tokens_replayed']} replayed tokens"
        )
    print(f"{summary['steps']} steps, {summary['seconds']['total']:.0f} s")
    print(f"curve in {out / 'learning_curve.png'}, model in {summary['hf_export']}")


if __name__ == "__main__":
    sys.exit(main())
