"""Guides as clients send them, to the grammar that the engine takes.

What a client asked for is read at once; it is compiled when somebody has the time.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fi_runtime.config import GUIDE_BYTES
from fi_runtime.frontend.errors import RequestError, short

KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""vLLM's keys that hold a guide"""

ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {
    # llguidance is what vLLM calls guidance, and nothing else is fallen back on.
    "backend": ("auto", "guidance"),
    "disable_fallback": (True,),
    "disable_additional_properties": (),
    "structural_tag": (),
}
"""vLLM's other keys, and the values beside null and false that this build fulfils"""

DEFINITIONS = ("$defs", "definitions")
BY_NAME = (*DEFINITIONS, "properties", "patternProperties", "dependentSchemas")
"""what holds schemas by name in a JSON schema"""
LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
"""what holds several in a list"""
ALONE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
"""what is one"""
PLACE_S = 0.5
"""for which it is looked where a schema is wrong"""
SOME_WHITESPACE: dict[str, object] = {"whitespace_pattern": r"( |\n( {0,32}|\t{0,8}))?"}
"""between the parts of JSON, where the client says nothing: of any amount some models never end"""
WHITESPACE: dict[str, type] = {"disable_any_whitespace": bool, "whitespace_pattern": str}
"""vLLM's keys that say what may stand between the parts of JSON"""

TENSORRT_KINDS = ("json", "json_schema", "regex", "ebnf_grammar")


@dataclass(frozen=True)
class Guide:
    """What an answer has to match, as llguidance takes it, and not compiled yet."""

    kind: str
    text: str
    given: object
    of: str
    """what the client calls it"""
    options: dict[str, object] = field(default_factory=dict)
    part: "Guide | None" = None
    """of it, compiled first to say what is wrong there"""

    def compiled(self) -> str:
        """The serialised grammar; takes up to the checker's limit of time.

        Raises:
            RequestError: says what was given, and what is wrong with it and where.
        """
        if self.part is not None:
            self.part.compiled()
        grammar, reason = self._check(self.text)
        if reason:
            place = self._place(reason) if self.kind == "json_schema" else ""
            raise _bad(f"{self.of}={short(self.given)}", _readable(reason) + place)
        return grammar

    def _check(self, text: str) -> tuple[str, str]:
        """As ``_Checker.check``, of this guide or of a part of it."""
        return _checker.check({"kind": self.kind, "text": text, "options": self.options})

    def _place(self, reason: str) -> str:
        """Where in a schema the innermost part is that is wrong in this way by itself."""
        begin, path, schema = time.monotonic(), "", json.loads(self.text)
        if not isinstance(schema, dict):
            return ""
        shared = {key: schema[key] for key in DEFINITIONS if key in schema}
        inner = [*_parts(schema)]
        while inner and time.monotonic() - begin < PLACE_S:
            name, part = inner.pop(0)
            # Definitions come first, and are looked at without the others, of which one is wrong.
            given = part if (path + name)[1:].startswith(DEFINITIONS) else shared | part
            if self._check(json.dumps(given))[1] == reason:
                path += name
                inner = [*_parts(part)]
        return f", at {path}" if path else ""


def guide_of_vllm(
    value: object, name: str = "structured_outputs", most_bytes: int = GUIDE_BYTES
) -> Guide | None:
    """What vLLM's ``structured_outputs`` or ``guided_decoding`` asks for; None for nothing.

    Args:
        value: an object with one of ``KINDS``, or a string that holds one; null asks for nothing.
        name: what the client calls it.
        most_bytes: of a guide.

    Raises:
        RequestError: says what was given, and what is wrong with it and where.
    """
    try:
        return _guide_of_vllm(_object(value, name), name, most_bytes)
    except RecursionError:
        raise _bad(name, "it is nested too deeply") from None


def guide_of_tensorrt(kind: str, guide: str, most_bytes: int = GUIDE_BYTES) -> Guide | None:
    """What TensorRT-LLM's inputs ask for; None if both are empty.

    Args:
        kind: guided_decoding_guide_type, one of ``TENSORRT_KINDS``.
        guide: guided_decoding_guide; empty for json, which is any object or array.
        most_bytes: of a guide.

    Raises:
        RequestError: says what was given, and what is wrong with it and where.
    """
    if not kind and not guide:
        return None
    name = "guided_decoding_guide_type"
    if kind == "structural_tag":
        raise RequestError("UNSUPPORTED", f"{name}={short(kind)} is not supported; leave it out")
    if kind not in TENSORRT_KINDS:
        raise _bad(f"{name}={short(kind)}", f"expected one of {', '.join(TENSORRT_KINDS)}")
    of = "guided_decoding_guide"
    if (kind == "json") == bool(guide):
        raise _bad(
            f"{name}={short(kind)}",
            f"{of} is {short(guide)}; "
            + ("leave it out, or say json_schema" if guide else "give one with this type"),
        )
    _check_size(guide, of, most_bytes)
    if kind == "json":
        return _json('{"type": ["object", "array"]}', guide, of)
    if kind == "json_schema":
        return _json(guide, guide, of)
    return Guide("regex" if kind == "regex" else "grammar", guide, guide, of)


def _guide_of_vllm(given: dict[str, object], name: str, most_bytes: int) -> Guide | None:
    known = (*KINDS, *ASKS_FOR_NOTHING, *WHITESPACE)
    for key, one in given.items():
        if key not in known:
            raise _bad(name, f"unknown key {short(key)}; known are {', '.join(known)}")
        if key in ASKS_FOR_NOTHING and one not in ASKS_FOR_NOTHING[key]:
            raise RequestError(
                "UNSUPPORTED", f"{name}: {key}={short(one)} is not supported; leave it out"
            )
    kinds = [key for key in KINDS if key in given]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise _bad(name, f"{' and '.join(kinds)} are given; give one")
    kind, guide = kinds[0], given[kinds[0]]
    of = f"{name}: {kind}"
    for text in (guide, given.get("whitespace_pattern", "")):
        _check_size(text if isinstance(text, str) else json.dumps(text), of, most_bytes)
    if kind == "json":
        text = guide if isinstance(guide, str) else json.dumps(_is(guide, dict[str, object], of))
        return _json(text, guide, of, *_whitespace(given, name))
    if kind == "json_object":
        _is(guide, bool, of)
        return _json('{"type": "object"}', guide, of, *_whitespace(given, name))
    if kind == "choice":
        return _choice(_is(guide, list[str], of), of)
    return Guide(kind, str(_is(guide, str, of)), guide, of)


def _object(value: object, name: str) -> dict[str, object]:
    """What the client's object holds beside null and false."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise _bad(f"{name}={short(value)}", f"expected a JSON object: {error}") from None
    if value is None:
        return {}
    found = _is(value, dict[str, object], name)
    return {key: one for key, one in found.items() if one is not None and one is not False}


def _json(
    text: str,
    given: object,
    of: str,
    options: dict[str, object] = SOME_WHITESPACE,
    part: Guide | None = None,
) -> Guide:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{of}={short(given)}", f"expected a JSON schema: {error}") from None
    if schema is True:
        schema = {}  # which is the same, and takes options
    if not isinstance(schema, dict):
        options = {}  # for llguidance to say what is wrong
    # Written anew: llguidance pastes a schema's text into its own JSON.
    return Guide("json_schema", json.dumps(schema), given, of, options, part)


def _whitespace(given: dict[str, object], name: str) -> tuple[dict[str, object], Guide | None]:
    """Llguidance's options for what vLLM's say, and the pattern among them."""
    for key in WHITESPACE.keys() & given.keys():
        _is(given[key], WHITESPACE[key], f"{name}: {key}")
    options = dict(SOME_WHITESPACE)
    part = None
    if "disable_any_whitespace" in given:
        options = {"whitespace_flexible": False}
    if "whitespace_pattern" in given:
        pattern = str(given["whitespace_pattern"])
        part = Guide("regex", pattern, pattern, f"{name}: whitespace_pattern")
        options["whitespace_pattern"] = pattern
    return options, part


def _choice(choices: list[str], of: str) -> Guide:
    if not choices:
        raise _bad(f"{of}=[]", "the list is empty; give at least one string")
    # One terminal: as alternatives of a rule, some thousand would be too many for the parser.
    alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    alternatives = alternatives.replace("\x7f", r"\u007f")  # which JSON leaves, and Lark refuses
    return Guide("lark", f"start: CHOICE\nCHOICE: {alternatives}\n", choices, of)


def _check_size(text: str, of: str, most: int) -> None:
    size = len(text.encode(errors="surrogatepass"))
    if size > most:
        raise _bad(of, f"the guide has {size} bytes; at most {most} are taken")


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas within a schema, and the place of each as a JSON pointer."""
    found: list[tuple[str, object]] = []
    for key in BY_NAME:
        if isinstance(by_name := schema.get(key), dict):
            for name, part in by_name.items():
                found.append((f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", part))
    for key in LISTED:
        if isinstance(listed := schema.get(key), list):
            found += [(f"/{key}/{number}", part) for number, part in enumerate(listed)]
    found += [(f"/{key}", schema.get(key)) for key in ALONE]
    return ((place, part) for place, part in found if isinstance(part, dict))


def _is(value: object, expected: Any, of: str) -> Any:
    """The value, if it is of that type."""
    try:
        return msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        raise _bad(f"{of}={short(value)}", str(error)) from None


def _bad(what: str, why: str) -> RequestError:
    return RequestError("INVALID_ARG", f"{what}: {why}")


def _readable(reason: str) -> str:
    """What llguidance says, with the place, and without the guide, which it repeats in full."""
    of_regex = re.search(r"regex parse error:\n {4}(.*)\n {4}( *)\^+.*\nerror: (.*)", reason)
    if of_regex:
        pattern, before, what = of_regex.groups()
        place = pattern[len(before) : len(before) + 20]
        return f"{what}, at character {len(before) + 1}: {place!r}"
    # A schema within what json takes may be deeper than llguidance does.
    reason = reason.replace("recursion limit exceeded", "it is nested too deeply,")
    line = re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", reason.split("\n")[0])
    return line if len(line) <= 200 else line[:197] + "..."


class _Checker:
    """The process that compiles guides first; started when needed, and again after its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, question: dict[str, object]) -> tuple[str, str]:
        """The serialised grammar, or why there is none; one of them is empty."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            ended = 0 if line else self._process.wait()
        if ended > 0:
            raise RequestError(
                "INTERNAL", "guides cannot be compiled on this server; its log says why"
            )
        if ended < 0:
            took = "time" if ended == -signal.SIGPROF else "memory or nesting"
            return "", f"it is too complex: compiling it takes too much {took}"
        answer = json.loads(line)
        return answer.get("grammar", ""), answer.get("error", "")


def _start() -> "subprocess.Popen[bytes]":
    # Inside Triton's stub, sys.executable may be empty or the stub.
    own = Path(sys.executable).name.startswith("python")
    return subprocess.Popen(
        [sys.executable if own else "python3", "-m", "fi_runtime.guide_checker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the server; this ends when its input does
    )


_checker = _Checker()
