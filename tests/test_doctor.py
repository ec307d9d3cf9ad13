"""The doctor's report on a machine without a GPU, and how a report is shown."""

import importlib.metadata
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fi_runtime import doctor
from fi_runtime.doctor import Check, DecodeRow, Report, examine, print_report, report_json
from fi_runtime.kernels.library import MANIFEST
from tests.adapters import CONFIG, write_files
from tools.serve import ROOT

MODEL = ROOT / "model_repository" / "llm"
NAMES = [
    "Python",
    "torch",
    "NVIDIA driver",
    "GPU",
    "FlashInfer",
    "shared memory",
    "checkpoint",
    "weights",
    "host memory",
    "cache",
    "prebuilt kernels",
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_version", lambda: None)


def installed_flashinfer(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "flashinfer-python":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def model_folder(folder: Path, checkpoint: str) -> Path:
    folder.mkdir(exist_ok=True)
    line = f'parameters {{ key: "checkpoint" value {{ string_value: "{checkpoint}" }} }}\n'
    (folder / "config.pbtxt").write_text(f'backend: "python"\n{line}', encoding="utf-8")
    return folder


def check(report: Report, name: str) -> Check:
    return next(found for found in report.checks if found.name == name)


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=400)
    print_report(report, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_everything_is_looked_at_without_a_gpu() -> None:
    report = examine(MODEL)
    assert [found.name for found in report.checks] == NAMES
    assert all(found.value for found in report.checks)
    assert check(report, "GPU").value == "none"
    assert "Qwen3ForCausalLM" in check(report, "checkpoint").value
    assert "4 query and 2 key/value heads of 64" in check(report, "checkpoint").value
    assert report.decode == []


def test_json_says_what_the_tables_say() -> None:
    report = examine(MODEL)
    text, parsed = printed(report), json.loads(report_json(report))
    assert [found["name"] for found in parsed["checks"]] == NAMES
    for found in parsed["checks"]:
        line = next(line for line in text.splitlines() if line.startswith(found["name"]))
        assert found["verdict"] in line
        assert found["value"] in line
        assert found["advice"] in text


@pytest.mark.parametrize("version", ["0.6.3", "0.5.0"])
def test_a_flashinfer_with_the_regression_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed_flashinfer(monkeypatch, version)
    report = examine(MODEL)
    found = check(report, "FlashInfer")
    assert (found.value, found.verdict) == (version, "problem")
    assert "flashinfer-python>=0.6.4" in found.advice
    assert report.has_problem


def test_a_flashinfer_without_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_flashinfer(monkeypatch, "0.6.18.post1")
    found = check(examine(MODEL), "FlashInfer")
    assert found.verdict == "ok"
    assert "0.6.18.post1" in found.value


def test_without_a_gpu_no_flashinfer_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_flashinfer(monkeypatch, None)
    found = check(examine(MODEL), "FlashInfer")
    assert (found.value, found.verdict) == ("not installed", "ok")
    assert "fi-runtime[gpu]" in found.advice


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.1")
    report = examine(MODEL)
    assert check(report, "NVIDIA driver").value == "580.1"
    assert check(report, "torch").verdict == "problem"
    assert report.has_problem


@pytest.mark.parametrize("checkpoint", ["nowhere", ""])
def test_a_missing_checkpoint_is_a_problem_with_a_message(tmp_path: Path, checkpoint: str) -> None:
    report = examine(model_folder(tmp_path / "llm", checkpoint))
    found = check(report, "checkpoint")
    assert found.verdict == "problem"
    assert "checkpoint" in found.advice
    assert report.has_problem
    assert found.advice in printed(report)


def test_a_model_folder_without_configuration_is_a_problem(tmp_path: Path) -> None:
    found = check(examine(tmp_path), "checkpoint")
    assert found.verdict == "problem"
    assert "config.pbtxt" in found.advice


def test_a_truncated_weights_file_is_a_problem(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "llm", "checkpoint")
    shutil.copytree(MODEL / "demo_checkpoint", folder / "checkpoint")
    weights = folder / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = check(examine(folder), "weights")
    assert found.verdict == "problem"
    assert "model.safetensors" in found.advice


def test_a_cache_that_no_memory_holds_is_a_problem(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "llm", str(MODEL / "demo_checkpoint"))
    with (folder / "config.pbtxt").open("a", encoding="utf-8") as file:
        file.write('parameters { key: "cache_tokens" value { string_value: "1073741824" } }\n')
    found = check(examine(folder), "cache")
    assert found.verdict == "problem"
    assert "cache_tokens" in found.advice


def test_prebuilt_kernels_are_shown_with_what_they_are_for(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "llm", str(MODEL / "demo_checkpoint"))
    assert check(examine(folder), "prebuilt kernels").value == "none"
    (folder / "kernels").mkdir()
    manifest = {"arch": "9.0a", "flashinfer": "0.6.18"}
    (folder / "kernels" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    value = check(examine(folder), "prebuilt kernels").value
    assert "9.0a" in value
    assert "0.6.18" in value


def test_timed_decode_is_shown_beside_what_cannot_run() -> None:
    fa2 = DecodeRow(1, 32768, "fa2", runs="fa2", us=57.0, gb_per_s=2354.0, share=0.785)
    fa3 = DecodeRow(1, 32768, "fa3", runs="fa3", us=432.0, gb_per_s=311.0, share=0.104)
    auto = DecodeRow(1, 32768, "auto", reason="auto cannot run: no [compiler]")
    report = Report([Check("GPU 0", "a [GPU]")], [fa2, fa3, auto], 3000.0)
    lines = printed(report).splitlines()
    shown = [line for line in lines if "1 x 32768" in line]
    assert len(shown) == 3
    assert "7.6" in shown[1]
    assert "10%" in shown[1]
    assert "cannot" in shown[2]
    assert lines[-1] == "auto cannot run: no [compiler]"
    assert any("3000 GB/s" in line for line in lines)
    assert any("a [GPU]" in line for line in lines)


def test_adapters_are_looked_at_where_there_are_any(tmp_path: Path) -> None:
    adapter = write_files(tmp_path / "sql", CONFIG, {})
    folder = model_folder(tmp_path / "llm", str(MODEL / "demo_checkpoint"))
    with (folder / "config.pbtxt").open("a") as file:
        # As the documentation writes it.
        value = f"""'{{"sql": "{adapter}"}}'"""
        file.write(f'parameters {{ key: "adapters" value {{ string_value: {value} }} }}\n')
    assert check(examine(folder), "adapters").value == "sql: 0.00 GiB on disk"
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    found = check(examine(folder), "adapters")
    assert found.verdict == "problem"
    assert f"{adapter}/adapter_config.json: peft_type is 'LOHA'" in found.advice
