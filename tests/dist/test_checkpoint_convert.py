"""Hugging Face -> Megatron -> Hugging Face is bit-exact, tokenizer and configs included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors import safe_open
from test_checkpoint_reshard import build, save, update
from tiny import make_tiny_hf

from spear_megatron.__main__ import main
from spear_megatron.checkpoint.convert import hf_to_mcore, mcore_to_hf
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.parallel.state import initialize


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def small_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("model")
    }


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    (folder / "tokenizer_config.json").write_text('{"chat_template":   "x" }\n')
    (folder / "chat_template.jinja").write_bytes("{{ messages }}\r\n".encode())
    (folder / "LICENSE").write_text("text")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    return folder


CASES: list[dict[str, Any]] = [
    {"arch": "qwen3", "vocab_size": 101},
    {"arch": "qwen2", "tie_word_embeddings": False, "dtype": torch.bfloat16, "max_shard_size": "30KB"},
    {"arch": "qwen2", "dtype": torch.float16},
    {"arch": "qwen3", "head_dim": 12, "vocab_size": 127, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_round_trip(tmp_path: Path, case: dict[str, Any]) -> None:
    hf = with_tokenizer(make_tiny_hf(tmp_path / "hf", **case))
    mcore, back = str(tmp_path / "mcore"), str(tmp_path / "back")
    assert main(["convert", "hf-to-mcore", "--hf", str(hf), "--out", mcore, "--tp", "2", "--pp", "2"]) == 0
    assert main(["convert", "mcore-to-hf", "--mcore", mcore, "--out", back]) == 0
    before, after = read(hf), read(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
    assert small_files(hf) == small_files(tmp_path / "back")


@megatron_on_cpu()
def _train(hf: Path, run_dir: Path, out: Path) -> None:
    from spear_megatron.model.hf_export import export_hf
    from spear_megatron.model.shape import ModelShape

    parallel = initialize(tp=2, timeout_s=60)
    actor = build(hf, parallel)
    update(actor, 1, parallel)
    save(CheckpointManager(run_dir / "checkpoints", parallel=parallel, keep=1, assets=hf), 1, actor)
    export_hf(actor.chunks, ModelShape.from_folder(hf), parallel, out, hf)


@pytest.mark.slow
def test_a_training_checkpoint_exports_like_the_run_itself(tmp_path: Path) -> None:
    hf = make_tiny_hf(tmp_path / "hf")
    run_ranks(_train, 2, hf, tmp_path / "run", tmp_path / "direct")
    folder = mcore_to_hf(tmp_path / "run", tmp_path / "converted")
    assert folder == tmp_path / "run" / "checkpoints" / "step_00000001"
    direct, converted = read(tmp_path / "direct"), read(tmp_path / "converted")
    assert direct.keys() == converted.keys() and all(torch.equal(direct[name], converted[name]) for name in direct)
    assert not all(torch.equal(value, direct[name]) for name, value in read(hf).items())


def test_bad_input_gets_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_tiny_hf(tmp_path / "hf")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    calls = [
        (["hf-to-mcore", "--hf", str(hf), "--out", str(full)], "not empty"),
        (["hf-to-mcore", "--hf", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "give a model folder"),
        (["hf-to-mcore", "--hf", str(hf), "--out", str(tmp_path / "o"), "--tp", "3"], "tensor_model_parallel_size"),
        (["mcore-to-hf", "--mcore", str(full), "--out", str(tmp_path / "o")], "holds no checkpoint"),
    ]
    capsys.readouterr()
    for arguments, message in calls:
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path) -> None:
    step = hf_to_mcore(make_tiny_hf(tmp_path / "hf"), tmp_path / "mcore", tp=1, pp=1)
    path = step / "sharded" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"step_00000000: file sharded/__0_0\.distcp is damaged"):
        mcore_to_hf(tmp_path / "mcore", tmp_path / "out")


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = make_tiny_hf(tmp_path / "hf")
    tensors = read(hf)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mixes dtypes"):
        hf_to_mcore(hf, tmp_path / "mcore", tp=1, pp=1)
