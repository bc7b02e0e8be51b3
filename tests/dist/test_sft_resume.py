"""The supervised stage reads a corpus with either source alike, and continues on another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from observers.files import make_files

from spear_megatron.checkpoint.store import step_name
from spear_megatron.data.dali import has_dali

SMALL = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1", "trainer.logger=[]", "sft.total_training_steps=6",
    "sft.train_batch_size=4", "sft.lr_warmup_steps=1", "data.max_prompt_length=64", "data.max_response_length=64",
)  # fmt: skip


def fine_tune(overrides: list[str]) -> None:
    from spear_megatron.cli.sft import as_supervised
    from spear_megatron.cli.sft import fine_tune as command
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config

    command(as_supervised(load(Config, None, overrides)))


def refusal(overrides: list[str]) -> str:
    """What the command says; it must not begin to train."""
    with pytest.raises(ValueError) as caught:
        fine_tune(overrides)
    return str(caught.value)


def figures(folder: Path) -> list[tuple[Any, ...]]:
    """Every step's figures, from the record."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["sft/loss"], line["sft/grad_norm"], line["sft/tokens"]) for line in lines]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, seven conversations, and the same ones as corpora."""
    from spear_megatron.__main__ import main

    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    pairs = [(f"Count to {i}.", " ".join(map(str, range(i + 1)))) for i in range(7)]
    talks = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    for form in ("packed", "numpy"):
        options = ("--source", folder / "talks.jsonl", "--model", folder / "model", "--out", folder / form)
        assert main(["corpus", *map(str, options), "--form", form]) == 0
    return folder


def arguments(files: Path, run_dir: Path, *overrides: str) -> list[str]:
    model = f"actor_rollout_ref.model.path={files / 'model'}"
    return [*SMALL, model, f"sft.default_local_dir={run_dir}", *overrides]


def test_any_source_trains_alike_and_resumes_on_other_ranks(files: Path, tmp_path: Path) -> None:
    run_ranks(fine_tune, 1, arguments(files, tmp_path / "plain", f"sft.train_files={files / 'talks.jsonl'}"))
    expected = figures(tmp_path / "plain")
    assert [line[0] for line in expected] == [1, 2, 3, 4, 5, 6]
    source = "dali" if has_dali() else "mmap"
    given = ("sft.save_freq=3", f"sft.train_files={files / 'numpy'}", f"sft.data_source={source}")
    run_dir = tmp_path / "saved"
    run_ranks(fine_tune, 1, arguments(files, run_dir, *given))
    assert figures(run_dir) == expected, "the same batches give the same floats"
    weights = (run_dir / "hf" / "model.safetensors").read_bytes()

    shutil.rmtree(run_dir / "checkpoints" / step_name(6))
    shutil.copytree(run_dir, tmp_path / "other")
    run_ranks(fine_tune, 1, arguments(files, run_dir, *given))
    assert figures(run_dir) == expected and (run_dir / "hf" / "model.safetensors").read_bytes() == weights

    given = ("sft.save_freq=3", f"sft.train_files={files / 'packed'}", "sft.data_source=mmap")
    run_ranks(fine_tune, 2, arguments(files, tmp_path / "other", *given))
    resumed = figures(tmp_path / "other")
    assert resumed[:3] == expected[:3] and resumed[3:] != expected[3:], "two ranks add up in another order"
    for found, wanted in zip(resumed, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)

    shorter = arguments(files, tmp_path / "other", *given, "sft.total_training_steps=2")
    assert "beyond sft.total_training_steps=2" in run_ranks(refusal, 1, shorter)[0]

    changed = arguments(files, tmp_path / "other", "sft.save_freq=3", f"sft.train_files={files / 'other.jsonl'}")
    rows = (files / "talks.jsonl").read_text().splitlines()
    (files / "other.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    assert f"cannot resume on {files / 'other.jsonl'}: corpus was" in run_ranks(refusal, 1, changed)[0]
