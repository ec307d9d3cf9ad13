"""A real tritonserver with a tiny checkpoint, and the real clients that ask it."""

import contextlib
import http.client
import json
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import psutil
import torch
import tritonclient.grpc
import tritonclient.http
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import Qwen3Config, Qwen3ForCausalLM
from tritonclient.utils import InferenceServerException

from tools.repository import STREAMED, UNARY
from tools.serve import TritonServer

VLLM = "vllm_model"
"""the sample door, for clients of Triton's vLLM backend"""
TENSORRT = "tensorrt_llm_bls"
"""the one for the clients that come with its TensorRT-LLM backend"""
BATCH = 64
CONTEXT = 4096
HANG_S = 60
"""no answer of the tiny model takes as long, on however busy a machine"""
AGAIN_S = 30.0
"""for an engine to be there again, on however busy a machine"""

KNOBS = {
    "cpu_threads": "1",
    "max_context": str(CONTEXT),
    "max_sequences": str(BATCH),
    "cache_tokens": "32768",
}

TYPES: dict[str, tuple[str, type]] = {
    "text_input": ("BYTES", object),
    "input_ids": ("INT32", np.int32),
    "messages": ("BYTES", object),
    "stream": ("BOOL", bool),
    "sampling_parameters": ("BYTES", object),
    "exclude_input_in_output": ("BOOL", bool),
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "top_p": ("FP32", np.float32),
    "min_p": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "random_seed": ("UINT64", np.uint64),
    "min_tokens": ("INT32", np.int32),
    "min_length": ("INT32", np.int32),
    "repetition_penalty": ("FP32", np.float32),
    "presence_penalty": ("FP32", np.float32),
    "frequency_penalty": ("FP32", np.float32),
    "bad_words": ("BYTES", object),
    "guided_decoding_guide_type": ("BYTES", object),
    "guided_decoding_guide": ("BYTES", object),
    "end_id": ("INT32", np.int32),
    "pad_id": ("INT32", np.int32),
    "stop_words": ("BYTES", object),
    "beam_width": ("INT32", np.int32),
    "num_return_sequences": ("INT32", np.int32),
    "length_penalty": ("FP32", np.float32),
    "return_finish_reason": ("BOOL", bool),
    "return_cumulative_logprob": ("BOOL", bool),
    "return_logprobs": ("BOOL", bool),
    "return_num_input_tokens": ("BOOL", bool),
    "return_num_output_tokens": ("BOOL", bool),
    "return_log_probs": ("BOOL", bool),
    "return_context_logits": ("BOOL", bool),
    "return_generation_logits": ("BOOL", bool),
    "return_perf_metrics": ("BOOL", bool),
    "return_token_ids": ("BOOL", bool),
}


CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""of the checkpoint that test servers serve"""


# The checkpoint


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, so that every character beyond ASCII is several tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # The byte-level alphabet: printable bytes stand for themselves, the rest begin at U+0100.
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_WORDS = set(b"abcdefghijklmnopqrstuvwxyz ")
_LEADS = {0xC3, 0xE4, 0xF0}
_TAIL = set(range(0x80, 0x90))
# What may follow the bytes of each class, so that whatever a model chooses is text: two bytes from
# U+00C0, three from U+4400, four from U+1F800.
_FOLLOWERS = [
    ({0xC3} | set(range(0x90, 0x9F)) | set(range(0xA0, 0xB0)), _TAIL),
    ({0xE4}, set(range(0x90, 0x9F))),
    ({0xF0}, {0x9F}),
    ({0x9F}, set(range(0xA0, 0xB0))),
    (set(range(256)), _WORDS | _LEADS),  # all others
]


def write_checkpoint(folder: Path) -> Qwen3ForCausalLM:
    """Save a tiny random Qwen3 that writes well-formed text; the model that was saved, float32.

    Attention and the layers are random, so that an answer depends on the whole prompt. Hidden
    channels of their own tell the head which class of byte came last; it then rules out the bytes
    that may not follow.
    """
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    channels = len(_FOLLOWERS)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:channels] = 0.0
            layer.mlp.down_proj.weight[:channels] = 0.0
        embed.normal_(std=2.0)  # beside it a random layer's part is small, and answers repeat less
        embed[:, :channels] = 0.0
        for byte in range(256):
            embed[byte, next(i for i, (who, _) in enumerate(_FOLLOWERS) if byte in who)] = 3.0
        for channel, (_, allowed) in enumerate(_FOLLOWERS):
            head[:, channel] = -40.0
            head[sorted(allowed), channel] = 0.0
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    chat = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))
    return model


def write_big_checkpoint(folder: Path) -> int:
    """Save a Qwen3 of some 200 MB, nearly all of it embedding; its bytes in float32."""
    config = Qwen3Config(
        vocab_size=100_000,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return 4 * sum(parameter.numel() for parameter in model.parameters())


class Reference:
    """What transformers' own generate answers on the checkpoint, greedily."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._model = model
        self._known: dict[tuple[str, int], list[int]] = {}

    def tokens(self, prompt: str, max_tokens: int) -> list[int]:
        key = prompt, max_tokens
        if key not in self._known:
            ids = list(prompt.encode())
            with torch.inference_mode():
                out = self._model.generate(
                    torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False
                )
            self._known[key] = out[0, len(ids) :].tolist()
        return self._known[key]

    def text(self, prompt: str, max_tokens: int) -> str:
        return byte_tokenizer().decode(self.tokens(prompt, max_tokens))

    def logprobs(self, prompt: str, max_tokens: int) -> list[float]:
        """Of each token of the greedy answer."""
        tokens = self.tokens(prompt, max_tokens)
        ids = list(prompt.encode()) + tokens
        with torch.inference_mode():
            rows = self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        start = len(ids) - len(tokens) - 1
        return [rows[start + i, token].item() for i, token in enumerate(tokens)]


# The server


def processes(server: TritonServer) -> list[psutil.Process]:
    """The server's process and all that it started."""
    found = []
    for pid in server.started():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found.append(psutil.Process(pid))
    return found


def engines(server: TritonServer) -> list[psutil.Process]:
    return [p for p in processes(server) if "fi_runtime.engine.server" in command_of(p)]


def stubs(server: TritonServer) -> list[psutil.Process]:
    """The processes of the models' instances."""
    return [p for p in processes(server) if "triton_python" in "".join(command_of(p)[:1])]


def command_of(process: psutil.Process) -> list[str]:
    """Its arguments; none of one that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait for a condition; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - start


def is_idle(engine: psutil.Process) -> bool:
    """Whether an engine has stopped computing; one that decodes uses most of a core."""
    before = sum(engine.cpu_times()[:2])
    time.sleep(0.5)
    return sum(engine.cpu_times()[:2]) - before < 0.05


# The clients


@dataclass(frozen=True)
class Response:
    """One response: its output tensors by name, and whether it was marked as the last."""

    outputs: dict[str, npt.NDArray[Any]]
    final: bool

    @property
    def text(self) -> str:
        return self.value("text_output").decode()

    @property
    def finish(self) -> str:
        return self.value("finish_reason").decode()

    def value(self, name: str) -> Any:
        """The one element of an output, which has the batch's dimension, if any, and its own."""
        tensor = self.outputs[name]
        assert tensor.shape in ((1, 1), (1,)), f"{name} has shape {tensor.shape}"
        return tensor.reshape(-1)[0]


def joined(responses: Sequence[Response]) -> str:
    return "".join(response.text for response in responses)


def tensors_of(module: Any, inputs: dict[str, Any], batched: bool = True) -> list[Any]:
    """A request's tensors for tritonclient.grpc or tritonclient.http; lists have any length."""
    made = []
    for name, value in inputs.items():
        type_name, dtype = TYPES[name]
        values = value if isinstance(value, list) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        array = np.array([values] if batched else values, dtype=dtype)
        tensor = module.InferInput(name, list(array.shape), type_name)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def grpc_client(server: TritonServer) -> tritonclient.grpc.InferenceServerClient:
    # A list of channel arguments, even an empty one, keeps the channel from being shared: one
    # client's disconnect is then its own.
    return tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=[])


class Stream:
    """A gRPC stream with one request in it, read as it comes.

        with Stream(server, text_input="a", stream=True) as stream:
            for response in stream: ...

    Leaving the block early closes the stream, which cancels what is running.
    """

    def __init__(
        self,
        server: TritonServer,
        *,
        parameters: dict[str, Any] | None = None,
        door: str = STREAMED,
        **inputs: Any,
    ) -> None:
        """``door``: llm, whose tensors have a batch dimension, or vllm_model, without one."""
        self._client = grpc_client(server)
        self._came: queue.Queue[Any] = queue.Queue()
        self._ended = False
        # NOTE: not with the header triton_grpc_error, which gives errors their gRPC status:
        # tritonserver 2.51 crashes soon after such an error.
        self._client.start_stream(lambda result, error: self._came.put(error or result))
        self._client.async_stream_infer(
            door,
            tensors_of(tritonclient.grpc, inputs, batched=door != VLLM),
            enable_empty_final_response=True,
            parameters=parameters,
        )

    def next(self, timeout_s: float = HANG_S) -> Response:
        """The next response; raises the error that came instead of one."""
        result = self._came.get(timeout=timeout_s)
        if isinstance(result, Exception):
            self._ended = True
            raise result
        message = result.get_response()
        self._ended = message.parameters["triton_final_response"].bool_param
        outputs = {output.name: result.as_numpy(output.name) for output in message.outputs}
        return Response(outputs, self._ended)

    def __iter__(self) -> Iterator[Response]:
        while not self._ended:
            yield self.next()

    @property
    def has_news(self) -> bool:
        """Whether a response, or an error, has come that is not read yet."""
        return not self._came.empty()

    def is_silent(self, seconds: float = 0.3) -> bool:
        """Whether nothing more comes."""
        try:
            return not self._came.get(timeout=seconds)
        except queue.Empty:
            return True

    def cancel(self) -> None:
        """Cancel as a client does that stays connected."""
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        # A stream that has ended is closed without a cancel: where a cancel meets the end of its
        # stream, tritonserver 2.51 keeps the request, and the model can never be unloaded.
        self._client.stop_stream(cancel_requests=not self._ended)
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream(server: TritonServer, **inputs: Any) -> list[Response]:
    """A whole answer over gRPC streaming, in the responses it came in."""
    with Stream(server, **{"stream": True, **inputs}) as opened:
        responses = list(opened)
        assert opened.is_silent(0.0)
    return responses


def list_of(response: Response, name: str) -> list[Any]:
    """An output's elements, without the dimension of the batch."""
    values: list[Any] = response.outputs[name][0].tolist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def infer_grpc(
    server: TritonServer, *, parameters: dict[str, Any] | None = None, **inputs: Any
) -> Response:
    """A whole answer over gRPC's unary infer."""
    client = grpc_client(server)
    with contextlib.closing(client):
        result = client.infer(
            UNARY,
            tensors_of(tritonclient.grpc, inputs),
            parameters=parameters,
            client_timeout=HANG_S,
        )
    names = [output.name for output in result.get_response().outputs]
    return Response({name: result.as_numpy(name) for name in names}, final=True)


def infer_http(
    server: TritonServer, *, parameters: dict[str, Any] | None = None, **inputs: Any
) -> Response:
    """A whole answer over HTTP's infer."""
    client = tritonclient.http.InferenceServerClient(server.http_address, network_timeout=HANG_S)
    with contextlib.closing(client):
        result = client.infer(UNARY, tensors_of(tritonclient.http, inputs), parameters=parameters)
    names = [output["name"] for output in result.get_response()["outputs"]]
    return Response({name: result.as_numpy(name) for name in names}, final=True)


@contextlib.contextmanager
def post(
    server: TritonServer, path: str, body: dict[str, Any]
) -> Iterator[http.client.HTTPResponse]:
    """POST JSON as curl does; the response, to be read in the block. Its end disconnects."""
    connection = http.client.HTTPConnection(*server.address("http"), timeout=HANG_S)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response


def generate(server: TritonServer, door: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """/generate: the HTTP status and the JSON."""
    with post(server, f"/v2/models/{door}/generate", body) as response:
        return response.status, json.loads(response.read())


def generate_stream(
    server: TritonServer, door: str = STREAMED, **body: Any
) -> list[dict[str, Any]]:
    """/generate_stream: the data of the server-sent events."""
    with post(server, f"/v2/models/{door}/generate_stream", body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        frames = response.read().decode().split("\n\n")
    assert frames.pop() == "", "the last event ends with an empty line too"
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def error_of(call: Callable[..., Any], *args: Any, **inputs: Any) -> tuple[str, str]:
    """The status and message of the error that a tritonclient call must raise.

    An error in a gRPC stream comes as a message without a status; tritonclient says None.
    """
    try:
        result = call(*args, **inputs)
    except InferenceServerException as error:
        return str(error.status()), error.message()
    raise AssertionError(f"no error, but {result}")


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that all run at the same time; an exception is its call's result."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# What a server holds


def metric(server: TritonServer, name: str) -> float:
    """Of an engine's metric."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    [found] = re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(found)


def is_free(server: TritonServer) -> bool:
    """Whether the engine lives, has no sequence, and all its pages are free."""
    held = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return metric(server, "fi_runtime:engine_up") == 1 and not any(metric(server, n) for n in held)


def assert_as_before(server: TritonServer, reference: Reference) -> None:
    """That nothing is held in the engine, and that it has credits for a full workload."""
    wait_until(lambda: is_free(server), AGAIN_S, "the engine is there and free")
    with ThreadPoolExecutor(BATCH) as pool:
        calls = [
            pool.submit(stream, server, text_input=f"full {i}", max_tokens=24, temperature=0.0)
            for i in range(BATCH)
        ]
        answers = [joined(call.result(HANG_S)) for call in calls]
    assert answers == [reference.text(f"full {i}", 24) for i in range(BATCH)]
    wait_until(lambda: is_free(server), 10, "the engine is free again")
