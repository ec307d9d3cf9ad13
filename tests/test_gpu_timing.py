"""Timed decode attention, and the doctor's report, on a GPU. Needs a GPU."""

import dataclasses

import msgspec
import pytest
import torch

from fi_runtime.attention.timing import DecodeShape, memory_bandwidth, memory_needed, time_decode
from fi_runtime.config import ConfigError
from fi_runtime.doctor import Report, examine, report_json
from fi_runtime.kernels.library import flashinfer
from tools.serve import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),  # kernels that are not prebuilt compile at first use
]

MODEL = ROOT / "model_repository" / "llm"
SHAPES = {
    "larger than the L2": DecodeShape(16, 8, 128, 8, 8192, 16),
    "smaller than the L2": DecodeShape(16, 8, 128, 1, 4096, 16),
    "pages of one token": DecodeShape(32, 8, 128, 4, 5000, 1),
    "a part of a page": DecodeShape(8, 2, 64, 3, 1001, 16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_decode_reads_faster_than_memory(name: str) -> None:
    shape = SHAPES[name]
    time = time_decode(flashinfer(), shape, "fa2")
    assert time.resolved_backend == "fa2"
    assert time.us > 0
    assert time.gb_per_s == pytest.approx(shape.nbytes / time.us / 1e3)
    assert time.gb_per_s < 1.2 * memory_bandwidth(torch.device("cuda"))


def test_a_large_decode_comes_near_the_memory_bandwidth() -> None:
    time = time_decode(flashinfer(), SHAPES["larger than the L2"], "fa2")
    assert time.gb_per_s > 0.5 * memory_bandwidth(torch.device("cuda"))


def test_four_times_the_context_takes_about_four_times_as_long() -> None:
    shape = SHAPES["larger than the L2"]
    longer = dataclasses.replace(shape, context=4 * shape.context)
    times = [time_decode(flashinfer(), each, "fa2").us for each in (shape, longer)]
    assert 3.0 < times[1] / times[0] < 5.0


def test_what_it_takes_of_the_memory_is_foreseen() -> None:
    shape = SHAPES["larger than the L2"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time_decode(flashinfer(), shape, "fa2")
    assert torch.cuda.max_memory_allocated() - before < 1.1 * memory_needed(shape)


def test_the_choice_of_the_library_is_fa2() -> None:
    time = time_decode(flashinfer(), SHAPES["smaller than the L2"], "auto")
    assert time.resolved_backend == "fa2"


def test_fa3_runs_on_hopper_and_is_refused_elsewhere() -> None:
    shape = SHAPES["smaller than the L2"]
    if torch.cuda.get_device_capability()[0] == 9:
        time = time_decode(flashinfer(), shape, "fa3")
        assert time.resolved_backend == "fa3"
        assert time.us > 0
    else:
        with pytest.raises(ConfigError, match="Hopper"):
            time_decode(flashinfer(), shape, "fa3")


def test_the_reason_why_a_shape_cannot_run_is_told() -> None:
    with pytest.raises(ConfigError, match="fa2 cannot run: "):
        time_decode(flashinfer(), DecodeShape(7, 2, 128, 1, 64, 16), "fa2")


@pytest.fixture(scope="module")
def report() -> Report:
    return examine(MODEL)


def test_the_doctor_says_what_each_wrapper_runs(report: Report) -> None:
    values = {check.name: check.value for check in report.checks}
    assert values["prefill"] == "fa2"
    # Two query heads share a key/value head of the checkpoint: too few for tensor cores.
    assert values["decode"] == values["graph decode"] == "cuda-core"
    assert torch.cuda.get_device_name() in values["GPU 0"]
    assert values["NVIDIA driver"] != "none"


def test_the_doctor_times_every_backend(report: Report) -> None:
    assert {row.backend for row in report.decode} == {"fa2", "fa3", "auto"}
    assert {(row.batch, row.context) for row in report.decode} >= {(1, 32768), (64, 1024)}
    for row in report.decode:
        if row.backend == "fa2":
            assert not row.reason
        if not row.reason:
            assert row.us > 0
            assert 0 < row.share < 1.2
            assert row.backend in ("auto", row.runs)


def test_the_doctors_json_is_its_report(report: Report) -> None:
    assert msgspec.json.decode(report_json(report), type=Report) == report
