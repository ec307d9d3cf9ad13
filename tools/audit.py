"""Check what is installed against requirements.lock.

    python -m tools.audit

Every pin has a version and hashes, so have the two wheels with Triton's own programs, and what is
installed in .venv is of those versions: tools/setup.py has refused every other hash. Where
pip-audit is on PATH or in .venv, it is asked for known vulnerabilities, for which it needs the
network.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from tools import setup

HASH = re.compile(r"[0-9a-f]{64}")
VERSION = re.compile(r"[0-9][0-9a-z.]*")


def lock_problems(pins: dict[str, tuple[str, set[str]]]) -> Iterator[str]:
    """What is no exact version, or has no hash."""
    for name, (version, hashes) in pins.items():
        if not VERSION.fullmatch(version):
            yield f"{name}: {version!r} is no exact version"
        if not hashes or not all(map(HASH.fullmatch, hashes)):
            yield f"{name}=={version}: has no sha256, or one that is none; run: make lock"


def installed_problems(
    pins: dict[str, tuple[str, set[str]]], installed: dict[str, str]
) -> Iterator[str]:
    """What is installed in another version; ``installed``: versions by name."""
    for name, version in sorted(installed.items()):
        # +cpu: a build, not a version
        if name in pins and version.partition("+")[0] != pins[name][0]:
            yield f"{name}: {version} is installed, the lock has {pins[name][0]}; run: make setup"


def installed_versions() -> dict[str, str]:
    """Of all packages in this Python's environment, by the lock's spelling of their names."""
    return {
        setup.canonical(one.metadata["Name"]): one.version
        for one in importlib.metadata.distributions()
    }


def main() -> int:
    """Say what was checked; the exit code is 1 where something is wrong."""
    pins = setup.read_lock()
    for wheel in (setup.SERVER_WHEEL, setup.PERF_WHEEL):
        pin, *hashes = wheel.split(" --hash=sha256:")
        pins[f"the wheel of {pin}"] = (pin.partition("==")[2], set(hashes))
    installed = installed_versions()
    problems = [*lock_problems(pins), *installed_problems(pins, installed)]
    for problem in problems:
        print(f"audit: {problem}")
    known = sorted(pins.keys() & installed.keys())
    print(f"audit: {len(pins)} pins, {len(known)} of them installed, {len(problems)} problems")
    beside = str(setup.VENV / "bin" / "pip-audit")
    program = shutil.which("pip-audit") or shutil.which(beside)
    if program is None:
        print("audit: known vulnerabilities not looked for: no pip-audit on PATH or in .venv/bin")
        return 1 if problems else 0
    command = [program, "--disable-pip", "--require-hashes", "--requirement", str(setup.LOCK)]
    return max(1 if problems else 0, subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
