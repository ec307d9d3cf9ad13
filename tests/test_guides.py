"""Guided decoding: what clients may ask for, and that what is generated is that."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fi_runtime.config import GUIDE_BYTES
from fi_runtime.engine.guides import DeadEnd, Guide, Guides, apply, guided, mask_words
from fi_runtime.frontend import guides
from fi_runtime.frontend.errors import RequestError
from tests.serving import byte_tokenizer

DEMO = Path(__file__).parent.parent / "model_repository/llm/demo_checkpoint/tokenizer.json"
DEMO_TOKENIZER = Tokenizer.from_file(str(DEMO))
DEMO_VOCAB, DEMO_EOS = 1504, (0, 2)
EOS = 256
"""of the byte vocabulary, to which the tokenizer does not know it"""


@pytest.fixture(scope="module")
def byte_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(file))
    return file


@pytest.fixture(scope="module")
def bytes_with_end(byte_file: Path) -> Guides:
    """A byte each, an end, and logits wider than that."""
    return Guides(byte_file, 300, (EOS,))


@pytest.fixture(scope="module")
def endless_bytes(byte_file: Path) -> Guides:
    return Guides(byte_file, 256, ())


@pytest.fixture(scope="module")
def demo() -> Guides:
    return Guides(DEMO, DEMO_VOCAB, DEMO_EOS)


def guide_of_vllm(*given: Any) -> str | None:
    """The grammar that the engine takes."""
    guide = guides.guide_of_vllm(*given)
    return None if guide is None else guide.compiled()


def guide_of_tensorrt(kind: str, guide: str) -> str | None:
    asked = guides.guide_of_tensorrt(kind, guide)
    return None if asked is None else asked.compiled()


def guide_of(**given: Any) -> str:
    guide = guide_of_vllm(given)
    assert guide is not None
    return guide


def allowed(guide: Guide, vocab_size: int) -> set[int]:
    """The tokens whose bits are set; all beyond the vocabulary must be zero."""
    row = np.full(mask_words(vocab_size), -1, dtype=np.int32)
    guide.fill(row)
    tokens = {
        32 * word + bit for word, bits in enumerate(row) for bit in range(32) if bits >> bit & 1
    }
    assert max(tokens) < vocab_size
    return tokens


def sampled(guide: Guide, vocab_size: int, eos_ids: Iterable[int], seed: int) -> list[int]:
    """Tokens drawn uniformly from what is allowed, until the guide is complete; no end token."""
    draw = random.Random(seed)
    tokens = []
    while not guide.is_complete:
        token = draw.choice(sorted(allowed(guide, vocab_size)))
        guide.advance(token)
        if token in eos_ids:
            assert guide.is_complete
            break
        tokens.append(token)
        assert len(tokens) < 5000
    return tokens


ENDLESS: dict[str, dict[str, Any]] = {
    "bounded by nothing": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
    "any object": {"type": "object"},
    "any": {},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 4},
    "a number first": {
        "type": "object",
        "properties": {"price": {"type": "number"}, "name": {"type": "string"}},
        "required": ["price", "name"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 2},
            "b": {"type": "object", "properties": {"c": {"enum": ["red", "green"]}}},
        },
        "required": ["a"],
    },
}


@pytest.mark.parametrize("most", [40, 64, 200])
@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
def test_json_ends_while_there_are_tokens_left(
    schema: dict[str, Any], most: int, endless_bytes: Guides, demo: Guides
) -> None:
    """Whatever is drawn, with an end token and without, in tokens of a byte and longer ones."""
    guide = guide_of(json=schema)
    for seed in range(10):
        with_end = drawn(demo.start(guide), DEMO_VOCAB, most, seed)
        found = json.loads(DEMO_TOKENIZER.decode(with_end))
        without = drawn(endless_bytes.start(guide), 256, most, seed)
        again = json.loads(bytes(without))
        for one in (found, again):
            assert set(schema.get("required", [])) <= set(one if isinstance(one, dict) else [])


def test_what_cannot_end_in_time_goes_on_as_it_would(demo: Guides) -> None:
    guide = demo.start(guide_of(json=ENDLESS["nested"]))
    assert len(drawn(guide, DEMO_VOCAB, 10, 0)) == 10
    assert not guide.is_complete
    # Nor is anything forced where there is time.
    bounded, free = (demo.start(guide_of(json=ENDLESS["any"])) for _ in range(2))
    row, other = (np.zeros(mask_words(DEMO_VOCAB), dtype=np.int32) for _ in range(2))
    bounded.fill(row)
    assert not bounded.narrow(row, 100)
    free.fill(other)
    assert (row == other).all()


def test_other_guides_are_not_ended_sooner(demo: Guides) -> None:
    guide = demo.start(guide_of(regex="[0-9]{1,10}"))
    row = np.zeros(mask_words(DEMO_VOCAB), dtype=np.int32)
    for left in range(10, 0, -1):
        guide.fill(row)
        assert not guide.narrow(row, left)
        guide.advance(DEMO_TOKENIZER.encode("7").ids[0])


def test_what_is_banned_is_not_forced(demo: Guides) -> None:
    """The answer may then be cut off."""
    guide = demo.start(guide_of(json={"type": "string"}))
    quote = DEMO_TOKENIZER.encode('"').ids[0]
    logits = torch.randn(1, DEMO_VOCAB, generator=torch.Generator().manual_seed(0))
    for left in range(40, 0, -1):
        edited = logits.clone()
        if left < 40:
            edited[0, quote] = -torch.inf
        wanted, dead_ends = guided(logits, edited, [guide], [left])
        assert not dead_ends
        token = int(wanted[0].argmax())
        assert left == 40 or token != quote
        guide.advance(token)


def drawn(guide: Guide, vocab_size: int, most: int, seed: int) -> list[int]:
    """As ``sampled``, but so many tokens at most, an end token among them."""
    draw, tokens = random.Random(seed), list[int]()
    row = np.empty(mask_words(vocab_size), dtype=np.int32)
    while len(tokens) < most and not (tokens and guide.is_complete):
        guide.fill(row)
        guide.narrow(row, most - len(tokens))
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        token = int(draw.choice(np.flatnonzero(bits)))
        guide.advance(token)
        if token in guide.eos_ids:
            break
        tokens.append(token)
    return tokens


def texts(guide: str, endless_bytes: Guides, demo: Guides, seed: int) -> list[str]:
    """What comes of a guide with each vocabulary."""
    tokens = sampled(endless_bytes.start(guide), 256, (), seed)
    ids = sampled(demo.start(guide), DEMO_VOCAB, DEMO_EOS, seed)
    return [bytes(tokens).decode(), DEMO_TOKENIZER.decode(ids)]


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return {"json": schema}


def refusal(call: Callable[..., object], *given: object) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        call(*given)
    assert len(str(caught.value)) < 500
    return caught.value.code, str(caught.value)


# What clients send


@pytest.mark.parametrize(
    "given",
    [
        None,
        "null",
        {},
        "{}",
        {"json": None, "regex": None, "backend": None},
        {"json_object": False},
        {"disable_any_whitespace": True},
    ],
)
def test_nothing_asks_for_nothing(given: object) -> None:
    assert guide_of_vllm(given) is None
    assert guide_of_tensorrt("", "") is None


@pytest.mark.parametrize(
    ("given", "yes", "no"),
    [
        ({"json": {"type": "integer", "maximum": 9, "minimum": 0}}, "7", "a"),
        ({"json": '{"enum": ["a"]}'}, '"a"', '"b"'),
        ('{"json": {"const": null}, "choice": null}', "null", "0"),
        ({"regex": "a/[0-9]+\n"}, "a/12\n", "a/\n"),
        ({"choice": ["x\"y", "\\", "\u00e9\n\x7f"]}, "\u00e9\n\x7f", "x"),
        ({"grammar": 'start: "a" B\nB: /[xy]/'}, "ay", "az"),
        ({"grammar": 'root ::= "a" [xy]+'}, "ayx", "a"),
        ({"json_object": True, "backend": "guidance", "disable_fallback": True}, '{"a": []}', "1"),
        ({"json": {"type": "array"}, "disable_any_whitespace": True}, "[1,2]", "[1, 2]"),
        ({"json": {"type": "array"}, "whitespace_pattern": "_"}, "[1,_2]", "[1, 2]"),
    ],
)  # fmt: skip
def test_each_kind_of_vllms_allows_what_it_says(
    given: object, yes: str, no: str, bytes_with_end: Guides
) -> None:
    guide = guide_of_vllm(given)
    assert guide is not None
    assert _accepts(bytes_with_end.start(guide), yes)
    assert not _accepts(bytes_with_end.start(guide), no)


@pytest.mark.parametrize(
    ("kind", "guide", "yes", "no"),
    [
        ("json", "", '[{"a": 1}]', "1"),
        ("json_schema", '{"type": "boolean"}', "true", "1"),
        ("regex", "ab?", "a", "b"),
        ("ebnf_grammar", 'root ::= "a" | "b" root', "bba", "bb"),
    ],
)
def test_each_kind_of_tensorrts_allows_what_it_says(
    kind: str, guide: str, yes: str, no: str, bytes_with_end: Guides
) -> None:
    grammar = guide_of_tensorrt(kind, guide)
    assert grammar is not None
    assert _accepts(bytes_with_end.start(grammar), yes)
    assert not _accepts(bytes_with_end.start(grammar), no)


def _accepts(guide: Guide, text: str) -> bool:
    for byte in text.encode():
        if byte not in allowed(guide, 300):
            return False
        guide.advance(byte)
    return EOS in allowed(guide, 300)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, ["structured_outputs=5", "object"]),
        ("{", ["structured_outputs='{'", "JSON object"]),
        ("[" * 50_000, ["nested too deeply"]),
        (_deep(5000), ["nested too deeply"]),
        ({"jsn": {}}, ["unknown key 'jsn'", "known are json, regex"]),
        ({"json": {}, "regex": "a"}, ["json and regex", "give one"]),
        ({"json": 5}, ["json=5", "object"]),
        (
            {
                "json": {
                    "properties": {f"p{i}": {"type": "string" if i < 9 else "x"} for i in range(40)}
                }
            },
            ["Invalid type: x, at /properties/p9"],
        ),
        (
            {"json": {"items": {"anyOf": [{}, {"minLength": "x"}]}}},
            ["minLength", "at /items/anyOf/1"],
        ),
        (
            {
                "json": {
                    "examples": [{"type": "x"}],
                    "properties": {"a": {"$ref": "#/$defs/b"}, "c": {"type": "x"}},
                    "$defs": {"b": {"type": "string"}},
                }
            },
            ["at /properties/c"],
        ),
        (
            {"json": {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "x"}}}},
            ["at /$defs/b"],
        ),
        ({"json": '{"a": }'}, ["json='{\"a\": }'", "line 1 column 7"]),
        ({"json": "[" * 50_000}, ["json=", "JSON schema"]),
        ({"json": "[1]"}, ["json='[1]'", "must be an object or boolean"]),
        ({"json": {"type": "integr"}}, ["json=", "Invalid type: integr"]),
        ({"json": {"uniqueItems": True}}, ["Unimplemented", "uniqueItems"]),
        ({"json": {"$ref": "#/$defs/none"}}, ["/$defs/none", "does not exist"]),
        ({"json": {"$ref": "http://localhost/x"}}, ["http://localhost/x"]),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, ["minimum (5)", "maximum (3)"]),
        ({"json": {"$ref": "#"}}, ["no text matches"]),
        ({"json": {"pattern": "a(b"}}, ["unclosed group", "character 2", "'(b'"]),
        ({"json": {}, "disable_any_whitespace": 3}, ["disable_any_whitespace=3", "bool"]),
        ({"json": {}, "whitespace_pattern": "a("}, ["whitespace_pattern='a('", "character 2"]),
        ({"json_object": "yes"}, ["json_object='yes'", "bool"]),
        ({"regex": 5}, ["regex=5", "str"]),
        ({"regex": ""}, ["regex=''", "empty"]),
        ({"regex": "x" * 300 + "(ab"}, ["unclosed group", "character 301", "'(ab'"]),
        ({"regex": "a(?=b)"}, ["look-ahead", "not supported", "character 2"]),
        ({"regex": r"(a)\1"}, ["backreferences", "character 4"]),
        ({"regex": r"a[^\s\S]"}, ["no text matches"]),
        ({"choice": []}, ["choice=[]", "empty", "at least one"]),
        ({"choice": [""]}, ["choice=['']", "no text but the empty one"]),
        ({"choice": "ab"}, ["choice='ab'", "array"]),
        ({"choice": ["a", 1]}, ["choice=['a', 1]", "str"]),
        ({"grammar": ""}, ["grammar=''", "root"]),
        ({"grammar": 'start: "a" foo'}, ["line 1, column 8", 'unknown name: "foo"']),
        ({"grammar": 'start: a\na: "x" )'}, ["line 2, column"]),
        ({"grammar": "root ::= (a"}, ["at line 1"]),
        ({"grammar": "start: start"}, ["no text matches"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(given: object, words: list[str]) -> None:
    code, message = refusal(guide_of_vllm, given)
    assert code == "INVALID_ARG"
    assert message.startswith("structured_outputs")
    for word in words:
        assert word in message
    assert refusal(guide_of_vllm, given, "guided_decoding")[1].startswith("guided_decoding")


@pytest.mark.parametrize(
    ("kind", "guide", "words"),
    [
        ("", "a", ["guided_decoding_guide_type=''", "json_schema, regex"]),
        ("xml", "a", ["guided_decoding_guide_type='xml'", "json_schema, regex"]),
        ("json", "{}", ["leave it out", "json_schema"]),
        ("regex", "", ["guided_decoding_guide is ''", "give one"]),
        ("json_schema", "{", ["guided_decoding_guide='{'", "line 1 column 2"]),
        ("regex", "a)", ["guided_decoding_guide='a)'", "unopened group", "character 2"]),
        ("ebnf_grammar", "root ::=", ["guided_decoding_guide="]),
    ],
)
def test_what_is_wrong_in_tensorrts_words_is_named(kind: str, guide: str, words: list[str]) -> None:
    code, message = refusal(guide_of_tensorrt, kind, guide)
    assert code == "INVALID_ARG"
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "given",
    [{"backend": "outlines"}, {"disable_additional_properties": True}, {"structural_tag": "{}"}],
)
def test_what_vllm_knows_and_we_do_not_is_said_to_be(given: dict[str, object]) -> None:
    code, message = refusal(guide_of_vllm, {"regex": "a", **given})
    assert code == "UNSUPPORTED"
    assert next(iter(given)) in message
    assert refusal(guide_of_tensorrt, "structural_tag", "{}")[0] == "UNSUPPORTED"


def _chain(rule: str) -> str:
    return "\n".join(rule.format(i, i + 1) for i in range(4000))


HOSTILE = {
    "10 MB of regex": {"regex": "a" * 10_000_000},
    "10 MB of schema": {"json": {"description": "a" * 10_000_000}},
    "10 MB of choices": {"choice": ["ab" * 50] * 100_000},
    "a regex nested too deeply": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "a repetition of repetitions": {"regex": "((((a{1000}){1000}){1000}){1000}){1000}"},
    "a long repetition": {"regex": "a{1000000}"},
    "many optional parts": {"regex": "(a?)" * 10_000 + "b"},
    "a schema nested too deeply": {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "rules that lead to rules": {"grammar": f'start: a0\n{_chain("a{}: a{}")}\na4000: "x"'},
    "tokens that lead to tokens": {"grammar": f'start: A0\n{_chain("A{}: A{}")}\nA4000: "x"'},
    "EBNF nested too deeply": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "a schema that refers to itself": {"json": {"allOf": [{"$ref": "#"}, {"type": "object"}]}},
    "many patterns at once": {"json": {"allOf": [{"pattern": f"a{i}"} for i in range(50)]}},
    "multiples of a big number": {"json": {"type": "integer", "multipleOf": 1234567}},
    "rules that double": {
        "grammar": f'start: A0\n{"".join(f"A{i}: A{i + 1} A{i + 1}{chr(10)}" for i in range(60))}'
        'A60: "x"'
    },
}  # fmt: skip


@pytest.mark.parametrize("given", HOSTILE.values(), ids=HOSTILE)
def test_what_would_crash_or_hang_is_refused(given: dict[str, object]) -> None:
    code, message = refusal(guide_of_vllm, given)
    assert code == "INVALID_ARG"
    assert next(iter(given)) in message
    assert guide_of_vllm({"regex": "a"}), "the next one is served"


def test_the_size_of_a_guide_is_limited_in_bytes() -> None:
    assert guide_of_vllm({"regex": "[é]" + "a" * (GUIDE_BYTES - 4)})
    _, message = refusal(guide_of_vllm, {"regex": "[é]" + "a" * (GUIDE_BYTES - 3)})
    assert f"{GUIDE_BYTES + 1} bytes; at most {GUIDE_BYTES}" in message


def test_front_ends_need_no_torch_for_guides() -> None:
    script = (
        "import sys; from fi_runtime.frontend.guides import guide_of_vllm;"
        "assert guide_of_vllm({'regex': 'a'}).compiled(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Masks


def _strings(alphabet: str, longest: int) -> Iterable[str]:
    for length in range(longest + 1):
        yield from map("".join, itertools.product(alphabet, repeat=length))


def _is_compact(text: str, fits: Callable[[Any], bool]) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return json.dumps(value, separators=(",", ":")) == text and fits(value)


def _array(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 2 and all(one in (1, 22) for one in value)


def _object(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {"a"} and value.get("a", 1) in (1, 2)


ARRAY = {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 2}
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 2}},
    "additionalProperties": False,
}
LANGUAGES: dict[str, tuple[dict[str, Any], str, int, Callable[[str], bool]]] = {
    "regex": ({"regex": "a(b|c){0,2}|bc?"}, "abc", 4, re.compile("a(b|c){0,2}|bc?").fullmatch),
    "optional": ({"regex": "a?b?c?"}, "abc", 4, re.compile("a?b?c?").fullmatch),
    "multibyte": ({"regex": "[é-ë]x?"}, "èéêëìx", 3, re.compile("[é-ë]x?").fullmatch),
    "choice": (
        {"choice": ["a", "ab", "abc", "ca", "b"]},
        "abc",
        4,
        lambda text: text in {"a", "ab", "abc", "ca", "b"},
    ),
    "grammar": (
        {"grammar": 'start: x\nx: "a" x "b" | "c"', },
        "abc",
        7,
        re.compile("c|acb|aacbb|aaacbbb").fullmatch,
    ),
    "array": (
        {"json": ARRAY, "disable_any_whitespace": True}, "[],12", 7,
        lambda text: _is_compact(text, _array),
    ),
    "object": (
        {"json": OBJECT, "disable_any_whitespace": True}, '{}":a12', 7,
        lambda text: _is_compact(text, _object),
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_byte_is_allowed_exactly_where_some_text_goes_on_with_it(
    language: str, bytes_with_end: Guides
) -> None:
    given, alphabet, longest, matches = LANGUAGES[language]
    known = {text.encode() for text in _strings(alphabet, longest) if matches(text)}
    prefixes = {text[:end] for text in known for end in range(len(text) + 1)}
    # a grammar without bounds is looked at where the enumeration is complete
    depth = 2 if language == "grammar" else longest * 4
    grammar = guide_of(**given)
    assert len(known) > 2
    for prefix in sorted(prefix for prefix in prefixes if len(prefix) <= depth):
        guide = bytes_with_end.start(grammar)
        for byte in prefix:
            guide.advance(byte)
        follow = {other[len(prefix)] for other in prefixes
                  if len(other) > len(prefix) and other.startswith(prefix)}  # fmt: skip
        assert guide.is_complete == (not follow)
        assert allowed(guide, 300) == follow | ({EOS} if prefix in known else set())


def test_all_ends_are_allowed_where_the_guide_may_end(demo: Guides) -> None:
    guide = demo.start(guide_of(regex="[0-9]{1,2}"))
    first = allowed(guide, DEMO_VOCAB)
    assert not first & set(DEMO_EOS)
    guide.advance(min(first))
    assert set(DEMO_EOS) < allowed(guide, DEMO_VOCAB)
    with pytest.raises(ValueError, match="token 1 is not allowed"):
        guide.advance(1)


def test_an_end_completes_a_guide_and_nothing_follows_it(bytes_with_end: Guides) -> None:
    guide = bytes_with_end.start(guide_of(regex="a*"))
    guide.advance(ord("a"))
    assert not guide.is_complete
    guide.advance(EOS)
    assert guide.is_complete
    assert allowed(guide, 300) == {EOS}
    with pytest.raises(ValueError, match="not allowed"):
        guide.advance(ord("a"))


def test_an_end_before_its_time_is_refused(bytes_with_end: Guides) -> None:
    with pytest.raises(ValueError, match=f"token {EOS} is not allowed"):
        bytes_with_end.start(guide_of(regex="a")).advance(EOS)


@pytest.mark.parametrize("token", [ord("b"), 257, 299, 10**6])
def test_a_token_that_is_not_allowed_is_refused(token: int, bytes_with_end: Guides) -> None:
    with pytest.raises(ValueError, match=f"token {token} is not allowed"):
        bytes_with_end.start(guide_of(regex="a+")).advance(token)


def test_an_end_is_never_text(byte_file: Path) -> None:
    guide = Guides(byte_file, 256, (ord("b"),)).start(guide_of(regex="ab?c?"))
    assert allowed(guide, 256) == {ord("a")}
    guide.advance(ord("a"))
    assert allowed(guide, 256) == {ord("b"), ord("c")}
    guide.advance(ord("b"))
    assert guide.is_complete


def test_without_an_end_a_guide_is_complete_where_nothing_follows(endless_bytes: Guides) -> None:
    guide = endless_bytes.start(guide_of(regex="ab?"))
    guide.advance(ord("a"))
    assert not guide.is_complete
    assert allowed(guide, 256) == {ord("b")}
    guide.advance(ord("b"))
    assert guide.is_complete
    row = np.full(mask_words(256), -1, dtype=np.int32)
    with pytest.raises(DeadEnd, match="complete"):
        guide.fill(row)
    assert not row.any()


def test_text_that_the_vocabulary_cannot_write_is_a_dead_end(byte_file: Path) -> None:
    up_to_c = Guides(byte_file, ord("d"), ())
    with pytest.raises(ValueError, match="cannot begin"):
        up_to_c.start(guide_of(regex="za"))
    guide = up_to_c.start(guide_of(regex="az"))
    guide.advance(ord("a"))
    assert not guide.is_complete
    row = np.full(mask_words(ord("d")), -1, dtype=np.int32)
    with pytest.raises(DeadEnd, match="cannot be written"):
        guide.fill(row)
    assert not row.any()
    guide = up_to_c.start(guide_of(regex="az?"))
    guide.advance(ord("a"))
    assert guide.is_complete


def test_a_guide_that_becomes_too_complex_is_a_dead_end(bytes_with_end: Guides) -> None:
    pattern = "(" * 4 + "ab?" + "){1,1000}" * 4
    guide = bytes_with_end.start(guide_of(regex=pattern))

    def go_on() -> None:
        for token in itertools.cycle(b"ab"):
            allowed(guide, 300)
            guide.advance(token)

    with pytest.raises(DeadEnd, match="too many"):
        go_on()
    assert not guide.is_complete


def test_a_guide_that_does_not_compile_says_why(bytes_with_end: Guides, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'does not compile.*unknown name: "foo"'):
        bytes_with_end.start("start: foo")
    file = tmp_path / "tokenizer.json"
    Tokenizer.from_str(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    ).save(str(file))
    with pytest.raises(ValueError, match="guides cannot be used with"):
        Guides(file, 1, ()).start(guide_of(regex="a"))


# What is generated

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(STRINGS, min_size=1, max_size=4)),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-200, 200),
        st.integers(0, 300),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, low, size: {
            "type": "array", "items": items, "minItems": low, "maxItems": low + size
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )  # fmt: skip
    objects = st.builds(
        lambda properties, count: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:count],
            "additionalProperties": False,
        },
        st.dictionaries(STRINGS, inner, max_size=3),
        st.integers(0, 3),
    )
    return st.one_of(arrays, objects, st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner))


SCHEMAS = st.recursive(SCALARS, _nested, max_leaves=5)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a schema of ``SCHEMAS`` asks for."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            lengths = range(schema["minItems"], schema["maxItems"] + 1)
            return (
                isinstance(value, list)
                and len(value) in lengths
                and all(fits(one, schema["items"]) for one in value)
            )
        case "object":
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(schema["properties"])
                and all(fits(one, schema["properties"][key]) for key, one in value.items())
            )
        case "boolean":
            return isinstance(value, bool)
        case _:
            return value is None


@settings(deadline=None, max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_whatever_is_drawn_is_json_of_the_schema(
    schema: dict[str, Any], seed: int, endless_bytes: Guides, demo: Guides
) -> None:
    for text in texts(guide_of(json=schema), endless_bytes, demo, seed):
        assert fits(json.loads(text), schema)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_the_default_checkpoints_tokens_make_any_object(seed: int, demo: Guides) -> None:
    """Without bounds an end is drawn too seldom; a nudge towards brackets and quotes ends it."""
    guide = demo.start(guide_of(json_object=True))
    draw, tokens = random.Random(seed), []
    closing = {DEMO_TOKENIZER.token_to_id(one) for one in '"}]'}
    while not guide.is_complete:
        may = allowed(guide, DEMO_VOCAB)
        tokens.append(
            draw.choice(sorted(may & closing if len(tokens) > 20 and may & closing else may))
        )
        guide.advance(tokens[-1])
        assert len(tokens) < 5000
    assert isinstance(json.loads(DEMO_TOKENIZER.decode(tokens)), dict)


@settings(deadline=None, max_examples=100)
@given(
    choices=st.lists(STRINGS, min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 2**32),
)
def test_a_choice_is_one_of_the_list(
    choices: list[str], seed: int, endless_bytes: Guides, demo: Guides
) -> None:
    for text in texts(guide_of(choice=choices), endless_bytes, demo, seed):
        assert text in choices


# Logits


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 199, 1504])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logits_of_what_is_not_allowed_become_minus_infinity(
    vocab_size: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    generator = np.random.default_rng(vocab_size)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = [3, 0, 4]
    masks = generator.integers(-(2**31), 2**31, (3, mask_words(vocab_size))).astype(np.int32)
    masks[:, 0] |= 1
    masks[2] = 0
    expected = logits.clone()
    for mask, row in zip(masks[:2], rows[:2], strict=True):
        for token in range(vocab_size):
            if not mask[token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    there = logits.to(device)
    apply(there, rows, masks)
    assert torch.equal(there.cpu(), expected), "a row of an empty mask is left as it was"
