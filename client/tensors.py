"""The model's inputs and outputs as tritonclient's tensors, which gRPC and HTTP have alike."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from client.request import OUTPUTS, Piece

BATCH_SHAPE = (1, 1)
"""one request of one element: the models batch"""


def to_tensors(inputs: Mapping[str, str | bool], infer_input: type[Any]) -> list[Any]:
    """Inputs as `infer_input`, the InferInput of the protocol's module."""
    tensors = []
    for name, value in inputs.items():
        if isinstance(value, bool):
            array, datatype = np.full(BATCH_SHAPE, value, dtype=np.bool_), "BOOL"
        else:
            array, datatype = np.full(BATCH_SHAPE, value.encode(), dtype=np.object_), "BYTES"
        tensor = infer_input(name, list(BATCH_SHAPE), datatype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def to_piece(result: Any) -> Piece:
    """From an InferResult."""
    values = {name: result.as_numpy(name).reshape(-1)[0] for name in OUTPUTS}
    return Piece.from_outputs(
        {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}
    )
