"""Requests of a model to itself that the server turns down before any queue."""

from typing import Any

import triton_python_backend_utils as pb


def why_refused(model: str, decoupled: bool, tensors: list[Any]) -> str:
    """What the server says to a request with inputs that the model does not have.

    ``tensors`` are in shared memory then, unless there is no room for them: it says so.
    """
    try:
        question = pb.InferenceRequest(
            model_name=model, requested_output_names=["text_output"], inputs=tensors
        )
        answer: Any = question.exec(decoupled=decoupled)
        errors = [one.error() for one in (answer if decoupled else [answer])]
        return " ".join(error.message() for error in errors if error is not None)
    except Exception as error:  # as when there is no shared memory to be had
        return repr(error)
