"""Weights to a real server by every way: its tokens are the trainer's, its log-probs those of the exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import needs
from harness import run_ranks
from train_step import Layout
from weight_sync import (
    GREEDY_TOKENS,
    PROMPTS,
    absentee_on_rank,
    corrupt_on_rank,
    straddle_on_rank,
    sync_on_rank,
)

from spear_megatron.rollout.sglang.control import ControlClient

SMALL = {"max_gather_mb": 1, "timeout_s": 60.0}
WAYS = {
    "tensor, http": (Layout("1 rank"), {"way": "tensor"}),
    "tensor, shared memory": (Layout("1 rank"), {"way": "tensor", "transport": "shared_memory"}),
    "distributed": (Layout("1 rank"), {"way": "distributed"}),
    "disk": (Layout("1 rank"), {"way": "disk"}),
    "tensor, two leaders": (Layout("DP2", 2), {"way": "tensor", "transport": "shared_memory"}),
    "distributed, two leaders": (Layout("DP2", 2), {"way": "distributed", "pause": "abort"}),
    "tensor, TP2 x PP2": (Layout("TP2xPP2", 4, tp=2, pp=2), {"way": "tensor"}),
}


@pytest.fixture
def server(sglang_server: str, tiny_folder: Path) -> Iterator[str]:
    """The shared server, whose weights are put back afterwards."""
    yield sglang_server
    client = ControlClient(sglang_server)
    client.resume()
    load(client, tiny_folder, "default")
    client.close()


def load(client: ControlClient, folder: Path, label: str) -> None:
    """Load a folder; an update that flushes the cache right after an answer can kill the server, a flush cannot."""
    client.update_from_disk(str(folder), label, flush=False)
    client.flush_cache()


def answers(url: str) -> tuple[list[list[int]], list[Any]]:
    """(greedy tokens, all log-probs with them) of PROMPTS."""
    body = {
        "input_ids": [list(prompt) for prompt in PROMPTS],
        "sampling_params": {"temperature": 0, "max_new_tokens": GREEDY_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    parts = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).json()
    tokens = [part["output_ids"] for part in parts]
    keys = ("input_token_logprobs", "output_token_logprobs")
    return tokens, [[entry[0] for entry in part["meta_info"][key]] for part in parts for key in keys]


@pytest.mark.parametrize("name", WAYS)
def test_a_server_holds_exactly_the_trainers_weights(name: str, server: str, tiny_folder: Path, tmp_path: Path) -> None:
    layout, keys = WAYS[name]
    before, _ = answers(server)
    results = run_ranks(
        sync_on_rank, layout.world_size, str(tiny_folder), layout, [server], str(tmp_path), SMALL | keys
    )
    outcome = results[0]["outcome"]
    assert outcome.resends == 0 and outcome.notes == () and 0 < outcome.peak_bytes <= 2 << 20
    client = ControlClient(server)
    assert client.server_info().weight_version == "2"
    tokens, log_probs = answers(server)
    assert tokens != before and tokens == [list(part) for part in results[0]["greedy"]]
    load(client, tmp_path / "export", "exported")
    assert answers(server) == (tokens, log_probs)
    client.close()
    if keys["way"] == "disk":
        kept = sorted(path.name for path in (tmp_path / "weights").iterdir())
        assert kept == ["version_00000001", "version_00000002"]


@pytest.mark.parametrize("times", [1, 100])
def test_a_tensor_damaged_on_the_way_is_named(times: int, server: str, tiny_folder: Path, tmp_path: Path) -> None:
    """By its own name, or by that of the server's fused parameter where the server has checksums (0.5.23)."""
    name = "model.layers.1.mlp.up_proj.weight"
    client = ControlClient(server)
    said = name if client.checksums() is None else "model.layers.1.mlp.gate_up_proj.weight"
    client.close()
    layout = Layout("1 rank")
    (text,) = run_ranks(corrupt_on_rank, 1, str(tiny_folder), layout, [server], str(tmp_path), SMALL, name, times)
    assert f"wrong on {server}: {said}." in text
    assert text.startswith("resends 1:" if times == 1 else "weights of version 1 arrived wrong.")


@pytest.mark.parametrize("pause", ["retract", "in_place", "abort"])
def test_a_request_lives_through_an_update(
    pause: str, server: str, tiny_folder: Path, tmp_path: Path, server_version: tuple[int, ...]
) -> None:
    """Kept or computed again it has tokens of both versions; aborted it ends with those of the first."""
    first = (0, 5, 21) if pause == "retract" else (0, 5, 20)
    needs(server_version, first, f"an update under running requests with pause={pause}")
    (result,) = run_ranks(straddle_on_rank, 1, str(tiny_folder), server, str(tmp_path), SMALL | {"pause": pause})
    assert result["outcome"].fresh == (server,)
    spans = [(span["version"], span["start"], span["end"]) for span in result["meta"]["weight_versions"]]
    if pause == "abort":
        assert result["meta"]["finish_reason"]["type"] == "abort" and [span[0] for span in spans] == ["1"]
        return
    assert result["num_tokens"] == 500 and [span[0] for span in spans] == ["1", "2"]
    assert spans[0][1] == 0 and 0 < spans[0][2] == spans[1][1] < spans[1][2] == 500


@pytest.mark.parametrize("way", ["tensor", "distributed", "disk"])
def test_a_server_that_is_not_there_stops_nobody(way: str, server: str, tiny_folder: Path, tmp_path: Path) -> None:
    absent = "http://127.0.0.1:9"
    arguments = (str(tiny_folder), Layout("1 rank"), [absent, server], str(tmp_path), SMALL | {"way": way})
    (outcome,) = run_ranks(absentee_on_rank, 1, *arguments)
    assert outcome.fresh == (server,) and f"{absent}/get_server_info" in outcome.stale[absent]
