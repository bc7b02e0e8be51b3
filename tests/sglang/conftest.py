"""A real SGLang server for the tests of this folder. They fail, not skip, where it cannot start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.ports import Ports

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("SPEAR_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
LAUNCHER = ROOT / "spear_megatron" / "rollout" / "sglang" / "serve_cpu.py"
READY_S = 240.0
SETTINGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--dtype": "float32",
    "--max-total-tokens": "16384",
    "--max-running-requests": "64",
    "--random-seed": "1",
}


def server_environment() -> dict[str, str]:
    """Environment variables of a server: offline, one thread, health checks that do not generate."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "PYTHONPATH": "",
    }


def start_server(model: Path, log: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start a server on a free port; its URL and its process, which leads a process group of its own."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make sglang-server`, or set SPEAR_SGLANG_PYTHON")
    ports = Ports("127.0.0.1")
    port = ports.choose()
    command = [str(PYTHON), str(LAUNCHER), "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--nccl-port", str(ports.choose())]
    command += ["--sleep-on-idle", *(part for pair in SETTINGS.items() for part in pair)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=server_environment(), start_new_session=True
        )
    return f"http://127.0.0.1:{port}", process


def await_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server is ready; the test fails with the end of its log if it dies or is late."""
    client = ControlClient(url)
    end = time.monotonic() + READY_S
    try:
        while not client.is_ready(2.0):
            if process.poll() is not None or time.monotonic() > end:
                state = f"exited with {process.returncode}" if process.poll() is not None else f"late ({READY_S:g} s)"
                pytest.fail(f"the SGLang server {state}:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.25)
    except EngineError as error:
        pytest.fail(str(error))
    finally:
        client.close()


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    for signal_number, patience_s in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 20.0)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived their parent
    except ProcessLookupError:
        pass


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 with tokenizer, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("sglang") / "model"
    make_tiny_model(folder, seed=3)
    return folder


@pytest.fixture(scope="session")
def sglang_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with the weights of ``tiny_folder``; a test that changes them restores them from disk."""
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    url, process = start_server(tiny_folder, log)
    try:
        await_server(url, process, log)
        yield url
    finally:
        stop_server(process)


@pytest.fixture(scope="session")
def server_version(sglang_server: str) -> tuple[int, ...]:
    """SGLang's version: `make sglang-versions` runs these tests on others than the usual one."""
    client = ControlClient(sglang_server)
    version = client.server_info().version
    client.close()
    return version


def needs(server_version: tuple[int, ...], first: tuple[int, ...], what: str) -> None:
    """Skip the test on a server that is documented not to do ``what``."""
    if server_version < first:
        pytest.skip(f"{what} takes SGLang {'.'.join(map(str, first))} (docs/sglang.md)")


@pytest.fixture()
def fresh_server(sglang_server: str, tiny_folder: Path) -> str:
    """The server as it was started, whatever other tests did to its weights and their label."""
    client = ControlClient(sglang_server)
    client.update_from_disk(str(tiny_folder), "default", flush=False)
    client.flush_cache()
    client.close()
    return sglang_server
