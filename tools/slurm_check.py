"""Run the batch scripts of examples/slurm on a real SLURM of this machine: launch, stop signal, requeue, resume, end.

    python tools/slurm_check.py [colocated] [disaggregated]

Starts munged (if none runs), slurmctld and two slurmd with their files in --work, submits each script with a tiny
model, CPU ranks and servers that speak SGLang's HTTP without a model, sends the batch shell SIGTERM after the second
step, and checks that the job saved, went back to the queue, continued in the same run directory to the last step, and
left one log folder per attempt. Needs root and the packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run_folder import renew_folder  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Node names that need no name service: every slurmd is an address of the loopback interface.
NODES = ("127.0.0.2", "127.0.0.3")
STEPS, STOP_AFTER = 40, 2  # a step takes a tenth of a second on a quiet machine, the way of the signal seconds
DEADLINE_S = 300.0
TRAIN_OPTIONS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1", "trainer.logger=[console]", "trainer.save_hf=false",
    f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1", "trainer.test_freq=-1",
    "trainer.val_before_train=false", "trainer.collective_timeout_s=60", "data.generator.num_train=16",
    "data.max_prompt_length=64", "data.max_response_length=12", "data.train_batch_size=2",
    "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=1", "env.sandbox.preload=[]",
    "actor_rollout_ref.actor.enable_trajectory_replay=false",
    # The stand-in servers compute nothing that could be compared with the trainer.
    "actor_rollout_ref.rollout.sglang.weights.probe_prompts=0",
)  # fmt: skip
CONF = """ClusterName=check
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A requeued job starts when the credentials of its earlier attempt have expired.
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmUser=root
StateSaveLocation={work}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd_%n.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd_%n.log
SwitchType=switch/none
ReturnToService=2
KillWait=30
{nodes}
PartitionName=all Nodes={names} Default=YES State=UP MaxTime=INFINITE
"""


class Cluster:
    """munged, slurmctld and slurmd of this machine, all stopped at the end."""

    def __init__(self, work: Path, port: int) -> None:
        self._work = work
        self._processes: list[subprocess.Popen[bytes]] = []
        # Its sockets lie in it, whose paths may have 108 bytes.
        self._spool = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.environment = {**os.environ, "SLURM_CONF": str(work / "slurm.conf")}
        (work / "state").mkdir(parents=True)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port + 1 + number} CPUs={os.cpu_count()} "
            "RealMemory=1000 State=UNKNOWN"
            for number, name in enumerate(NODES)
        ]
        text = CONF.format(port=port, work=work, spool=self._spool, nodes="\n".join(lines), names=",".join(NODES))
        (work / "slurm.conf").write_text(text)

    def __enter__(self) -> Cluster:
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            self._start(["runuser", "-u", "munge", "--", "munged", "--foreground"])
            wait_until(lambda: Path("/run/munge/munge.socket.2").exists(), "munged", 20)
        self._start(["slurmctld", "-D", "-c"])
        for name in NODES:
            self._start(["slurmd", "-D", "-N", name])
        wait_until(lambda: self.call("sinfo", "-h", "-o", "%T").split() == ["idle"], "idle nodes", 60)
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self._spool, ignore_errors=True)

    def _start(self, command: Sequence[str]) -> None:
        log = (self._work / f"{command[0]}_{len(self._processes)}.out").open("w")
        self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def call(self, *command: str, **settings: str) -> str:
        """Output of a SLURM command; empty when it fails."""
        environment = {**self.environment, **settings}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            print(f"{' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows about a job."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens at.

    Raises:
        OSError: there are none between 17500 and 18500.
    """
    for first in range(17500, 18500, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise OSError(f"no {count} free ports in a row between 17500 and 18500: give --port")


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait.

    Raises:
        TimeoutError: names what did not come.
    """
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come in {deadline_s:.0f} s")
        time.sleep(0.3)


def recorded(run_dir: Path) -> list[int]:
    """Steps of the record."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(json.loads(line)["step"]) for line in lines]


def settings_of(script: str, run_dir: Path, model: Path) -> dict[str, str]:
    """Environment of a submission: CPU ranks, and servers without a model."""
    return {
        "CONFIG": "configs/quickstart_grpo.yaml", "MODEL": str(model), "RUN_DIR": str(run_dir),
        "PYTHON": sys.executable, "RANKS_PER_NODE": "1", "TRAIN_NODES": "1", "SERVERS_PER_NODE": "1",
        "SERVER_TP": "1", "SERVER_USES_GPU": "0", "SERVER_OPTIONS": "--bind-node",
        "SERVER_PROGRAM": f"{sys.executable} -m spear_megatron.testing.serve_fake", "SERVER_RESTARTS": "0",
        "READY_DEADLINE_S": "120", "GRACE_S": "120", "TRAIN_OPTIONS": " ".join(TRAIN_OPTIONS),
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "NO_COLOR": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def check(cluster: Cluster, script: str, work: Path, model: Path) -> Mapping[str, object]:
    """Submit one script, stop it once, and follow it to its end.

    Raises:
        TimeoutError: it got stuck.
        AssertionError: it did something else than it should.
    """
    run_dir = work / script
    number = cluster.call(
        "sbatch", "--parsable", f"--nodes={len(NODES)}", "--gpus-per-node=0", f"--output={work / script}.out",
        f"examples/slurm/{script}.sbatch", **settings_of(script, run_dir, model),
    )  # fmt: skip
    assert number, "sbatch refused the script"
    ended = ("COMPLETED", "FAILED", "CANCELLED")

    def is_over() -> bool:
        job = cluster.job(number)
        return job.get("JobState") in ended or "held" in job.get("Reason", "").lower()

    wait_until(lambda: len(recorded(run_dir)) >= STOP_AFTER or is_over(), "the second step")
    assert len(recorded(run_dir)) >= STOP_AFTER, f"the job ended before the second step: see {run_dir}/logs"
    cluster.call("scancel", "--batch", "--signal=TERM", number)
    wait_until(lambda: cluster.job(number).get("Restarts") == "1", "the requeue")
    stopped_at = recorded(run_dir)
    wait_until(lambda: cluster.job(number).get("JobState") in ended, "the end")
    job, steps = cluster.job(number), recorded(run_dir)
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert job["JobState"] == "COMPLETED", f"the job ended as {job['JobState']}, exit code {job['ExitCode']}"
    assert stopped_at[-1] < STEPS, "the stop came after the last step: nothing was tested"
    assert steps == list(range(1, STEPS + 1)), f"recorded steps {steps}"
    assert logs == [f"job_{number}_attempt_{attempt}" for attempt in range(2)], f"log folders {logs}"
    second = "".join(path.read_text() for path in (run_dir / "logs" / logs[1]).glob("train_*.log"))
    assert f"continuing after step {stopped_at[-1]}" in second, "the second attempt did not continue"
    return {"script": script, "stopped after step": stopped_at[-1], "recorded steps": steps, "logs": logs}


def main(argv: Sequence[str] | None = None) -> int:
    """Check the scripts; exit code 0 when each did what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=["colocated", "disaggregated"], help="which to check")
    parser.add_argument("--work", type=Path, default=Path("outputs/slurm_check"), help="folder, replaced")
    parser.add_argument("--port", type=int, help="first of three ports for SLURM (default: free ones)")
    args = parser.parse_args(argv)
    there = sorted(path.stem for path in (ROOT / "examples" / "slurm").glob("*.sbatch"))
    unknown = sorted(set(args.scripts) - set(there))
    if unknown:
        parser.error(f"{', '.join(unknown)}: the scripts are {', '.join(there)}")
    missing = [name for name in ("munge", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid():
        print(f"error: needs root and {', '.join(missing) or 'nothing else'}", file=sys.stderr)
        return 2
    work = args.work.resolve()
    try:
        renew_folder(work)
    except ValueError as error:
        parser.error(f"--work {error}")
    from spear_megatron.data.tiny import make_tiny_model

    with Cluster(work, args.port or free_ports(1 + len(NODES))) as cluster:
        model = make_tiny_model(work / "model", seed=0)
        for script in args.scripts:
            print(json.dumps(check(cluster, script, work, model)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
