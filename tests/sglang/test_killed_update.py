"""A server that is killed while it takes weights, by every way: the others go on, and it comes back with the next."""

from __future__ import annotations

from pathlib import Path

from harness import run_ranks
from killed_update import killed_on_rank

WAYS = {
    "tensor": ("update_from_tensors", "/update_weights_from_tensor"),
    "distributed": ("update_from_group", "/update_weights_from_distributed"),
    "disk": ("update_from_disk", "/update_weights_from_disk"),
}


def test_a_server_killed_while_it_takes_weights_misses_one_version(tiny_folder: Path, tmp_path: Path) -> None:
    keys = {way: {"way": way, "max_gather_mb": 1, "timeout_s": 60.0} for way in WAYS}
    (results,) = run_ranks(killed_on_rank, 1, str(tiny_folder), str(tmp_path), keys, deadline_s=480.0)
    for way, (message, path) in WAYS.items():
        found = results[way]
        killed, other = found["before"]
        outcome, again = found["outcome"], found["again"]
        assert found["killed"] == [message]
        assert outcome.fresh == (other.url,) and list(outcome.stale) == [killed.url], outcome
        assert f"{killed.url}{path}" in outcome.stale[killed.url]
        assert found["serving"] == (other,)
        assert again.version == outcome.version + 1 and again.fresh == (killed.url, other.url) and not again.stale
        replaced, kept = found["after"]
        assert kept == other and replaced.url == killed.url and replaced.attempt == killed.attempt + 1
        first, second = found["answers"]
        assert first["output_ids"] == second["output_ids"]
        assert {answer["meta_info"]["weight_version"] for answer in found["answers"]} == {str(again.version)}
