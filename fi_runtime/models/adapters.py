"""LoRA adapters, in the format that PEFT writes: which tensors add to which projection."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fi_runtime.config import ConfigError
from fi_runtime.dtypes import DTYPES, dtype_name
from fi_runtime.models.config import read_json
from fi_runtime.models.weights import open_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 512
RANKS_MULTIPLE = 16
"""of all adapters together, padded: what kernels take, and what keeps rows aligned"""
PADDING = -1
"""the adapter of ranks that are padding; no row has it"""

# Names of tensors: what PEFT puts before them, the model that they were trained in as each version
# of transformers has called its text model, the projection, and which of its two they are.
_PROJECTION = r"layers\.\d+\.(?P<projection>(?:self_attn|mlp)\.\w+_proj)"
_TENSOR = re.compile(
    r"base_model\.model\.(?:model|language_model\.model|model\.language_model)\."
    rf"(?P<module>{_PROJECTION})\.lora_(?P<which>[AB])\.weight"
)

# Of adapter_config.json: what says nothing of the answer once an adapter is trained, or is read
# here. All else has to be left out, null, false or empty.
_KNOWN = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_KEEP_BASE = ("gaussian", "eva", "orthogonal")
"""Beginnings of an adapter, beside true and false, that leave the weights below it as they are."""


@dataclass(frozen=True)
class LowRank:
    """What all adapters add to a projection, as ``AdaptedLinear`` takes it."""

    a: torch.Tensor
    b: list[torch.Tensor]


class Adapters:
    """The adapters of a model, each with its name.

    Args:
        folders: of each adapter, by name.

    Raises:
        ConfigError: a file missing or malformed, or something in it that cannot be served; says
            which file, what was found and what is supported.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._adapters = [_Adapter(Path(folder)) for folder in folders.values()]
        self.names = tuple(folders)
        ranks = [adapter.rank for adapter in self._adapters]
        self._starts = [sum(ranks[:number]) for number in range(len(ranks))]
        padded = -(-sum(ranks) // RANKS_MULTIPLE) * RANKS_MULTIPLE
        self.ranks = torch.full((padded,), PADDING, dtype=torch.int64)
        """(ranks,): the adapter of each rank, counted from 1"""
        for number, (start, rank) in enumerate(zip(self._starts, ranks, strict=True), 1):
            self.ranks[start : start + rank] = number
        self._offered: dict[str, None] = {}

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum((adapter.folder / TENSORS).stat().st_size for adapter in self._adapters)

    def take(self, outputs: Mapping[str, int], inputs: int, like: torch.Tensor) -> LowRank | None:
        """What they add to a projection, or to several joined; None if none of them adds any.

        Args:
            outputs: names of the projections, and how many outputs each has.
            inputs: of each.
            like: its dtype and device are those to be had.

        Raises:
            ConfigError: a tensor of another shape, or with something in it that is no number.
        """
        for name in outputs:
            if match := re.fullmatch(rf"model\.{_PROJECTION}", name):
                self._offered[match["projection"]] = None
        if not any(name in adapter.modules for adapter in self._adapters for name in outputs):
            return None
        a = like.new_zeros((len(outputs), len(self.ranks), inputs))
        b: list[torch.Tensor] = []
        sizes = list(outputs.values())
        for part, (name, size) in enumerate(outputs.items()):
            # A run of parts of one size is one batch of products.
            if part == 0 or size != sizes[part - 1]:
                run = next((i for i, s in enumerate(sizes[part:]) if s != size), len(sizes) - part)
                b.append(like.new_zeros((run, len(self.ranks), size)))
                first = part
            for start, adapter in zip(self._starts, self._adapters, strict=True):
                if name in adapter.modules:
                    down, up = adapter.take(name, size, inputs, like.dtype)
                    ranks = slice(start, start + adapter.rank)
                    a[part, ranks] = down.to(like.device)
                    b[-1][part - first, ranks] = up.T.to(like.device)
        return LowRank(a.flatten(0, 1), b)

    def close(self) -> None:
        """Close the files, all of which must have been taken.

        Raises:
            ConfigError: an adapter is for projections that the model has not.
        """
        for adapter in self._adapters:
            adapter.close(self._offered)


class _Adapter:
    """One adapter's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (CONFIG, TENSORS):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{folder / name}: no such file; an adapter is a folder with {CONFIG} and "
                    f"{TENSORS}, as PEFT's save_pretrained writes them"
                )
        self.rank, self._scale = _read_config(folder / CONFIG)
        path = folder / TENSORS
        self._file: Any = open_safetensors(path)
        self.modules: dict[str, dict[str, str]] = {}
        """names of the A and the B of each projection"""
        for name in self._file.keys():  # noqa: SIM118 - a handle, no mapping
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise ConfigError(
                    f"{path}: tensor {name} cannot be served; supported are lora_A.weight and "
                    "lora_B.weight of projections of layers' self_attn and mlp, experts not among "
                    "them"
                )
            self.modules.setdefault(f"model.{match['module']}", {})[match["which"]] = name
        for module, pair in self.modules.items():
            if len(pair) < 2:
                raise ConfigError(f"{path}: of {module} there is lora_{min(pair)} alone")
        self._left = set(self.modules)

    def take(
        self, module: str, outputs: int, inputs: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (rank, inputs), and B times the scale, (outputs, rank)."""
        self._left.discard(module)
        pair = self.modules[module]
        return (
            self._tensor(pair["A"], (self.rank, inputs), 1.0, dtype),
            self._tensor(pair["B"], (outputs, self.rank), self._scale, dtype),
        )

    def close(self, offered: Mapping[str, None]) -> None:
        self._file = None
        if self._left:
            raise ConfigError(
                f"{self.folder / TENSORS}: adapts {min(self._left)}, which the model does not have "
                f"or cannot have adapted; in its layers can be: {', '.join(offered)}"
            )

    def _tensor(
        self, name: str, shape: tuple[int, int], scale: float, dtype: torch.dtype
    ) -> torch.Tensor:
        path = self.folder / TENSORS
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ConfigError(f"{path}: tensor {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}; expected {list(shape)} "
                f"from the model and r in {CONFIG}"
            )
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(
                f"{path}: tensor {name} has dtype {tensor.dtype}; supported are {', '.join(DTYPES)}"
            )
        scaled = (tensor.float() * scale).to(dtype)
        # Rows without this adapter multiply its B by 0, which would leave what is no number.
        if not scaled.isfinite().all():
            raise ConfigError(
                f"{path}: tensor {name} has values that are not finite in {dtype_name(dtype)}"
            )
        return scaled


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and scale of an adapter, whose configuration asks for nothing else."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {config.get('peft_type')!r}; supported is 'LORA'")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{path}: bias is {config['bias']!r}; supported is 'none'")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _KEEP_BASE:
        raise ConfigError(
            f"{path}: init_lora_weights is {start!r}, which changes the weights that the adapter "
            "adds to; have PEFT convert it to a plain adapter, or supported are true, false, "
            f"{', '.join(_KEEP_BASE)}"
        )
    for name, value in config.items():
        if value and name not in _KNOWN:
            raise ConfigError(
                f"{path}: {name} is {value!r}, which is not supported; supported is a plain LoRA, "
                f"with {name} left out, null or false"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"{path}: r is {rank!r}; supported are 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigError(f"{path}: lora_alpha is {alpha!r}; expected a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
