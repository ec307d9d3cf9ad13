"""A request's responses: one last, and nothing raised to whom it does not concern."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fi_runtime.frontend.requests import RequestError

FINAL = 1


class Sender:
    """As Triton's: refuses what it is told to, keeps the rest.

    A refused last response is its last all the same, as of the Python backend's senders.
    """

    def __init__(self, refuse: int = 0) -> None:
        self.refuse = refuse
        self.sent: list[tuple[Any, int]] = []
        self._is_closed = False

    def send(self, response: Any, flags: int) -> None:
        assert not any(last for _, last in self.sent), "sent after the last response"
        if self._is_closed:
            raise RuntimeError("Response sender has been closed")
        self._is_closed = bool(flags)
        if self.refuse:
            self.refuse -= 1
            raise RuntimeError("no shared memory")
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        assert not any(last for _, last in self.sent), "asked after the last response"
        raise RuntimeError("no answer")


@pytest.fixture
def responder_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, with a stand-in for the module that exists in Triton's stub only."""
    backend = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        Tensor=lambda name, value: (name, value.shape),
        InferenceResponse=lambda output_tensors=None, error=None: error or output_tensors,
        TritonError=type("TritonError", (), {"INTERNAL": 1, "__init__": lambda *_: None}),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.delitem(sys.modules, "fi_runtime.frontend.responder", raising=False)
    from fi_runtime.frontend.responder import Responder

    yield Responder
    sys.modules.pop("fi_runtime.frontend.responder", None)


TENSORS = {"text_output": np.array([b"x"], dtype=np.object_)}
ERROR = RequestError("INTERNAL", "it failed")


def nothing(tensors: list[Any]) -> str:
    """What a server says that has memory for them."""
    return "unexpected inference input"


def test_a_batched_model_gets_a_batch_dimension(responder_class: Any) -> None:
    for batched, shape in ((True, (1, 1)), (False, (1,))):
        sender = Sender()
        responder_class(sender, batched, nothing).send(TENSORS, last=False)
        assert sender.sent == [([("text_output", shape)], 0)]


def test_nothing_follows_the_last_response(responder_class: Any) -> None:
    sender = Sender()
    responder = responder_class(sender, True, nothing)
    responder.send(TENSORS, last=True)
    responder.send(TENSORS, last=True)
    responder.fail(ERROR)
    assert not responder.is_cancelled()
    assert [flags for _, flags in sender.sent] == [FINAL]


def test_a_response_that_is_refused_can_still_be_an_error(responder_class: Any) -> None:
    sender = Sender(refuse=1)
    responder = responder_class(sender, True, nothing)
    with pytest.raises(RuntimeError, match="no shared memory"):
        responder.send(TENSORS, last=False)
    responder.fail(ERROR)
    assert [flags for _, flags in sender.sent] == [FINAL]


@pytest.mark.parametrize("is_low", [False, True])
def test_a_last_response_is_sent_where_there_is_room_for_it(
    responder_class: Any, monkeypatch: pytest.MonkeyPatch, is_low: bool
) -> None:
    module = sys.modules[responder_class.__module__]
    monkeypatch.setattr(module, "is_low", lambda size: is_low and size == 1)
    sender = Sender()
    responder = responder_class(sender, True, lambda tensors: f"no shared memory for {tensors}")
    if is_low:
        with pytest.raises(RequestError, match=r"1 bytes: .*text_output") as caught:
            responder.send(TENSORS, last=True)
        assert caught.value.code == "UNAVAILABLE"
        assert sender.sent == []
        responder.fail(ERROR)
    else:
        responder.send(TENSORS, last=True)
    assert [flags for _, flags in sender.sent] == [FINAL]


def test_failing_and_asking_never_raise(responder_class: Any) -> None:
    sender = Sender(refuse=9)
    responder = responder_class(sender, True, nothing)
    responder.fail(ERROR)
    assert not responder.is_cancelled()
