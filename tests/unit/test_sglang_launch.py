"""Settings, command lines and placement of servers: pure functions."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.rollout.sglang.command import ServerSpec, server_command, server_environment
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.placement import Placement, RankFacts, place_servers

SPEC = ServerSpec(model_path="model", dtype="bfloat16", context_length=100, max_running_requests=7)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_servers": 0}, "num_servers must be a whole number of at least 1"),
        ({"max_restarts": -1}, "max_restarts must be a whole number of at least 0"),
        ({"tp_size": True}, "tp_size must be a whole number"),
        ({"ready_timeout_s": 0}, "ready_timeout_s must be seconds"),
        ({"backend": "slurm"}, "backend='slurm' must be one of process, ray"),
        ({"device": "tpu"}, "device='tpu' must be one of auto, cpu, cuda"),
        ({"device": "cpu", "tp_size": 2}, "tp_size=2 needs GPUs"),
        ({"hung_after_s": 1.0, "health_interval_s": 2.0}, "hung_after_s must exceed health_interval_s"),
        ({"args": {"--log-level": "info"}}, "without leading dashes"),
        ({"args": {"model_path": "x"}}, "args.model_path is set from other keys"),
        ({"args": {"context-length": 3}}, "args.context-length is set from other keys"),
        ({"args": {"x": {"y": 1}}}, "args.x must be a number"),
        ({"env": {"A": 1}}, "env: 'A' must be a text"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGLangLaunchConfig(**wrong)


def options_of(command: Sequence[str]) -> dict[str, list[str]]:
    starts = [index for index, word in enumerate(command) if word.startswith("--")] + [len(command)]
    return {command[a]: list(command[a + 1 : b]) for a, b in itertools.pairwise(starts)}


def test_the_command_on_gpus() -> None:
    args = {"mem-fraction-static": 0.6, "trust_remote_code": True, "cuda-graph-bs": [1, 2], "skip": False}
    config = SGLangLaunchConfig(tp_size=2, args=args, host="0.0.0.0")
    command = server_command(config, SPEC, 123, 456)
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert options_of(command) == {
        "--mem-fraction-static": ["0.6"], "--trust-remote-code": [], "--cuda-graph-bs": ["1", "2"],
        "--model-path": ["model"], "--host": ["0.0.0.0"], "--port": ["123"], "--device": ["cuda"], "--tp-size": ["2"],
        "--dtype": ["bfloat16"], "--context-length": ["100"], "--max-running-requests": ["7"], "--nccl-port": ["456"],
    }  # fmt: skip


def test_the_command_on_the_cpu_takes_the_launcher_and_kernels_that_work_there() -> None:
    spec = ServerSpec(
        model_path="m", dtype="float32", context_length=9, max_running_requests=1, memory_saver=True, on_cpu=True
    )
    config = SGLangLaunchConfig(python="other/python", args={"grammar-backend": "xgrammar"})
    command = server_command(config, spec, 5, 6)
    options = options_of(command)
    assert command[0] == "other/python" and Path(command[1]).name == "serve_cpu.py" and Path(command[1]).exists()
    assert options["--device"] == ["cpu"] and options["--attention-backend"] == ["torch_native"]
    assert options["--grammar-backend"] == ["xgrammar"] and options["--enable-memory-saver"] == []
    assert options["--sleep-on-idle"] == []


@pytest.mark.parametrize(
    "args, expected", [({"nccl_port": 7}, ["7"]), ({"dp_size": 2}, None), ({"data-parallel-size": 2}, None)]
)
def test_the_rendezvous_port_yields_to_arguments(args: dict[str, Any], expected: list[str] | None) -> None:
    """One port cannot serve the replicas that SGLang makes of dp-size."""
    command = server_command(SGLangLaunchConfig(args=args), SPEC, 5, 6)
    assert options_of(command).get("--nccl-port") == expected


def test_the_environment_hides_torchrun_and_chooses_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    environment = server_environment(SGLangLaunchConfig(env={"NCCL_DEBUG": "INFO"}), (1, 2), SPEC)
    assert not {"RANK", "MASTER_PORT"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-5,6" and environment["NCCL_DEBUG"] == "INFO"
    assert environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert server_environment(SGLangLaunchConfig(), (1, 2), SPEC)["CUDA_VISIBLE_DEVICES"] == "1,2"


def ranks(*nodes: tuple[str, int, Sequence[int]]) -> list[RankFacts]:
    """(name, GPUs, leader flags of its ranks) of every machine."""
    return [RankFacts(name, bool(leads), gpus) for name, gpus, flags in nodes for leads in flags]


def test_each_machine_gets_its_servers_from_its_first_leader() -> None:
    facts = ranks(("a", 8, (1, 0, 1, 0)), ("b", 8, (0, 0, 1, 0)), ("c", 8, (0, 0)))
    placed = place_servers(facts, num_servers=2, tp_size=2, on_cpu=False, colocated=True)
    gpus = ((0, 1), (2, 3))
    assert placed == (Placement(0, (0, 1), gpus), Placement(6, (2, 3), gpus), Placement(8, (4, 5), gpus))
    placed = place_servers(facts, num_servers=1, tp_size=4, on_cpu=False, colocated=False)
    assert [placement.gpus for placement in placed] == [((4, 5, 6, 7),), ((4, 5, 6, 7),), ((2, 3, 4, 5),)]


def test_too_few_gpus_are_named_and_the_cpu_needs_none() -> None:
    facts = ranks(("a", 4, (1, 1)))
    with pytest.raises(ValueError, match=r"beside 2 ranks of the trainer need 6 GPUs and a has 4"):
        place_servers(facts, num_servers=2, tp_size=2, on_cpu=False, colocated=False)
    assert place_servers(facts, num_servers=2, tp_size=2, on_cpu=False, colocated=True)
    assert place_servers(facts, num_servers=3, tp_size=1, on_cpu=True, colocated=False) == (
        Placement(0, (0, 1, 2), ((), (), ())),
    )


def test_no_gpu_is_given_twice_and_numbers_are_dense() -> None:
    for servers, size, nodes in itertools.product((1, 2, 4), (1, 2), (1, 3)):
        facts = ranks(*((f"n{node}", 8, (1, 1)) for node in range(nodes)))
        for colocated in (False, True):
            if not colocated and 2 + servers * size > 8:
                continue
            placed = place_servers(facts, num_servers=servers, tp_size=size, on_cpu=False, colocated=colocated)
            assert [number for part in placed for number in part.numbers] == list(range(servers * nodes))
            for part in placed:
                used = [gpu for group in part.gpus for gpu in group]
                assert len(set(used)) == len(used) == servers * size
                assert colocated or min(used) >= 2
