"""Files of measured numbers."""

import json
import os
import platform
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from bench.results import read_results, write_results
from fi_runtime.config import ConfigError

ROWS = [{"zeta": 1, "alpha": 2.5, "backend": "fa2"}, {"zeta": 2, "alpha": 3.5, "backend": "fa3"}]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "h100" / "numbers.json"
    write_results(path, ROWS, "python -m bench.numbers")
    return path


def test_what_is_written_is_read_back_in_its_order(written: Path) -> None:
    results = read_results(written)
    assert list(results) == ["machine", "gpu", "date", "versions", "command", "rows"]
    assert results["rows"] == ROWS
    assert [list(row) for row in results["rows"]] == [list(row) for row in ROWS]
    assert results["command"] == "python -m bench.numbers"


def test_it_says_when_and_with_what_it_was_measured(written: Path) -> None:
    results = read_results(written)
    age = datetime.now(UTC) - datetime.fromisoformat(results["date"])
    assert timedelta(seconds=-1) <= age < timedelta(minutes=5)
    assert results["versions"]["python"] == platform.python_version()
    assert results["versions"]["numpy"] == np.__version__
    assert all(results["versions"].values())
    assert re.search(r", \d+ cores, \d+ GiB$", results["machine"])


def test_it_does_not_say_whose_machine_it_was(written: Path) -> None:
    facts = json.dumps({k: v for k, v in read_results(written).items() if k != "rows"})
    assert socket.gethostname() not in facts
    assert str(Path.home()) not in facts
    assert os.fspath(written.parent) not in facts


def test_a_second_run_replaces_the_first(written: Path) -> None:
    write_results(written, ROWS[:1], "again")
    assert read_results(written)["rows"] == ROWS[:1]


@pytest.mark.parametrize("text", [None, "", "[1]", '{"date": 1}', "{"])
def test_another_file_is_refused_by_its_name(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other\.json"):
        read_results(path)
