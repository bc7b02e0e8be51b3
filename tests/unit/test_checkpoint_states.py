"""Small states to bytes and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spear_megatron.checkpoint.assets import asset_files, copy_assets
from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.data.files import FileSystem, hash_file
from spear_megatron.checkpoint.manifest import Manifest, StateEntry
from spear_megatron.checkpoint.states import decode_states, encode_state


class Custom:
    """Something only Python's pickle would store."""


def round_trip(folder: Path, **values: Any) -> dict[str, Any]:
    (folder / "states").mkdir()
    entries: dict[str, StateEntry] = {}
    for name, value in values.items():
        entries[name], data = encode_state(name, value)
        (folder / entries[name].path).write_bytes(data)
    manifest = Manifest(step=1, fingerprint="", layout={}, software={}, states=entries, files=())
    return decode_states(folder, manifest)


def test_json_and_tensor_states_come_back_equal(tmp_path: Path) -> None:
    floats = [0.1, 1e-300, 2**63 + 1, -0.0]
    tensors = {"index": torch.arange(5), "rows": [torch.ones(2, dtype=torch.bfloat16)], "note": "n", "count": 3}
    loaded = round_trip(tmp_path, rng={"seed": 2**64 - 1, "values": floats}, position=7, replay=tensors, nothing=None)
    assert loaded["rng"] == {"seed": 2**64 - 1, "values": floats}
    assert (loaded["position"], loaded["nothing"]) == (7, None)
    assert torch.equal(loaded["replay"]["index"], tensors["index"])
    assert torch.equal(loaded["replay"]["rows"][0], tensors["rows"][0])
    assert loaded["replay"]["note"] == "n"


def test_later_changes_do_not_reach_the_encoded_state() -> None:
    value = {"x": torch.zeros(3)}
    _, before = encode_state("replay", value)
    value["x"] += 1
    _, after = encode_state("replay", value)
    assert before != after


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rng", {1: 2}, "not a string"),
        ("rng", {"a": [{2: 3}]}, "not a string"),
        ("rng", object(), "JSON-able"),
        ("rng", {"x": torch.zeros(1), "y": Custom()}, "tensors and plain values"),
        ("../rng", {}, "identifier"),
    ],
)
def test_states_that_would_not_come_back_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_state(name, value)


def test_a_state_that_does_not_decode_is_named(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "rng.json").write_text("{")
    entry, _ = encode_state("rng", {})
    manifest = Manifest(step=1, fingerprint="", layout={}, software={}, states={"rng": entry}, files=())
    with pytest.raises(DamagedCheckpoint, match="state 'rng' does not decode"):
        decode_states(tmp_path, manifest)


def test_assets_are_everything_but_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json", "pytorch_model.bin", ".cache"):  # fmt: skip
        (source / name).write_bytes(name.encode() * 3)
    entries = copy_assets(source, target, FileSystem())
    assert [path.name for path in asset_files(source)] == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert {entry.path for entry in entries} == {f"hf/{path.name}" for path in target.iterdir()}
    for entry in entries:
        path = target / entry.path.removeprefix("hf/")
        assert (entry.num_bytes, entry.sha256) == (path.stat().st_size, hash_file(path))
    with pytest.raises(ValueError, match=r"no config\.json"):
        asset_files(target.parent)
