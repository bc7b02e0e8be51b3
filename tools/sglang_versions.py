"""The tests with real SGLang servers on other versions than the pinned one.

    python tools/sglang_versions.py                  # all of them, a few minutes each on two quiet cores
    python tools/sglang_versions.py 0.5.15 0.5.23    # these

Every version gets an environment of its own, `.venv-sglang-VERSION`: what requirements/sglang-cpu.txt pins, with the
lines of VERSIONS instead. Prints a line per version; the exit status is 1 where a test failed or took too long.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "requirements" / "sglang-cpu.txt"
VERSIONS: dict[str, dict[str, str]] = {
    "0.5.15": {},
    "0.5.20": {},
    "0.5.23": {"transformers": "5.19.0", "tokenizers": "0.23.2"},
}
"""By version the other packages that it needs in another version than the pinned one."""
INSTALL_S, TESTS_S, END_S = 1200.0, 1800.0, 120.0


def requirements(version: str, others: Mapping[str, str]) -> str:
    """The pinned requirements with another SGLang and ``others`` (versions by package).

    Raises:
        ValueError: a package to replace is not pinned.
    """
    text = PINNED.read_text(encoding="utf-8")
    for package, wanted in {"sglang": version, **others}.items():
        text, count = re.subn(rf"(?m)^{re.escape(package)}==.*$", f"{package}=={wanted}", text)
        if count != 1:
            raise ValueError(f"{PINNED.name} pins {package} {count} times, not once")
    return text


def environment(version: str) -> Path:
    """Python of the version's environment, which is made where there is none of these requirements."""
    folder = ROOT / f".venv-sglang-{version}"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements(version, VERSIONS[version])
    if installed.exists() and installed.read_text(encoding="utf-8") == wanted:
        return python
    asked = folder / "requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=INSTALL_S)
    asked.write_text(wanted, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(asked)]
    subprocess.run(install, check=True, timeout=INSTALL_S)
    asked.replace(installed)
    return python


def run_tests(python: Path) -> tuple[bool, str]:
    """(whether all passed, pytest's last line) of the tests with servers of this environment."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/sglang"]
    environ = {**os.environ, "SPEAR_SGLANG_PYTHON": str(python)}
    tests = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = tests.communicate(timeout=TESTS_S)
    except subprocess.TimeoutExpired:
        tests.send_signal(signal.SIGINT)  # so that pytest ends the servers
        output, _ = tests.communicate(timeout=END_S)
    lines = output.strip().splitlines() or ["no output"]
    if tests.returncode:
        print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), flush=True)
    return tests.returncode == 0, lines[-1]


def main() -> int:
    """Test, print, and tell whether everything passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(VERSIONS)}; default: all")
    versions = parser.parse_args().versions or list(VERSIONS)
    if unknown := [version for version in versions if version not in VERSIONS]:
        parser.error(f"{unknown[0]} is none of {', '.join(VERSIONS)}")
    failed = 0
    for version in versions:
        passed, summary = run_tests(environment(version))
        failed += not passed
        print(f"SGLang {version}: {summary}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
