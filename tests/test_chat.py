"""Conversations become the prompts that transformers makes of them; what is none is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fi_runtime.config import RequestLimits
from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.requests import Request, Served, parse_request
from fi_runtime.messages import EngineInfo
from tests.serving import (
    KNOBS,
    UNARY,
    Reference,
    byte_tokenizer,
    error_of,
    generate,
    infer_grpc,
    infer_http,
    joined,
    stream,
)
from tests.test_requests import tensor
from tools.repository import write_repository
from tools.serve import TritonServer

INFO = EngineInfo(pid=1, vocab_size=300, max_context=400, tokenizer="")
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]

# Of the kinds that published checkpoints have.
CHATML = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- if tools %}{{- 'Tools: ' + tools | tojson }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}
"""
ALTERNATING = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}
"""
TURNS = [
    {"role": "user", "content": "  Où est <|im_end|> Zoë? 🦜\n"},
    {"role": "assistant", "content": "{{ here }} & 'there'"},
    {"role": "user", "content": "17+25="},
]
WITH_SYSTEM = [{"role": "system", "content": " Be brief. "}, *TURNS]


def write(folder: Path, template: str | None, adds_bos: bool = False) -> Tokenizer:
    """Save a byte tokenizer with that template; as its tokens are read from the folder."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    if adds_bos:
        bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos_as_published = {"__type": "AddedToken", "content": "<|begin|>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    values: dict[str, Any] = {**config, "bos_token": bos_as_published}
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def parse(folder: Path, tokenizer: Tokenizer, messages: object, **inputs: Any) -> Request:
    given = messages if isinstance(messages, str | bytes) else json.dumps(messages)
    tensors = {name: tensor(value) for name, value in {"messages": given, **inputs}.items()}
    return parse_request(tensors, {}, Served.of(folder, tokenizer, INFO, RequestLimits()))


def refused(folder: Path, tokenizer: Tokenizer, messages: object, **inputs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        parse(folder, tokenizer, messages, **inputs)
    assert caught.value.code == "INVALID_ARG"
    return str(caught.value)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, TURNS),
        (CHATML, WITH_SYSTEM),
        (HEADERS, TURNS[:1]),
        (HEADERS, WITH_SYSTEM),
        (ALTERNATING, TURNS),
    ],
)
def test_prompts_are_those_of_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, str]], adds_bos: bool
) -> None:
    tokenizer = write(tmp_path, template, adds_bos)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    request = parse(tmp_path, tokenizer, messages)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert request.prompt == expected
    assert request.prompt.count(theirs.bos_token_id) == ("bos_token" in template)
    assert request.echo == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert parse(tmp_path, tokenizer, messages, exclude_input_in_output=True).echo == ""


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, ALTERNATING)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert parse(tmp_path, tokenizer, TURNS).echo.startswith("<|im_start|>system")


def test_a_checkpoint_whose_tokenizer_had_to_be_converted(tmp_path: Path) -> None:
    """Its folder has no tokenizer.json; the front end was given one that is elsewhere."""
    tokenizer = write(tmp_path, HEADERS)
    expected = parse(tmp_path, tokenizer, TURNS).prompt
    (tmp_path / "tokenizer.json").unlink()
    assert parse(tmp_path, tokenizer, TURNS).prompt == expected


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, None)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "no"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    assert parse(tmp_path, tokenizer, TURNS).echo.startswith("<|im_start|>system")


def test_what_a_template_refuses(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, ALTERNATING)
    message = refused(tmp_path, tokenizer, WITH_SYSTEM)
    assert message.startswith("messages: the checkpoint's chat template refuses them: ")
    assert "roles must alternate" in message
    assert "empty conversation" in refused(tmp_path, tokenizer, [])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ''|attr('__class__')|attr('mro') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 1 // 0 }}",
        "{% if",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(tmp_path: Path, template: str) -> None:
    tokenizer = write(tmp_path, template)
    assert "chat template refuses them" in refused(tmp_path, tokenizer, TURNS)


@pytest.mark.parametrize("config", [None, "{", "{}"])
def test_a_checkpoint_without_a_template(tmp_path: Path, config: str | None) -> None:
    tokenizer = write(tmp_path, None)
    if config is None:
        (tmp_path / "tokenizer_config.json").unlink()
    else:
        (tmp_path / "tokenizer_config.json").write_text(config)
    assert "chat template" in refused(tmp_path, tokenizer, TURNS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", ["messages=''", "expected a JSON array of"]),
        ("hello", ["messages='hello'"]),
        ("{}", ["array"]),
        ("[1]", ["object", "$[0]"]),
        ('[{"role": "user"}]', ["content", "$[0]"]),
        ('[{"content": "a"}]', ["role", "$[0]"]),
        ('[{"role": "", "content": "a"}]', ["length >= 1", "$[0].role"]),
        ('[{"role": "user", "content": null}]', ["str", "$[0].content"]),
        ('[{"role": "user", "content": [{"type": "text", "text": "a"}]}]', ["$[0].content"]),
        ('[{"role": "user", "content": "a", "tool_calls": []}]', ["tool_calls", "$[0]"]),
        (b'[{"role": "user", "content": "\xff"}]', ["UTF-8"]),
        (r'[{"role": "user", "content": "\ud800"}]', ["messages="]),
        ("[" * 50_000, ["messages="]),
        (json.dumps([{"role": "u", "content": ""}] * 401), ["401 messages", "more than 400"]),
        (json.dumps([{"role": "u", "content": "a" * 10_000}]), ["10001 bytes", "more than 4"]),
        (json.dumps([{"role": "u", "content": "a" * 390}]), ["the prompt has", "399"]),
    ],
)
def test_what_are_no_messages(tmp_path: Path, given: str | bytes, words: list[str]) -> None:
    tokenizer = write(tmp_path, CHATML)
    message = refused(tmp_path, tokenizer, given)
    for word in words:
        assert word in message


def test_a_template_that_writes_more_than_fits(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, "{{ messages[0].content * 1000 }}")
    assert "the text of messages has 10000 bytes" in refused(
        tmp_path, tokenizer, [{"role": "u", "content": "a" * 10}]
    )


def test_messages_are_a_prompt_like_the_others(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, CHATML)
    message = refused(tmp_path, tokenizer, TURNS, text_input="a")
    assert message == "give one of text_input, input_ids, messages; found text_input and messages"


def test_rendering_needs_no_torch(tmp_path: Path) -> None:
    """Torch is seconds and hundreds of megabytes in every front end."""
    write(tmp_path, CHATML)
    code = (
        "import sys, tokenizers; from pathlib import Path\n"
        "from fi_runtime.frontend.chat import ChatTemplate, Message\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))\n"
        "template = ChatTemplate(folder, tokenizer)\n"
        "assert 'transformers' not in sys.modules\n"
        "assert template.render([Message('user', 'hi')]).endswith('assistant\\n')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# A real server

ASKED = [{"role": "user", "content": "what is 世界?"}]
RENDERED = "<|im_start|>user\nwhat is 世界?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 24
GREEDY = {"max_tokens": TOKENS, "temperature": 0.0}


def test_each_door_answers_a_conversation(server: TritonServer, reference: Reference) -> None:
    expected = reference.text(RENDERED, TOKENS)
    messages = json.dumps(ASKED)
    assert joined(stream(server, messages=messages, **GREEDY)) == expected
    assert infer_grpc(server, messages=messages, **GREEDY).text == RENDERED + expected
    found = infer_http(server, messages=messages, exclude_input_in_output=True, **GREEDY)
    assert found.text == expected
    assert infer_grpc(server, parameters={"messages": messages}, **GREEDY).text.endswith(expected)
    status, body = generate(server, UNARY, messages=messages, **GREEDY)
    assert (status, body["text_output"]) == (200, RENDERED + expected)


def test_a_server_says_what_is_wrong_with_a_conversation(server: TritonServer) -> None:
    code, message = error_of(infer_grpc, server, messages="no")
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("messages='no': expected a JSON array")
    system = json.dumps([{"role": "system", "content": "Be brief."}])
    code, message = error_of(infer_grpc, server, messages=system)
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message.endswith("refuses them: a user begins")


def test_a_server_answers_as_the_checkpoint_says(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    """By a generation_config.json that keeps one token, what is drawn is the likeliest."""
    checkpoint = shutil.copytree(served_checkpoint, tmp_path / "checkpoint")
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "top_k": 1, "temperature": 2.0}))
    repository = write_repository(tmp_path / "repository", checkpoint, KNOBS, instances=1)
    with TritonServer(repository, log=tmp_path / "log") as server:
        server.wait_ready()
        asked = {"text_input": "x", "max_tokens": TOKENS, "exclude_input_in_output": True}
        assert infer_grpc(server, **asked).text == reference.text("x", TOKENS)
        assert infer_grpc(server, **asked, top_k=0).text != reference.text("x", TOKENS)
