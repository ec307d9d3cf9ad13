"""The decoder that most families are: pre-norm, rotary, grouped-query attention, gated MLP."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from fi_runtime.attention.base import Attention
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.mlp import GatedMLP
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.rotary import Rotary
from fi_runtime.layers.self_attention import SelfAttention
from fi_runtime.models.config import ModelConfig
from fi_runtime.models.weights import Weights


@dataclass(frozen=True)
class Block:
    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
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
        self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Hidden states, (tokens, hidden), of ``tokens``, int64, at ``positions``, int32."""
        residual = functional.embedding(tokens, self.embedding)
        x = self.blocks[0].attention_norm(residual)
        for index, block in enumerate(self.blocks):
            if index:
                x, residual = block.attention_norm.add(x, residual)
            x = block.attention(x, positions, attention)
            x, residual = block.mlp_norm.add(x, residual)
            x = block.mlp(x)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), float32."""
        return self.head(hidden).float()


class DecoderBuilder:
    """Takes a decoder's tensors under the names that Llama's checkpoints gave them."""

    def __init__(self, config: ModelConfig, weights: Weights, max_position: int) -> None:
        self.config = config
        self.weights = weights
        hidden = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._embedding = hidden
        self._rotary = Rotary(
            config.inverse_frequencies.to(hidden.device), config.rope_scaling, max_position
        )

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
            attention_norm=self._norm(f"{prefix}.input_layernorm", config.hidden_size),
            attention=SelfAttention(
                layer,
                config.heads,
                config.kv_heads,
                config.head_dim,
                qkv=self._linear(
                    {f"{attention}.{name}": size for name, size in qkv.items()},
                    config.hidden_size,
                    config.attention_bias,
                ),
                out=self._linear(
                    {f"{attention}.o_proj": config.hidden_size}, q_size, config.attention_bias
                ),
                rotary=self._rotary,
                q_norm=self._norm(f"{attention}.q_norm", config.head_dim) if qk_norm else None,
                k_norm=self._norm(f"{attention}.k_norm", config.head_dim) if qk_norm else None,
            ),
            mlp_norm=self._norm(f"{prefix}.post_attention_layernorm", config.hidden_size),
            mlp=GatedMLP(
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

    def _norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.weights.take(f"{name}.weight", (size,)), self.config.norm_eps)

    def _linear(self, outputs: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One projection out of those named, their outputs one after another."""
        weight = [self.weights.take(f"{name}.weight", (n, inputs)) for name, n in outputs.items()]
        biases = [self.weights.take(f"{name}.bias", (n,)) for name, n in outputs.items() if bias]
        return Linear(_join(weight), _join(biases) if bias else None)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
