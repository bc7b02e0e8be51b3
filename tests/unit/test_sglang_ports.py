"""Ports of servers: none twice, none that the kernel may give away before the server listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang import ports as module
from spear_megatron.rollout.sglang.ports import Ports, free_port, is_free


def test_a_taken_port_is_passed_over_and_none_is_given_twice() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        proposals = iter([port, port, 0])
        fallback = Ports("127.0.0.1").choose()
        ports = Ports("127.0.0.1", lambda host: next(proposals) or fallback)
        assert ports.choose() == fallback
        never = Ports("127.0.0.1", lambda host: port)
        with pytest.raises(EngineError, match="no free port on 127.0.0.1 after 20 tries"):
            never.choose()
    assert never.choose() == port
    with pytest.raises(EngineError, match="no free port"):
        never.choose()


@pytest.mark.parametrize("wildcard", [False, True])
def test_a_port_that_another_address_of_the_machine_has_is_passed_over(wildcard: bool) -> None:
    """SGLang's rendezvous listens on all of them."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0" if wildcard else "127.0.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert is_free("127.0.0.1", port) is not wildcard
        with pytest.raises(EngineError, match="no free port"):
            Ports("127.0.0.1", lambda host: port).choose()


def kernel_range(folder: Path, text: str) -> Path:
    (folder / "range").write_text(text)
    return folder / "range"


def test_ports_are_drawn_below_those_that_the_kernel_hands_out(tmp_path: Path) -> None:
    usual = kernel_range(tmp_path, "32768\t60999\n")
    drawn = {free_port("127.0.0.1", usual) for _ in range(300)}
    assert len(drawn) > 250 and 20_000 <= min(drawn) and max(drawn) + 10_000 < 32_768


@pytest.mark.parametrize("text", ["1024 65535", "30999 65535", "", "no numbers"])
def test_where_the_kernel_leaves_no_room_it_chooses(tmp_path: Path, text: str) -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    drawn = {free_port("127.0.0.1", kernel_range(tmp_path, text)) for _ in range(200)}
    assert len(drawn) > 20 and low <= min(drawn) and max(drawn) <= min(high, 55_535)


def test_a_port_whose_derived_one_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, asked = kernel_range(tmp_path, "32768 60999"), []

    def every_second(host: str, port: int) -> bool:
        asked.append(port)
        return not (len(asked) == 2 and port >= 20_000)

    monkeypatch.setattr(module, "is_free", every_second)
    port = free_port("127.0.0.1", usual)
    assert asked[1] == asked[0] + 10_000 and asked[2:] == [port, port + 10_000]
