"""Set up everything that `make serve` and `make test` need, once, inside this folder.

    .venv/      the virtual environment: requirements.lock's versions of what pyproject.toml names,
                and bin/tritonserver, bin/perf_analyzer: thin wrappers
    .triton/    the real tritonserver with its Python backend, out of a wheel, and perf_analyzer

No step needs root. A step that is done leaves a stamp with a hash of what went into it and is
skipped the next time. Run by the machine's own Python, so: standard library only.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SUPPORTED = ((3, 11), (3, 12))
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"


def use_supported_python() -> None:
    """Go on in the Python that the user chose, .venv is made of, runs this, or is on PATH."""
    supported = sys.version_info[:2] in SUPPORTED
    if not os.environ.get("PYTHON") and sys.prefix != str(VENV):
        others = [] if supported else [shutil.which("python3.12"), shutil.which("python3.11")]
        for path in filter(None, [str(VENV_PYTHON), *others]):
            # A launcher of a version manager, or a .venv, outlives the Python behind it: try it.
            with contextlib.suppress(OSError):
                if subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL) == 0:
                    os.execv(path, [path, *sys.argv])
    if supported:
        return
    sys.exit(
        "setup: found Python {}.{} ({}); Python 3.11 or 3.12 is needed. Install one of them, or "
        "name it: make PYTHON=/path/to/python3.12 ...".format(*sys.version_info[:2], sys.executable)
    )


if __name__ == "__main__":
    # Before anything below: an old Python parses the annotations but could not evaluate them.
    use_supported_python()

import argparse
import fcntl
import hashlib
import importlib.util
import json
import platform
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TRITON = ROOT / ".triton"
LOCK = ROOT / "requirements.lock"
PYPI = "https://pypi.org/simple"

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")  # in NVIDIA's Triton container
# Carries tritonserver 2.51 and a stub for each Python.
SERVER_WHEEL = (
    "nvidia-pytriton==0.7.0 "
    "--hash=sha256:21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
)
# The last one whose perf_analyzer runs on glibc 2.36.
PERF_WHEEL = (
    "tritonclient==2.50.0 "
    "--hash=sha256:421fbb69ae6ab8cdb2c35b82134fcef2fe11e7af7718b1fcbc53335ab9bfe889"
)
MIN_GLIBC = (2, 35)  # what SERVER_WHEEL was built for

# `make lock` takes the newest version of everything but these.
HELD = (
    "torch==2.13.0",  # a version that has both a CPU and a CUDA build for 3.11 and 3.12
    "flashinfer-python==0.6.18.post1",  # what docs/BENCHMARKS.md measured
    "numpy==1.26.4",  # the stub in SERVER_WHEEL was built for numpy 1: with 2 it garbles inputs
)
# torch's own sub-packages: it pins them itself where its CUDA build is installed.
NOT_LOCKED = re.compile(
    r"(nvidia-(?!cudnn-frontend|cutlass|ml-py).*|triton|cuda-toolkit|fi-runtime)"
)

SERVER_WRAPPER = """\
#!/bin/sh
# tritonserver with this project's Python: the stub takes its packages from the python3 on PATH.
bin=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
export PATH="$bin:$PATH"
container={container}
if [ -x "$container" ]; then exec "$container" "$@"; fi
triton=$bin/../../.triton/server/pytriton/tritonserver
exec "$triton/bin/tritonserver" --backend-directory="$triton/backends" "$@"
"""

PERF_WRAPPER = """\
#!/bin/sh
# perf_analyzer with the libraries it was built against.
perf=$(cd "$(dirname "$(readlink -f "$0")")/../../.triton/perf" && pwd)
export LD_LIBRARY_PATH="$perf/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$perf/bin/perf_analyzer" "$@"
"""


class SetupError(Exception):
    """Something the user has to act on; the message says what was found and what to do."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--extras",
        nargs="*",
        default=[],
        choices=["bench", "gpu", "test"],
        help="gpu: also without a GPU",
    )
    parser.add_argument("--perf", action="store_true", help="install perf_analyzer, too")
    parser.add_argument("--packages", action="store_true", help="only the Python packages")
    parser.add_argument("--lock", action="store_true", help="write requirements.lock anew instead")
    arguments = parser.parse_args()
    try:
        with only_one():
            if arguments.lock:
                write_lock()
            else:
                check_platform()
                set_up_packages({*arguments.extras, *(["gpu"] if has_gpu() else [])})
                if not arguments.packages:
                    install_server()
                if arguments.perf:
                    install_perf_analyzer()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the same command goes on where this one stopped")


# Steps


def set_up_packages(extras: set[str]) -> None:
    """Make .venv and install the project into it, editable, with these extras."""
    inputs = digest(LOCK, ROOT / "pyproject.toml", Path(__file__))
    interpreter = f"{sys.base_prefix} {platform.python_version()} {ROOT}"
    made = Stamp(VENV / ".stamp-venv", interpreter)
    installed = Stamp(VENV / ".stamp-packages", inputs)
    unfinished = VENV / ".unfinished"  # an interrupted pip can leave half a package behind

    if unfinished.exists() or not made.is_done():
        say(f"virtual environment: .venv, Python {platform.python_version()}")
        make_venv()
        made.write()
    had = installed.note.split()
    if installed.is_done() and extras <= set(had):
        return
    wanted = ",".join(sorted(extras | set(had)))
    say(f"Python packages: requirements.lock{f' [{wanted}]' if wanted else ''}")
    unfinished.touch()
    project = f"{ROOT}[{wanted}]" if wanted else str(ROOT)
    install_locked("setuptools")  # builds the project, offline and pinned
    install_locked("--no-build-isolation", "--editable", project)
    unfinished.unlink()
    installed.write(wanted.replace(",", " "))


def install_locked(*what: str) -> None:
    """Install what the lock says, as wheels alone, and refuse one whose hash is not in it.

    pip itself checks hashes only where it has one for everything, the project's folder and torch's
    CUDA packages included. A wheel runs nothing before it is imported, so after is soon enough.
    """
    with tempfile.TemporaryDirectory() as folder:
        versions, report = Path(folder) / "versions", Path(folder) / "report.json"
        pins = read_lock()
        versions.write_text("".join(f"{name}=={pins[name][0]}\n" for name in pins))
        options = ["--only-binary=:all:", "--constraint", versions, "--report", report]
        pip("install", *options, *what)
        for package in json.loads(report.read_text())["install"]:
            check_hash(package, pins)


def check_hash(package: "dict[str, Any]", pins: "dict[str, tuple[str, set[str]]]") -> None:
    """Refuse a package, as pip's report says it, that came with another hash than the lock's."""
    name, version = canonical(package["metadata"]["name"]), package["metadata"]["version"]
    # A local version, as torch's +cpu, is another index's own build, of which PyPI knows nothing.
    if name not in pins or "+" in version:
        return
    download = package["download_info"]
    found = download.get("archive_info", {}).get("hashes", {}).get("sha256", "none")
    if found not in pins[name][1]:
        raise SetupError(
            f"{download['url']} has the sha256 {found}, which requirements.lock does not have for "
            f"{name} {version}; do not use .venv. If the index is to be trusted: make lock"
        )


def install_server() -> None:
    """Put tritonserver under .triton, unless the container has one, and its wrapper in .venv."""
    write_script(VENV / "bin" / "tritonserver", SERVER_WRAPPER.format(container=CONTAINER_SERVER))
    if CONTAINER_SERVER.exists():
        return
    unpack_server_wheel()
    stamp = Stamp(
        TRITON / ".stamp-stub", f"{digest(Path(__file__))} {sys.base_prefix} {sys.version}"
    )
    if stamp.is_done():
        return
    say("Python backend: stub and libpython")
    server = TRITON / "server" / "pytriton" / "tritonserver"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    version = "{}.{}".format(*sys.version_info[:2])
    replace(stub, (server / "python_backend_stubs" / version / stub.name).read_bytes())
    # The folder that the stub's run path names, so that no LD_LIBRARY_PATH leaks to its children.
    link(find_libpython(), TRITON / "server" / "nvidia_pytriton.libs" / libpython_name())
    check_libraries(server / "bin" / "tritonserver")
    check_libraries(stub)
    stamp.write()


def install_perf_analyzer() -> None:
    """Put perf_analyzer under .triton, with the libraries it asks for by name, and its wrapper."""
    unpack_server_wheel()  # its libraries serve here, too
    write_script(VENV / "bin" / "perf_analyzer", PERF_WRAPPER)
    stamp = Stamp(TRITON / ".stamp-perf", digest(Path(__file__)))
    if stamp.is_done():
        return
    say(f"perf_analyzer: from {PERF_WHEEL.split()[0]}")
    perf = TRITON / "perf"
    with unpacked_wheel(PERF_WHEEL) as wheel:
        replace(perf / "bin" / "perf_analyzer", (wheel / "bin" / "perf_analyzer").read_bytes())
    libraries = TRITON / "server" / "nvidia_pytriton.libs"
    for wanted, carried in {
        "libb64.so.0d": "libb64-*.so.0d",
        "libcudart.so.12": "libcudart-*.so.12.*",
        "libssl.so.3": "libssl-*.so.3",
        "libcrypto.so.3": "libcrypto-*.so.3",
    }.items():
        link(next(libraries.glob(carried)), perf / "lib" / wanted)
    check_libraries(perf / "bin" / "perf_analyzer", perf / "lib")
    stamp.write()


def unpack_server_wheel() -> None:
    """Unpack the wheel that carries tritonserver into .triton/server."""
    stamp = Stamp(TRITON / ".stamp-server", SERVER_WHEEL)
    if stamp.is_done():
        return
    say(f"tritonserver: from {SERVER_WHEEL.split()[0]}, in .triton")
    with unpacked_wheel(SERVER_WHEEL) as wheel:
        for unused in wheel.glob("nvidia_pytriton.libs/libpython*"):
            unused.unlink()
        shutil.rmtree(TRITON / "server", ignore_errors=True)
        wheel.rename(TRITON / "server")
    stamp.write()


def write_lock() -> None:
    """Resolve pyproject.toml with all its extras anew, and write what came out to the lock."""
    wanted = [f"{ROOT}[bench,gpu,test]", "setuptools", *HELD]
    names = {}
    for package in dry_run(*wanted):
        name = canonical(package["metadata"]["name"])
        if not NOT_LOCKED.fullmatch(name):
            # +cpu: a build, not a version
            names[name] = package["metadata"]["version"].partition("+")[0]
    pins = [f"{n}=={v}" for n, v in sorted(names.items())]
    hashes = wheel_hashes(pins)
    head = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    lines = [" ".join([pin, *(f"--hash=sha256:{h}" for h in hashes[pin])]) for pin in pins]
    LOCK.write_text("\n".join([*head, *lines]) + "\n")
    say(f"requirements.lock: {len(names)} packages")


def wheel_hashes(pins: "list[str]") -> "dict[str, list[str]]":
    """Of PyPI's wheels of these versions, those that the supported Pythons would take here."""
    found: dict[str, set[str]] = {}
    tags = [f"manylinux_2_{minor}" for minor in range(MIN_GLIBC[1], 4, -1)]
    tags += ["manylinux2014", "manylinux2010", "manylinux1", "linux"]
    options = ["--no-deps", "--only-binary=:all:", "--index-url", PYPI, "--target", "unused"]
    options += [f"--platform={tag}_x86_64" for tag in tags]
    # Not what this machine's pip is told of other indexes: their builds may be others.
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        os.environ.pop(name, None)
    os.environ["PIP_CONFIG_FILE"] = os.devnull
    for version in SUPPORTED:
        python = "--python-version={}.{}".format(*version)
        for package in dry_run(*options, python, *pins):
            metadata = package["metadata"]
            pin = f"{canonical(metadata['name'])}=={metadata['version']}"
            found.setdefault(pin, set()).add(
                package["download_info"]["archive_info"]["hashes"]["sha256"]
            )
    return {pin: sorted(hashes) for pin, hashes in found.items()}


# Parts


class Stamp:
    """A file that says that a step is done, and with which inputs."""

    def __init__(self, path: Path, inputs: str) -> None:
        self.path = path
        self.inputs = inputs.replace("\n", " ")

    def is_done(self) -> bool:
        """Whether the step was finished with these inputs."""
        return self._lines()[0] == self.inputs

    @property
    def note(self) -> str:
        """What the step left for its next run, whatever its inputs were."""
        return self._lines()[1]

    def write(self, note: str = "") -> None:
        """Say that the step is done."""
        self.path.write_text(f"{self.inputs}\n{note}\n")

    def _lines(self) -> list[str]:
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        return [*lines, "", ""][:2]


def read_lock() -> "dict[str, tuple[str, set[str]]]":
    """The lock's version and sha256 hashes of each package."""
    pins = {}
    for line in LOCK.read_text().splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split(" --hash=sha256:")
            name, _, version = pin.partition("==")
            pins[name] = (version, set(hashes))
    return pins


def canonical(name: str) -> str:
    """A package's name as the lock spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def dry_run(*arguments: str) -> "list[dict[str, Any]]":
    """What pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--report", report, *arguments)
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return installs


def make_venv() -> None:
    """Make .venv from scratch, with pip, also where Debian has split ensurepip off."""
    base = os.path.realpath(sys.executable)  # this may run in the .venv that is to be replaced
    make = [base, "-m", "venv", "--clear", str(VENV)]
    if importlib.util.find_spec("ensurepip"):
        return run(make, "could not make the virtual environment")
    run([*make, "--without-pip"], "could not make the virtual environment")
    advice = "install pip's module ensurepip (Debian, Ubuntu: apt-get install python3-venv)"
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch_debian_file("python3-pip-whl", "pip-*.whl", Path(folder), advice)
        pip_in_wheel = [str(VENV_PYTHON), f"{wheel}/pip", "install", "--no-index", str(wheel)]
        return run(pip_in_wheel, f"could not install pip; {advice}")


def find_libpython() -> Path:
    """The shared library of this Python that the stub links; Debian's package where it has none."""
    name = libpython_name()
    folders = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", "/usr/lib64")
    for folder in filter(None, folders):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    package = name.partition(".so")[0]
    say(f"{name}: not on this machine, taking it out of the package {package}")
    advice = (
        f"Triton's Python backend needs {name}: install it (Debian, Ubuntu: apt-get install "
        f"{package}; Fedora: dnf install python3-libs), or use a Python built with --enable-shared"
    )
    return fetch_debian_file(package, f"{name}*", TRITON / "libpython", advice)


def libpython_name() -> str:
    """The name under which the stub asks for its Python."""
    return "libpython{}.{}.so.1.0".format(*sys.version_info[:2])


def fetch_debian_file(package: str, pattern: str, folder: Path, advice: str) -> Path:
    """Take a file out of a Debian package into folder, with apt but without root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError(advice)
    with tempfile.TemporaryDirectory() as temporary:
        state = Path(temporary)
        for needed in ("lists/partial", "cache/archives/partial", "package"):
            (state / needed).mkdir(parents=True)
        # Lists and cache of its own: the machine's need root, and are often empty in a container.
        apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={state}/lists"]
        apt += ["-o", f"Dir::Cache={state}/cache", "-o", f"APT::Sandbox::User={user_name()}"]
        run([*apt, "update"], f"could not read Debian's package lists; {advice}")
        run([*apt, "download", package], f"could not download {package}; {advice}", cwd=state)
        archive = next(state.glob("*.deb"))
        run(["dpkg-deb", "-x", str(archive), f"{state}/package"], f"could not unpack {archive}")
        found = next((p for p in (state / "package").rglob(pattern) if p.is_file()), None)
        if found is None:
            raise SetupError(f"no {pattern} in {archive.name}; {advice}")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(found, folder))


def check_platform() -> None:
    """Refuse a machine that the pinned tritonserver cannot run on."""
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        raise SetupError(f"found {system}; the pinned tritonserver is built for Linux x86_64 only")
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < MIN_GLIBC:
        raise SetupError(
            f"found {library or 'a C library other than glibc'} {version}; tritonserver needs "
            "glibc 2.35 or newer: Debian 12, Ubuntu 22.04, Fedora 36 or later"
        )


def check_libraries(binary: Path, *folders: Path) -> None:
    """Refuse a program whose shared libraries are not all here, and name them."""
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}
    listing = subprocess.run(
        ["ldd", str(binary)], env=environment, capture_output=True, text=True, check=False
    )
    missing = re.findall(r"(\S+) => not found", listing.stdout)
    if missing:
        raise SetupError(
            f"{binary.name} needs {', '.join(missing)}, not found on this machine; install what "
            "provides it (Debian, Ubuntu: apt-get install libstdc++6 zlib1g libexpat1)"
        )


@contextlib.contextmanager
def unpacked_wheel(requirement: str) -> Iterator[Path]:
    """A folder under .triton with one wheel's files in it, gone afterwards unless it was moved."""
    TRITON.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TRITON, ignore_cleanup_errors=True) as folder:
        target, wanted = Path(folder) / "wheel", Path(folder) / "wanted"
        wanted.write_text(requirement)  # a hash cannot be said on the command line
        pip("install", "--no-deps", "--only-binary=:all:", "--target", target, "-r", wanted)
        yield target


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Wait until no other set-up works in this folder."""
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pip(*arguments: object) -> None:
    """Run the virtual environment's pip; its own output is the progress."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    run(command, "pip failed, see above; check the network and the disk, then run this again")


def run(command: list[str], problem: str, cwd: Path = ROOT) -> None:
    """Run a command in the foreground; say what the problem is when it fails."""
    if subprocess.run(command, cwd=cwd, check=False).returncode != 0:
        raise SetupError(problem)


def digest(*files: Path) -> str:
    """One hash of the contents of these files."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def link(target: Path, name: Path) -> None:
    """Make or replace a symbolic link."""
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    name.symlink_to(target)


def write_script(path: Path, text: str) -> None:
    """Write an executable file, unless it is there as it should be."""
    if not path.exists() or path.read_text() != text:
        replace(path, text.encode())


def replace(program: Path, content: bytes) -> None:
    """Put an executable file in place whole, also where a process runs the one before it."""
    program.parent.mkdir(parents=True, exist_ok=True)
    new = program.with_name(f"{program.name}.new")
    new.write_bytes(content)
    new.chmod(0o755)
    new.replace(program)


def has_gpu() -> bool:
    """Whether an NVIDIA driver is at work here."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def user_name() -> str:
    """Who apt runs as: the user who calls it, not one who may not read a private folder."""
    return "root" if os.geteuid() == 0 else ""


def say(message: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} setup: {message}", flush=True)


if __name__ == "__main__":
    main()
