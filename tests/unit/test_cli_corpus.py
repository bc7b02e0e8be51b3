"""The command ``corpus``: conversations, stored trajectories, tars and other corpora into every form and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_samples import made_up, written
from replay_ranks import Ranks, payload_of, simulated_ranks

from spear_megatron.__main__ import main
from spear_megatron.checkpoint.manifest import JSON, SHARDED, Manifest, StateEntry
from spear_megatron.checkpoint.store import CheckpointStore
from spear_megatron.cli.agents import load_renderer
from spear_megatron.cli.sft import load_corpus
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.corpus import examples_of
from spear_megatron.data.corpus_files import FORMS, open_corpus
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.decisions import ReplayRules
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.payload import BYTES_PER_TOKEN
from spear_megatron.types import RewardParts, TrajectoryId

TALKS = [
    {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "x " * i + str(i)}]}
    for i in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``talks.jsonl``."""
    folder = tmp_path_factory.mktemp("corpus")
    sizes: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=32)
    make_tiny_model(folder / "model", seed=0, **sizes)
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    return folder


def corpus(*arguments: str | Path) -> int:
    return main(["corpus", *map(str, arguments)])


def configured(folder: Path, files: Path, *overrides: str) -> Config:
    paths = (f"actor_rollout_ref.model.path={folder / 'model'}", f"sft.train_files={files}")
    return load(Config, None, [*paths, *overrides])


def test_conversations_become_what_sft_reads_from_their_jsonl(folder: Path, tmp_path: Path) -> None:
    talks, model = folder / "talks.jsonl", folder / "model"
    renderer = load_renderer(model)
    expected = load_corpus(configured(folder, talks), renderer)
    for form in FORMS:
        assert corpus("--source", talks, "--model", model, "--form", form, "--out", tmp_path / form) == 0
        found = load_corpus(configured(folder, tmp_path / form), renderer)
        assert found.form == form and found.identity() == expected.identity()
    # From one form into another and from a tar without a description.
    assert corpus("--source", tmp_path / "webdataset", "--form", "numpy", "--out", tmp_path / "again") == 0
    tar = tmp_path / "webdataset" / "corpus.tar"
    assert corpus("--source", tar, "--model", model, "--out", tmp_path / "of_tar") == 0
    for name in ("again", "of_tar"):
        other = load_corpus(configured(folder, tmp_path / name), renderer)
        assert other.identity() == expected.identity()
    longest = int(expected.table[:, 0].max())
    options = ("--source", tmp_path / "again", "--max-length", longest - 1, "--out", tmp_path / "short")
    assert corpus(*map(str, options)) == 0
    assert open_corpus(tmp_path / "short").info.longest < longest


def test_a_corpus_of_another_tokenizer_or_too_long_is_refused(folder: Path, tmp_path: Path) -> None:
    renderer = load_renderer(folder / "model")
    foreign = written(tmp_path, made_up(3), "packed", vocabulary="of another tokenizer")
    with pytest.raises(ValueError, match="another tokenizer"):
        load_corpus(configured(folder, foreign.folder), renderer)
    assert corpus("--source", folder / "talks.jsonl", "--model", folder / "model", "--out", tmp_path / "c") == 0
    with pytest.raises(ValueError, match="samples of up to .* more than 10: raise data.max_response_length"):
        load_corpus(
            configured(folder, tmp_path / "c", "data.max_prompt_length=5", "data.max_response_length=5"), renderer
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no corpus"):
        load_corpus(configured(folder, tmp_path / "empty"), renderer)


RULES = ReplayRules(
    buffer_size=9, score_threshold=0.0, tolerate_steps=9, weight_decay=-1.0, norm_by_std=False,
    replay=ReplayConfig(trigger_ratio=0.0, require="none"),
)  # fmt: skip
REWARDS = (1.0, 0.25, 1.0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, whose replay buffer holds a trajectory per reward, of two segments each."""
    folder = tmp_path_factory.mktemp("run")
    entries = [
        ReplayEntry(
            id=TrajectoryId(1, task, 0), shard=task % 2, base=reward, bonus=0.0, parts=RewardParts(reward),
            stored_reward=reward, advantage=1.0, num_tokens=6 + task, num_sampled=4 + task,
            num_bytes=6 * BYTES_PER_TOKEN, temperature=1.0, longest=4 + task,
        )
        for task, reward in enumerate(REWARDS)
    ]  # fmt: skip

    def push(buffer: Any, rank: int) -> Any:
        own = {item.id: payload_of(item.id, item.num_tokens) for item in entries if item.shard == rank}
        buffer.push(1, buffer.plan_push(entries), own, [])
        return buffer.snapshot()

    with simulated_ranks():
        ranks = Ranks(2, folder, RULES, baseline_size=3)
        state, external = ranks.each(push)[0]
        ranks.close()
    store = CheckpointStore(folder / "checkpoints")
    store.clean()
    staging = store.begin(1, ("states",))
    file = store.files.write(staging / "states" / "replay.json", json.dumps(state).encode(), "states/replay.json")
    states = {"replay": StateEntry(JSON, file.path), "model": StateEntry(SHARDED, "sharded")}
    store.commit(
        1, Manifest(step=1, fingerprint="", layout={}, software={}, states=states, files=(file,), external=external)
    )
    return folder


@pytest.mark.parametrize("options", [(), ("--min-reward", "0.5"), ("--max-length", "5")], ids=" ".join)
def test_stored_trajectories_become_one_sample_per_segment(
    options: tuple[str, ...], run_dir: Path, folder: Path, tmp_path: Path
) -> None:
    assert corpus("--source", run_dir, "--model", folder / "model", "--out", tmp_path / "c", *options) == 0
    wanted = {(): (0, 1, 2), ("--min-reward", "0.5"): (0, 2), ("--max-length", "5"): (0, 1)}[options]
    expected = []
    for task in wanted:
        record = payload_of(TrajectoryId(1, task, 0), 6 + task)
        parts = [record.tensors[name].split(record.fields["lengths"]) for name in ("ids", "response_mask")]
        expected += list(zip(*parts, strict=True))
    found = list(examples_of(open_corpus(tmp_path / "c")))
    assert len(found) == len(expected) == 2 * len(wanted)
    for example, (ids, mask) in zip(found, expected, strict=True):
        assert torch.equal(example.ids, ids) and torch.equal(example.loss_mask, mask)


def test_bad_sources_get_one_clear_error(
    folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, made_up(3), "packed")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "empty").mkdir()
    model = ("--model", folder / "model")
    cases = [
        (("--source", tmp_path / "none", *model), "does not exist"),
        (("--source", folder / "talks.jsonl"), "needs --model"),
        (("--source", tmp_path / "packed", *model), "leave it away"),
        (("--source", tmp_path / "packed", "--min-reward", "1"), "belongs to stored trajectories"),
        (("--source", tmp_path / "bad.tar", *model), "bad.tar is no intact tar"),
        (("--source", tmp_path / "empty", *model), "holds no checkpoint"),
        (("--source", run_dir, *model, "--min-reward", "9"), "holds no samples"),
    ]
    for arguments, message in cases:
        assert corpus(*arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert corpus("--source", tmp_path / "packed", "--out", tmp_path / "packed") == 2
    assert "exists" in capsys.readouterr().err
