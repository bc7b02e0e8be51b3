"""The batch scripts' own bash with stand-ins for srun, scontrol and python: what is started, and what a signal does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
# Ranks save on SIGUSR1 and srun ends with their code; servers run until srun is told to end.
SRUN = """#!/bin/bash
case " $* " in
    *" --job-name=train "*)
        echo "$@" > "$NOTES/train"
        trap 'touch "$NOTES/saved"; exit ${TRAIN_CODE:-0}' USR1
        if [ -n "$TRAIN_ENDS" ]; then exit "${TRAIN_CODE:-0}"; fi
        touch "$NOTES/training" ;;
    *)
        echo "$@" > "$NOTES/servers"
        trap 'touch "$NOTES/servers_ended"; exit 143' TERM
        touch "$NOTES/servers_run" ;;
esac
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) for node in n1 n2 n3 n4; do echo $node; done ;;
    requeue) echo "$2" > "$NOTES/requeued"; kill -9 "$PPID" ;;
esac
"""
PYTHON = """#!/bin/bash
echo "$@" > "$NOTES/waited"
while [ ! -e "$NOTES/servers_run" ]; do sleep 0.02; done
if [ -n "$NEVER_READY" ]; then touch "$NOTES/waiting"; exec sleep 60; fi
exit ${READY_CODE:-0}
"""


class Job:
    """One attempt of a batch script."""

    def __init__(self, tmp_path: Path, script: str, **settings: str) -> None:
        self.notes = tmp_path / "notes"
        self.notes.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
            path = tmp_path / name
            path.write_text(text)
            path.chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(self.notes), "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_NAME": "spear", "MODEL": "/models/m",
            "RUN_DIR": str(tmp_path / "run"), "PYTHON": str(tmp_path / "python"), "TRAIN_NODES": "3", **settings,
        }  # fmt: skip
        command = ["bash", str(ROOT / "examples" / "slurm" / script)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def until(self, note: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not (self.notes / note).exists():
            assert time.monotonic() < end and self.process.poll() is None, note
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output.decode()

    def note(self, name: str) -> str:
        path = self.notes / name
        return path.read_text().strip() if path.exists() else ""


def option(line: str, name: str) -> str:
    """Value of --name=value in a command line."""
    found = re.search(rf"--{name}=(\S+)", line)
    assert found, f"{name} not in {line}"
    return found[1]


def test_a_split_job_trains_on_the_first_nodes_and_serves_on_the_others(tmp_path: Path) -> None:
    job = Job(tmp_path, "disaggregated.sbatch", TRAIN_ENDS="1")
    code, output = job.end()
    assert code == 0 and not job.note("requeued"), output
    train, servers = job.note("train"), job.note("servers")
    assert option(train, "nodelist") == "n1,n2,n3" and option(servers, "nodelist") == "n4"
    assert option(train, "nnodes") == "3" and option(train, "rdzv-endpoint") == "n1:29400"
    assert option(train, "rdzv-id") == "job_17_attempt_0" and option(train, "nproc-per-node") == "8"
    urls = "http://n4:30000,http://n4:30001"
    assert f"actor_rollout_ref.rollout.sglang.servers=[{urls}]" in train
    assert job.note("waited").endswith(urls.replace(",", " "))
    assert (job.notes / "servers_ended").exists()
    assert (tmp_path / "run" / "logs" / "job_17_attempt_0").is_dir()


def test_a_colocated_job_uses_all_nodes_for_both(tmp_path: Path) -> None:
    job = Job(tmp_path, "colocated.sbatch", TRAIN_ENDS="1")
    assert job.end()[0] == 0
    assert option(job.note("train"), "nodelist") == "n1,n2,n3,n4" and option(job.note("servers"), "ntasks") == "8"
    assert len(job.note("waited").split("http://")) == 1 + 8


def test_a_run_that_starts_its_own_servers_gets_none_from_the_script(tmp_path: Path) -> None:
    job = Job(tmp_path, "colocated.sbatch", TRAIN_ENDS="1", FLEET="run", MODEL="")
    assert job.end()[0] == 0 and not job.note("servers") and not job.note("waited")
    assert "servers=" not in job.note("train") and "model.path" not in job.note("train")
    assert "sglang.launch.host={node}" in job.note("train")


def test_a_ray_fleet_starts_one_task_per_node(tmp_path: Path) -> None:
    job = Job(tmp_path, "disaggregated.sbatch", TRAIN_ENDS="1", FLEET="ray", TRAIN_NODES="1")
    assert job.end()[0] == 0
    servers = job.note("servers")
    assert servers.endswith("examples/slurm/ray_node.sh") and option(servers, "ntasks") == "3"


@pytest.mark.parametrize("script", ["colocated.sbatch", "disaggregated.sbatch"])
def test_a_stop_signal_lets_the_ranks_save_and_requeues_the_job(tmp_path: Path, script: str) -> None:
    job = Job(tmp_path, script, SLURM_RESTART_COUNT="4")
    job.until("training")
    job.process.send_signal(signal.SIGTERM)
    job.end()
    assert job.note("requeued") == "17" and (job.notes / "saved").exists() and (job.notes / "servers_ended").exists()
    assert (tmp_path / "run" / "logs" / "job_17_attempt_4").is_dir()


def test_a_stop_signal_during_the_wait_for_servers_requeues_without_training(tmp_path: Path) -> None:
    job = Job(tmp_path, "colocated.sbatch", NEVER_READY="1")
    job.until("waiting")
    job.process.send_signal(signal.SIGTERM)
    job.end()
    assert job.note("requeued") == "17" and not job.note("train")


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"TRAIN_ENDS": "1", "TRAIN_CODE": "3"}, 3), ({"READY_CODE": "1"}, 1)],
    ids=["training fails", "servers do not come"],
)
def test_a_failure_is_the_job_s_and_is_not_tried_again(tmp_path: Path, settings: dict[str, str], code: int) -> None:
    job = Job(tmp_path, "disaggregated.sbatch", **settings)
    assert job.end()[0] == code and not job.note("requeued") and (job.notes / "servers_ended").exists()


def stopped(job: Job) -> tuple[int, str]:
    job.until("training")
    job.process.send_signal(signal.SIGTERM)
    return job.end()


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"TRAIN_CODE": "1"}, 1, "stop signal"),
        ({"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "2"}, 0, "2 restarts are used up"),
    ],
    ids=["could not save", "restarts used up"],
)
def test_what_a_stop_signal_does_not_requeue(tmp_path: Path, settings: dict[str, str], code: int, text: str) -> None:
    job = Job(tmp_path, "disaggregated.sbatch", **settings)
    found, output = stopped(job)
    assert found == code and text in output and not job.note("requeued")


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("disaggregated.sbatch", {"TRAIN_NODES": "4"}), ("disaggregated.sbatch", {"FLEET": "k8s"}),
        ("disaggregated.sbatch", {"MODEL": ""}), ("colocated.sbatch", {"FLEET": "ray"}),
        ("colocated.sbatch", {"MODEL": ""}),
    ],
)  # fmt: skip
def test_bad_settings_are_named(tmp_path: Path, script: str, settings: dict[str, str]) -> None:
    job = Job(tmp_path, script, **settings)
    code, output = job.end()
    assert code != 0 and next(iter(settings)) in output and not job.note("train")


def run_server(tmp_path: Path, seconds: float = 20.0) -> Callable[..., str]:
    """Run server.sh with a program that notes its arguments and ends."""

    def run(**settings: str) -> str:
        note = tmp_path / "server"
        program = tmp_path / "program"
        program.write_text(f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $@" >> {note}\n')
        program.chmod(0o755)
        environment = {
            "PATH": os.environ["PATH"], "SERVER_PROGRAM": str(program), "MODEL": "/models/m", "SERVER_TP": "4",
            "SERVER_PORT": "30000", "SERVER_OPTIONS": "--tp 4", "SERVER_RESTARTS": "0", "SLURM_LOCALID": "1",
            **settings,
        }  # fmt: skip
        command = ["bash", str(ROOT / "examples" / "slurm" / "server.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=seconds, check=False)
        assert done.returncode == 1
        return note.read_text().strip()

    return run


def test_a_server_takes_its_share_of_the_gpus_and_its_own_port(tmp_path: Path) -> None:
    assert run_server(tmp_path)() == "4,5,6,7 --model-path /models/m --host 0.0.0.0 --port 30001 --tp 4"
