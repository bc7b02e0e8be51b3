"""The control client against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient, parse_version


def test_versions_are_read() -> None:
    assert parse_version("0.5.21.post1") == (0, 5, 21)
    with pytest.raises(EngineError, match="0.5.15 or newer"):
        parse_version("unknown")


def test_every_control_request_works(sglang_server: str, tiny_folder: Path, tmp_path: Path) -> None:
    client = ControlClient(sglang_server)
    client.wait_ready(5.0)
    info = client.server_info()
    assert info.version >= (0, 5, 15) and info.tp_size == 1 and Path(info.model_path) == tiny_folder
    assert info.max_total_tokens and info.max_total_tokens >= 16384
    client.pause("retract")
    client.flush_cache()
    client.begin_update()
    client.end_update()
    client.resume()
    client.release_memory()
    client.resume_memory()
    client.abort_all()
    client.update_from_disk(str(tiny_folder), "7", flush=False)
    assert client.server_info().weight_version == "7"
    with pytest.raises(EngineError, match=f"{sglang_server}/update_weights_from_disk: HTTP 400"):
        client.update_from_disk(str(tmp_path), "8")
    assert client.server_info().weight_version == "7"
    client.close()


def test_a_server_that_is_not_there_is_named() -> None:
    client = ControlClient("http://127.0.0.1:9", timeout_s=2.0)
    assert not client.is_ready()
    with pytest.raises(EngineError, match="http://127.0.0.1:9/get_server_info"):
        client.server_info()
    with pytest.raises(EngineError, match="not ready within 0.1 s"):
        client.wait_ready(0.1)
