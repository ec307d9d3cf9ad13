"""What the benchmarks are made of, without the machine that they are for."""

import copy
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Gemma2PreTrainedModel

from bench import kernels, loading, lora, mixed, plot_engine, prefix
from bench.cold_start import STARTED
from bench.decode_attention import LONG_RATIO, TO_BEAT, facts
from bench.families import FAMILIES, write
from bench.fidelity import config_of, fidelity_of, logprob_errors, reference, write_family
from bench.limits import limits_of
from bench.moe import counting
from bench.offline import work
from bench.products import products_of
from bench.shapes import DENSE, SHAPES, write_shape
from bench.timeline import gaps_of, short, spans_of, times_of, totals_of
from fi_runtime.config import EngineConfig
from fi_runtime.engine.build import compiled_in, weight_bytes
from fi_runtime.engine.core import Engine
from fi_runtime.engine.phases import Phases
from fi_runtime.messages import SamplingParams
from fi_runtime.models import load_model_config
from tests.adapters import merge, pairs, projections
from tests.twins import Twin

PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-14B": 14_768_307_200,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-8B-FP8": 8_030_261_248,
    "Qwen3-14B-FP8": 14_768_307_200,
}
"""parameters, as counted on the models' pages"""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_parameters_as_the_published_models(name: str, tmp_path: Path) -> None:
    write_shape(name, tmp_path)
    config = load_model_config(tmp_path)
    assert weight_bytes(config, torch.bfloat16) == 2 * PUBLISHED[name]
    assert config.eos_ids == ()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size
    text = "a prompt, 17 €"
    assert len(tokenizer.encode(text).ids) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(tokenizer.decode([token]) for token in (300, config.vocab_size - 1))


def test_dummy_weights_answer_and_are_the_same_each_time(tmp_path: Path) -> None:
    write("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = EngineConfig(checkpoint=str(tmp_path), load_format="dummy")
    params = SamplingParams(max_tokens=8, temperature=0.0, seed=0, ignore_eos=True)
    first, second = (Engine(config).generate([[1, 2, 3]], params)[0].tokens for _ in range(2))
    assert len(first) == 8
    assert first == second


def test_a_written_checkpoint_is_read_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(loading, "PIECE_BYTES", 10_000)
    write("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    rows = loading.measure("qwen3", tmp_path, torch.device("cpu"))
    size = weight_bytes(load_model_config(tmp_path), torch.bfloat16)
    assert [row["page_cache"] for row in rows] == ["cold", "warm"]
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) >= size
    assert all(row["gigabytes"] == round(size / 1e9, 3) for row in rows)
    assert Engine(EngineConfig(checkpoint=str(tmp_path))).model_config.vocab_size == 199


def test_memory_that_no_file_is_behind_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    with loading.watched_memory() as most:
        loading.read(file)
    assert most[0] < loading.READERS * loading.PIECE_BYTES + (32 << 20)
    with loading.watched_memory() as most:
        kept = bytearray(200 << 20)
        kept[:: 1 << 12] = bytes(len(kept[:: 1 << 12]))
        time.sleep(10 * loading.WATCH_S)
    assert most[0] > 150 << 20


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_of_every_family_on_a_gpu_are_compiled(name: str, tmp_path: Path) -> None:
    compiled = compiled_in(load_model_config(write_family(name, tmp_path, "cuda")))
    there = [
        (needed.model.head_dim, needed.model.activation, variant)
        for needed in kernels.NEEDED
        for variant in needed.model.variants
        if needed.cache_dtype == torch.bfloat16 and "fa2" in needed.backends
    ]
    heads = {(head_dim, variant) for head_dim, _, variant in there}
    assert {(compiled.head_dim, variant) for variant in compiled.variants} <= heads
    assert compiled.activation in {activation for _, activation, _ in there}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_kernels_of_every_shape_are_compiled(
    name: str, cache_dtype: torch.dtype, tmp_path: Path
) -> None:
    compiled = compiled_in(load_model_config(write_shape(name, tmp_path)))
    assert any(
        compiled.variants <= needed.model.variants
        and (compiled.head_dim, compiled.activation, cache_dtype, "fa2")
        == (needed.model.head_dim, needed.model.activation, needed.cache_dtype, *needed.backends)
        for needed in kernels.NEEDED
    )


@pytest.mark.parametrize("name", DENSE)
def test_products_are_all_of_a_layers(name: str, tmp_path: Path) -> None:
    config = load_model_config(write_shape(name, tmp_path))
    layers = sum(outputs * inputs for outputs, inputs in products_of(config)) * config.layers
    rest = PUBLISHED[name] - layers
    tables = config.vocab_size * config.hidden_size * (1 if name == "Qwen3-0.6B" else 2)
    assert tables < rest < tables + 1_000_000  # and norms


def test_phases_add_up_and_are_read_back_from_the_log() -> None:
    phases = Phases()
    phases.end("imports")
    phases.end("weights")
    line = f"2026-01-01 engine[1] INFO started in {phases}"
    found = STARTED.search(line)
    assert found is not None
    assert [part.rsplit(" ", 1)[0] for part in found[1].split(", ")] == ["imports", "weights"]


def decode_rows(fa2_share: float, ratio: float) -> list[dict[str, object]]:
    """Results in which FA2 takes this share of the numbers to beat, and FA3 so many times FA2's."""
    return [
        {
            "flashinfer": "0.6.18",
            "backend": backend,
            "resolved_backend": backend,
            "query_heads": heads,
            "batch": batch,
            "context": context,
            "page_size": 16,
            "us": us * fa2_share * (ratio if backend == "fa3" else 1.0),
        }
        for (heads, batch, context), us in TO_BEAT.items()
        for backend in ("fa2", "fa3")
    ]


def test_facts_say_what_the_numbers_are() -> None:
    good = facts(decode_rows(1.0, LONG_RATIO + 1))
    assert f"within 5% of the numbers to beat in {len(TO_BEAT)} of {len(TO_BEAT)}" in good[0]
    assert good[1].startswith("FA3 takes at least 5 times as long as FA2 at 1 x 32768: 6.0")
    bad = facts(decode_rows(1.2, 2.0))
    assert f"in 0 of {len(TO_BEAT)} shapes; at worst it takes 1.20 times" in bad[0]
    assert bad[1].startswith("FA3 takes less than 5 times as long as FA2 at 1 x 32768: 2.0")


def test_the_offline_work_is_the_one_that_peers_were_measured_with() -> None:
    prompts, outputs = work()
    assert (len(prompts), sum(outputs)) == (256, 133_966)
    assert all(100 <= len(prompt) <= 1024 for prompt in prompts)


def test_a_decode_step_reads_all_weights_but_an_embedding_once(
    twin: Twin,
) -> None:
    folder, model = twin.folder, twin.model
    parameters = sum(each.numel() for each in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    limits = limits_of(folder, bytes_per_s=1e6)
    assert limits.weight_bytes == 2 * (parameters - (0 if tied else embedding))
    assert limits.prompt_bytes == 2 * (parameters - embedding * (1 if tied else 2))
    cache = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
    assert limits.token_bytes == cache * model.config.head_dim
    # Two prompts, of which one has its last token a step earlier.
    steps = limits.decode_s([6, 11]) + limits.decode_s([12])
    assert limits.offline_s([5, 10], [2, 3]) == pytest.approx(limits.prefill_s(15) + steps)


def test_a_mixture_reads_the_experts_that_its_tokens_go_to(tmp_path: Path) -> None:
    model = write("qwen3-moe, some layers", tmp_path)
    limits = limits_of(tmp_path, bytes_per_s=1.0)
    parameters = sum(each.numel() for each in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert limits.decode_s([0], touched=limits.experts) == 2 * (parameters - embedding)
    assert limits.touched(1) == pytest.approx(limits.per_token)
    one = sum(each[0].numel() for name, each in model.named_parameters() if ".experts." in name)
    without = limits.decode_s([0], touched=0)
    assert limits.decode_s([0]) == pytest.approx(without + limits.per_token * 2 * one)
    assert limits.prompt_bytes == pytest.approx(limits.decode_s([0]) - 2 * embedding)
    # Of three tokens, each of which has its own chances.
    rng, hits = random.Random(0), 0
    for _ in range(2000):
        draws = (rng.sample(range(limits.experts), limits.per_token) for _ in range(3))
        hits += len(set().union(*draws))
    assert limits.touched(3) == pytest.approx(hits / 2000, rel=0.02)


def test_the_experts_that_a_step_reads_are_counted(tmp_path: Path) -> None:
    model = write("qwen3-moe, some layers", tmp_path)
    params = SamplingParams(max_tokens=9, temperature=0.0, seed=0, ignore_eos=True)
    engine = Engine(EngineConfig(checkpoint=str(tmp_path), cache_tokens=4096))
    with counting(1) as numbers:
        engine.generate([[5, 6, 7]], params)
    mixtures, per_token = 2, model.config.num_experts_per_tok
    assert [int(number) for number in numbers] == [per_token] * mixtures * 8
    with counting(40) as numbers:
        engine.generate([[5 + i, 4 * i] for i in range(40)], params)
    assert len(numbers) == mixtures * 8
    assert per_token < min(map(int, numbers)) <= max(map(int, numbers)) <= model.config.num_experts


def test_fidelity_tells_a_model_that_is_served_as_it_is_from_another(tmp_path: Path) -> None:
    config = config_of(write_family("qwen3-moe", tmp_path, "cpu"), "cpu")
    found = fidelity_of(config, copies=1)
    assert found.greedy_equal == 1.0
    assert found.error < 1e-5 < 1e-3 < found.reference_error
    written = json.loads((tmp_path / "config.json").read_text())
    # What is served is then another model than the one it is compared with.
    engine, wide = Engine(config), reference(config, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 0.02}))
    other = reference(config, torch.float32)
    error, _ = logprob_errors(engine, other, wide, copies=1)
    assert error > 1e-3


def test_the_model_that_is_compared_with_caps_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers would take an attention that knows no cap, as it did before 5.21."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = write("gemma 2", tmp_path)
    prompt = torch.tensor([[5, 17, 3, 60, 8, 198, 42]])
    with torch.inference_mode():
        right = model(prompt).logits
        found = reference(config_of(tmp_path, "cpu"), torch.float32)(prompt).logits
    torch.testing.assert_close(found, right)


def event(
    name: str, begin: float, duration: float, launch: int = 0, category: str = "kernel"
) -> dict[str, object]:
    arguments = {"correlation": launch}
    return {"name": name, "ts": begin, "dur": duration, "cat": category, "args": arguments}


def test_a_timeline_knows_when_the_gpu_idles_and_what_it_does() -> None:
    events = [
        event("void second<float>(int)", 14.0, 6.0),
        event("launch", 0.0, 50.0, category="cuda_runtime"),
        event("void first<int>(float*)", 0.0, 10.0),
        event("Memcpy HtoD (Pinned -> Device)", 9.0, 2.0, category="gpu_memcpy"),
        event("void first<long>(float*)", 23.5, 1.0),
    ]
    spans = spans_of({"traceEvents": events})
    assert [short(span.name) for span in spans] == ["first", "Memcpy HtoD ", "second", "first"]
    assert gaps_of(spans) == [3.0, 3.5]
    assert totals_of(spans)[0] == {"kernel": "first", "calls": 2, "us": 11.0}


def test_a_timeline_begins_where_the_first_replay_ends() -> None:
    """Three steps of two kernels that one launch gave, with a copy and a kernel between."""
    events = [event("slow copy", 0.0, 500.0, launch=1, category="gpu_memcpy")]
    for step, begin in enumerate((600.0, 640.0, 683.0)):
        events += [
            event("one", begin, 10.0, launch=10 + step),
            event("two", begin + 12.0, 18.0, launch=10 + step),
            event("kept", begin + 31.0, 1.0, launch=20 + step),
            event("copy", begin + 33.0, 2.0, launch=30 + step, category="gpu_memcpy"),
        ]
    times = times_of(spans_of({"traceEvents": events}))
    # 40 and 43 from one's begin to the next's; 10 and 13 between, of which a copy takes 3 with
    # the kernel; and 2 within each.
    assert times["step_us"] == 41.5
    assert times["between_us"] == 13.0
    assert times["longest_gap_us"] == 8.0
    assert times["idle_us"] == pytest.approx(((1 + 1 + 5 + 2) + (1 + 1 + 8 + 2)) / 2)
    assert {each["kernel"]: each["calls"] for each in times["kernels"]} == dict.fromkeys(
        ("one", "two", "kept", "copy"), 2
    )


def test_engines_are_drawn_by_the_share_of_the_limit_that_they_reach() -> None:
    offline = {"model": "Llama-3.1-8B", "tokens_per_s": 9000.0, "limit_tokens_per_s": 10_000.0}
    latency = {"batch": 8, "context": 1024, "tpot_ms": 6.0, "limit_ms": 5.4}
    lines = plot_engine.shares(
        {"rows": [offline]}, {"rows": [{"model": m, **latency} for m in ("Llama-3.1-8B", "other")]}
    )
    assert list(lines) == ["Llama-3.1-8B, 8 x 1,024", "Llama-3.1-8B, offline", "other, 8 x 1,024"]
    ours, peer = plot_engine.OURS, plot_engine.VLLM
    assert lines["other, 8 x 1,024"] == {ours: pytest.approx(0.9)}
    assert lines["Llama-3.1-8B, 8 x 1,024"][ours] == pytest.approx(0.9)
    assert lines["Llama-3.1-8B, 8 x 1,024"][peer] == pytest.approx(5.4 / 7.04)
    assert lines["Llama-3.1-8B, offline"][peer] == pytest.approx(0.8154)


def test_what_is_measured_of_mixed_steps_and_shared_prefixes(
    monkeypatch: pytest.MonkeyPatch, twin: Twin
) -> None:
    engine = Engine(EngineConfig(checkpoint=str(twin.folder), cache_tokens=65_536, chunk_tokens=16))
    for module in (mixed, prefix):
        monkeypatch.setattr(module, "VOCABULARY", 90)
    monkeypatch.setattr(mixed, "STREAMS", 3)
    row = mixed.measure_engine(engine, prompt_tokens=200)
    assert not engine.busy
    assert row["itl_mixed_ms_p99"] >= row["itl_mixed_ms_p50"] > 0
    assert min(row["prefill_alone_tokens_per_s"], row["prefill_mixed_tokens_per_s"]) > 0
    counts, totals, times = zip(*row["steps"], strict=True)
    assert list(itertools.accumulate(counts)) == list(totals)
    assert (totals[-1], len(counts)) == (200, 2)
    assert min(times) > 0
    engine.tree.forget()  # whose prompts begin as the next ones do
    engine.stats()
    shared = prefix.measure_engine(engine, shared=160)
    assert engine.stats().reused_tokens == prefix.REQUESTS * 160
    assert min(shared["ttft_cached_ms_p50"], shared["ttft_uncached_ms_p50"]) > 0


def test_adapters_to_measure_with_add_to_all_projections(twin: Twin, tmp_path: Path) -> None:
    folder, model = twin.folder, twin.model
    shape = load_model_config(folder)
    adapter = lora.write_adapter(tmp_path / "a", shape, rank=3, seed=0)
    merged = merge(copy.deepcopy(model), adapter)
    names = {name for name, _ in projections(model, "")}
    assert {name for name, *_ in pairs(adapter)} == names
    engine = Engine(
        EngineConfig(checkpoint=str(folder), cache_tokens=640, adapters={"a": str(adapter)})
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, seed=0, logprobs=0, lora_name="a")
    result = engine.generate([[5, 6, 7]], params)[0]
    with torch.inference_mode():
        right = merged(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1).max().item()
        without = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1).max().item()
    assert result.logprobs == pytest.approx([right], abs=1e-4)
    assert abs(right - without) > 1e-3
