"""The command line entry: quick help, only the chosen module imported, readable errors."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from spear_megatron.__main__ import COMMANDS, main

HEAVY = ("torch", "transformers", "megatron", "ray", "sglang", "matplotlib", "omegaconf")


def command_module(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[str]:
    """Stands in for the module of ``train``; returns the steps it went through."""
    calls: list[str] = []
    module = types.ModuleType("spear_megatron.cli.train")

    def run(args: object) -> int:
        calls.append("run")
        if error is not None:
            raise error
        return 7

    module.add_arguments = lambda parser: parser.add_argument("--config")  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spear_megatron.cli.train", module)
    return calls


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from spear_megatron.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert time.process_time() < 0.6, time.process_time()\n"  # about 0.1 s; torch alone takes over 1 s
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", ["view", "plot", "doctor"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from spear_megatron.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]" and "usage:" in done.stdout


def test_the_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_module(monkeypatch) == [] and main(["train", "--config", "x"]) == 7


@pytest.mark.parametrize("error", [ValueError("bad\n  key"), FileNotFoundError("bad key"), PermissionError("bad key")])
def test_user_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    command_module(monkeypatch, error)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "error: bad key\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command_module(monkeypatch, ValueError("bad key"))
    with pytest.raises(ValueError, match="bad key"):
        main(["train", "--debug"])


def test_a_run_that_cannot_go_on_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spear_megatron.checkpoint.errors import CheckpointError
    from spear_megatron.parallel.errors import RunTimeout

    for error in (CheckpointError("disk is\n full"), RunTimeout("disk is full")):
        command_module(monkeypatch, error)
        assert main(["train"]) == 1
        assert capsys.readouterr().err == "error: disk is full\n"


@pytest.mark.parametrize("error", [RuntimeError("broken"), ConnectionResetError("peer"), OSError("disk")])
def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    command_module(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["train"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command_module(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["view"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error() -> None:
    script = f"{sys.executable} -m spear_megatron --help | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_an_interrupted_training_tells_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spear_megatron.cli.train.load_config", interrupt)
    assert main(["train"]) == 130
    told = capsys.readouterr().err
    assert told.startswith("interrupted: the same command continues") and "SIGTERM saves first" in told
