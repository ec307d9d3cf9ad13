"""What is removed for a stub that cannot do it itself."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from fi_runtime import shared_memory


@pytest.mark.parametrize(
    ("program", "removed"), [("triton_python_backend_stub", True), ("another", False)]
)
def test_only_a_stubs_region_is_removed(tmp_path: Path, program: str, removed: bool) -> None:
    region = shared_memory.FOLDER / f"test-{uuid.uuid4().hex}"
    script = tmp_path / "model.py"
    script.write_text("print(flush=True); input()")
    region.touch()
    try:
        with subprocess.Popen(
            [f"/anywhere/{program}", str(script), region.name],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            # While it is only being loaded, its command is not to be seen yet.
            assert process.stdout is not None
            process.stdout.readline()
            shared_memory.remove_of_stub(process.pid)
            assert region.exists() != removed
            process.communicate(b"\n")
        shared_memory.remove_of_stub(process.pid)  # of one that has ended there is nothing to do
    finally:
        region.unlink(missing_ok=True)
