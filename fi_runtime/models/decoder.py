"""The decoder that most families are: pre-norm, rotary, grouped-query attention, gated MLP."""

from dataclasses import dataclass

import torch

from fi_runtime.attention.base import Attention
from fi_runtime.kernels.embedding import embed
from fi_runtime.kernels.heads import Heads
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.mlp import GatedMLP
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.residual import ResidualStream
from fi_runtime.layers.self_attention import SelfAttention
from fi_runtime.models.config import ModelConfig
from fi_runtime.models.weights import Weights


@dataclass(frozen=True)
class Block:
    attention: SelfAttention
    mlp: GatedMLP


@dataclass(frozen=True)
class Decoder:
    """Tokens in, hidden states out; logits only of the rows that need them."""

    config: ModelConfig
    embedding: torch.Tensor
    """(vocab, hidden)"""
    blocks: list[Block]
    norm: RMSNorm
    head: Linear

    def __call__(
        self, tokens: torch.Tensor, last_tokens: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Hidden states: (tokens, hidden).

        Args:
            tokens: (tokens,) int64, those that ``attention`` is planned for, as ``embed`` takes
                them.
            last_tokens: (slots,), int64.
        """
        residual = ResidualStream(embed(tokens, last_tokens, self.embedding))
        for block in self.blocks:
            block.attention(residual, attention)
            block.mlp(residual)
        return residual.total

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), in the dtype of the weights; to ``out`` if given."""
        return ResidualStream(hidden).project(self.norm, self.head, out)


class DecoderBuilder:
    """Takes a decoder's tensors under the names that Llama's checkpoints gave them."""

    def __init__(self, config: ModelConfig, weights: Weights, max_position: int) -> None:
        self.config = config
        self.weights = weights
        hidden = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._embedding = hidden
        # of each position's angles, as Heads holds them
        positions = torch.arange(max_position, dtype=torch.float32, device=hidden.device)
        angles = torch.outer(positions, config.inverse_frequencies.to(hidden.device))
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1) * config.rope_scaling

    def build(self, qk_norm: bool) -> Decoder:
        """``qk_norm``: whether each head's queries and keys are normalised before they turn."""
        config = self.config
        if config.tied_embeddings:
            head = self._embedding
        else:
            head = self.weights.take("lm_head.weight", (config.vocab_size, config.hidden_size))
        return Decoder(
            config=config,
            embedding=self._embedding,
            blocks=[self._block(layer, qk_norm) for layer in range(config.layers)],
            norm=self._norm("model.norm", config.hidden_size),
            head=Linear(head),
        )

    def _block(self, layer: int, qk_norm: bool) -> Block:
        config, prefix = self.config, f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        return Block(
            attention=SelfAttention(
                layer,
                self._norm(f"{prefix}.input_layernorm", config.hidden_size),
                qkv=self._linear(
                    {f"{attention}.{name}": size for name, size in qkv.items()},
                    config.hidden_size,
                    config.attention_bias,
                ),
                heads=Heads(
                    config.heads,
                    config.kv_heads,
                    config.head_dim,
                    self._cos_sin,
                    q_norm=self._head_norm(f"{attention}.q_norm") if qk_norm else None,
                    k_norm=self._head_norm(f"{attention}.k_norm") if qk_norm else None,
                    eps=config.norm_eps,
                ),
                out=self._linear(
                    {f"{attention}.o_proj": config.hidden_size}, q_size, config.attention_bias
                ),
            ),
            mlp=GatedMLP(
                self._norm(f"{prefix}.post_attention_layernorm", config.hidden_size),
                gate_up=self._linear(
                    {f"{mlp}.{name}_proj": config.intermediate_size for name in ("gate", "up")},
                    config.hidden_size,
                    config.mlp_bias,
                ),
                down=self._linear(
                    {f"{mlp}.down_proj": config.hidden_size},
                    config.intermediate_size,
                    config.mlp_bias,
                ),
            ),
        )

    def _head_norm(self, name: str) -> torch.Tensor:
        return self.weights.take(f"{name}.weight", (self.config.head_dim,))

    def _norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.weights.take(f"{name}.weight", (size,)), self.config.norm_eps)

    def _linear(self, outputs: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One projection out of those named, their outputs one after another."""
        weight = [self.weights.take(f"{name}.weight", (n, inputs)) for name, n in outputs.items()]
        biases = [self.weights.take(f"{name}.bias", (n,)) for name, n in outputs.items() if bias]
        return Linear(_join(weight), _join(biases) if bias else None)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
