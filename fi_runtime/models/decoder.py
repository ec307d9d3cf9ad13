"""The decoder that most families are: pre-norm, rotary, grouped-query attention, gated MLP."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fi_runtime.attention.base import Attention
from fi_runtime.kernels.activation import GATED_ACTIVATIONS
from fi_runtime.kernels.embedding import embed
from fi_runtime.kernels.heads import Heads
from fi_runtime.layers.adapted import AdaptedLinear
from fi_runtime.layers.fp8 import Fp8Linear
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.mlp import GatedMLP
from fi_runtime.layers.norm import OffsetRMSNorm, RMSNorm
from fi_runtime.layers.residual import ResidualStream
from fi_runtime.layers.self_attention import SelfAttention
from fi_runtime.models.adapters import Adapters
from fi_runtime.models.config import ModelConfig
from fi_runtime.models.rope import Rope
from fi_runtime.models.weights import Weights

log = logging.getLogger(__name__)

MLP = Callable[[ResidualStream], None]
"""adds to what it reads"""


@dataclass(frozen=True)
class Block:
    attention: SelfAttention
    mlp: MLP


@dataclass(frozen=True)
class Decoder:
    """Tokens in, hidden states out; logits only of the rows that need them."""

    config: ModelConfig
    embedding: torch.Tensor
    """(vocab, hidden)"""
    blocks: list[Block]
    norm: RMSNorm
    head: Linear
    adapters: tuple[str, ...] = ()
    """their names; a token's adapter is a number, counted from 1, and 0 if it has none"""
    ranks: torch.Tensor | None = None
    """(ranks,), int64: the adapter of each rank in the projections"""

    def __call__(
        self,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        attention: Attention,
        adapters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states: (tokens, hidden).

        Args:
            tokens: (tokens,) int64, those that ``attention`` is planned for, as ``embed`` takes
                them.
            last_tokens: (slots,), int64.
            adapters: (tokens,) int64, each one's; None: none has any.
        """
        x = embed(tokens, last_tokens, self.embedding)
        if self.config.embedding_scale != 1.0:
            # Rounded first, as transformers does it.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype).item()
        others = None
        if adapters is not None and self.ranks is not None:
            others = adapters.unsqueeze(1) != self.ranks
        residual = ResidualStream(x, others)
        for block in self.blocks:
            block.attention(residual, attention)
            block.mlp(residual)
        return residual.total

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), in the dtype of the weights; to ``out`` if given."""
        logits = ResidualStream(hidden).project(self.norm, self.head, out)
        cap = self.config.final_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class DecoderBuilder:
    """Takes a decoder's tensors under the names that Llama's checkpoints gave them.

    What a family does otherwise, it overrides.

    Args:
        config: what the tensors' shapes are expected from.
        weights: where they are taken from.
        max_position: positions that the decoder is made for.
        adapters: that sequences may choose from.
    """

    norm_type: type[RMSNorm] = RMSNorm
    qk_norm = False
    """whether each head's queries and keys are normalised before they turn"""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_position: int,
        adapters: Adapters | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self._adapters = adapters
        self.activation = GATED_ACTIVATIONS[config.activation]
        self.embedding = weights.take(
            "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
        )
        device = self.embedding.device
        # Layers that turn alike share a table.
        self._cos_sin = {
            rope: _cos_sin(rope, max_position, device) for rope in dict.fromkeys(config.ropes)
        }

    def build(self) -> Decoder:
        adapters = self._adapters
        return Decoder(
            config=self.config,
            embedding=self.embedding,
            blocks=[self.block(layer) for layer in range(self.config.layers)],
            norm=self.norm("model.norm"),
            head=self.head(),
            adapters=adapters.names if adapters else (),
            ranks=adapters.ranks.to(self.embedding.device) if adapters else None,
        )

    def head(self) -> Linear:
        """(tokens, hidden) -> (tokens, vocab)."""
        config, name = self.config, "lm_head.weight"
        if not config.tied_embeddings:
            return self.linear({"lm_head": config.vocab_size}, config.hidden_size, bias=False)
        if not self.weights.has(name):
            return Linear(self.embedding)
        own = self.weights.take(name, (config.vocab_size, config.hidden_size))
        if torch.equal(own, self.embedding):
            return Linear(self.embedding)
        log.warning(
            "tie_word_embeddings is true, but %s is stored and is not the embedding: it is used, "
            "as transformers does",
            name,
        )
        return Linear(own)

    def block(self, layer: int) -> Block:
        prefix = f"model.layers.{layer}"
        return Block(
            attention=self.attention(layer, self.norm(f"{prefix}.input_layernorm")),
            mlp=self.mlp(layer, self.norm(f"{prefix}.post_attention_layernorm")),
        )

    def attention(
        self, layer: int, norm: RMSNorm, post_norm: RMSNorm | None = None
    ) -> SelfAttention:
        """Of the norm; what it adds is normalised once more if there is a ``post_norm``."""
        config, prefix = self.config, f"model.layers.{layer}.self_attn"
        return SelfAttention(
            layer,
            norm,
            qkv=self.qkv(prefix),
            heads=Heads(
                config.heads,
                config.kv_heads,
                config.head_dim,
                self._cos_sin[config.ropes[layer]],
                q_norm=self._head_norm(f"{prefix}.q_norm"),
                k_norm=self._head_norm(f"{prefix}.k_norm"),
                eps=config.norm_eps,
                norms_add_one=self.norm_type is OffsetRMSNorm,
                sinks=self.sinks(f"{prefix}.sinks"),
            ),
            out=self.linear(
                {f"{prefix}.o_proj": config.hidden_size},
                config.heads * config.head_dim,
                config.out_bias,
            ),
            post_norm=post_norm,
        )

    def sinks(self, name: str) -> torch.Tensor | None:
        """As ``Heads`` has them."""
        if not self.config.sinks:
            return None
        return self.weights.take(name, (self.config.heads,)).float()

    def qkv(self, prefix: str) -> Linear:
        """(tokens, hidden) -> (tokens, (heads + 2 * kv_heads) * head_dim)."""
        config = self.config
        counts = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        return self.linear(
            {f"{prefix}.{name}": count * config.head_dim for name, count in counts.items()},
            config.hidden_size,
            config.qkv_bias,
        )

    def mlp(self, layer: int, norm: RMSNorm, post_norm: RMSNorm | None = None) -> MLP:
        """Likewise."""
        size, prefix = self.config.intermediate_size, f"model.layers.{layer}.mlp"
        return GatedMLP(
            norm, self.gate_up(prefix, size), self.down(prefix, size), self.activation, post_norm
        )

    def gate_up(self, prefix: str, size: int) -> Linear:
        """(tokens, hidden) -> (tokens, 2 * size), the gate first."""
        outputs = {f"{prefix}.{name}_proj": size for name in ("gate", "up")}
        return self.linear(outputs, self.config.hidden_size, self.config.mlp_bias)

    def down(self, prefix: str, size: int) -> Linear:
        """(tokens, size) -> (tokens, hidden)."""
        outputs = {f"{prefix}.down_proj": self.config.hidden_size}
        return self.linear(outputs, size, self.config.mlp_bias)

    def norm(self, name: str) -> RMSNorm:
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return self.norm_type(weight, self.config.norm_eps)

    def linear(self, outputs: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One projection out of those named, their outputs one after another."""
        biases = [self.weights.take(f"{name}.bias", (n,)) for name, n in outputs.items() if bias]
        joined_bias = _join(biases) if bias else None
        if self.config.fp8 and self.weights.keeps_fp8(outputs, inputs):
            codes, scales = zip(
                *(
                    self.weights.take_fp8(f"{name}.weight", (n, inputs))
                    for name, n in outputs.items()
                ),
                strict=True,
            )
            blocks = self.config.fp8.blocks
            return Fp8Linear(_join(list(codes)), _join(list(scales)), blocks, joined_bias)
        joined = self.weight(outputs, inputs)
        added = self._adapters.take(outputs, inputs, joined) if self._adapters else None
        if added is None:
            return Linear(joined, joined_bias)
        return AdaptedLinear(joined, joined_bias, added.a, added.b)

    def weight(self, outputs: dict[str, int], inputs: int) -> torch.Tensor:
        """Of those named, one after another, in the dtype of the weights: (out, in)."""
        return _join(
            [self.weights.take(f"{name}.weight", (n, inputs)) for name, n in outputs.items()]
        )

    def _head_norm(self, name: str) -> torch.Tensor | None:
        if not self.qk_norm:
            return None
        return self.weights.take(f"{name}.weight", (self.config.head_dim,))


def _cos_sin(rope: Rope, max_position: int, device: torch.device) -> torch.Tensor:
    """Of each position's angles, as ``Heads`` holds them."""
    positions = torch.arange(max_position, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope.inverse_frequencies.to(device))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.scaling


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
