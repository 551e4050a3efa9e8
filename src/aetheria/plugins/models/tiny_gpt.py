"""A small decoder-only language model on bytes, in the shape of today's large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from aetheria.core import AetherModel, OptimizerPlan, Schedule
from aetheria.errors import ConfigError, ModelError
from aetheria.plugins.optimizers import warmup_cosine
from aetheria.registry import Registry

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["TinyGPT"]


class RotaryPositions(nn.Module):
    """Turns each pair of features by an angle that grows with the position, so that attention sees distances.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (https://arxiv.org/abs/2104.09864).
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_width: int, block_size: int) -> None:
        super().__init__()
        frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(block_size), frequencies)  # [time, head_width / 2]
        # Not part of the weights: they follow from the constructor's arguments.
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Returns queries or keys of shape [batch, heads, time, head_width], turned; shape and dtype stay."""
        time = vectors.shape[-2]
        cosine, sine = self.cosine[:time].to(vectors.dtype), self.sine[:time].to(vectors.dtype)
        first, second = vectors.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Block(nn.Module):
    """Causal self-attention, then a feed-forward network, each on normalised input and added to its input."""

    def __init__(self, width: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(width)
        # Head by head: query, key and value of the first, then those of the next. So any range of rows that holds whole
        # heads can be computed by itself.
        self.attention_input = nn.Linear(width, 3 * width, bias=False)
        self.rotate = RotaryPositions(self.head_width, block_size)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.ReLU(),
            nn.Linear(4 * width, width, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states after this block; shape [batch, time, width] stays."""
        hidden = hidden + self.attend(self.attention_norm(hidden))
        after: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return after

    def attend(self, hidden: Tensor) -> Tensor:
        """Returns what each position gathers from itself and the positions before it."""
        batch, time, _ = hidden.shape
        # [batch, heads, time, 3, head_width]; where ranks share a layer, the heads of this one.
        projected = self.attention_input(hidden).view(batch, time, -1, 3, self.head_width).transpose(1, 2)
        query, key, value = projected.unbind(3)
        gathered = functional.scaled_dot_product_attention(
            self.rotate(query),
            self.rotate(key),
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        output: Tensor = self.attention_output(gathered.transpose(1, 2).flatten(2))
        return output


@Registry.register_model("TinyGPT")
class TinyGPT(AetherModel):
    """Predicts the next byte of a text.

    A pre-norm transformer with rotary positions, RMSNorm and no biases. The embedding serves as the output head too
    (Press and Wolf, "Using the Output Embedding to Improve Language Models", https://arxiv.org/abs/1608.05859). The
    loss is a mean over tokens, so the step says how many there were: a window of unequal micro-batches then has the
    gradient of the one big batch.

    Args:
        block_size: the longest context, in bytes.
        layers: transformer blocks.
        heads: attention heads; they share `width` evenly.
        width: features of a hidden state.
        dropout: probability of dropping an attention weight or a feed-forward output.
        learning_rate: peak step size of AdamW.
        weight_decay: decoupled weight decay, applied to matrices only.
        schedule_steps: optimiser steps until the learning rate, after a warm-up of a tenth of them, has fallen to a
            tenth of its peak along a cosine; None keeps it constant.

    Raises:
        ConfigError: `width` cannot be shared among the heads in pairs of features.
    """

    weight_unit = "tokens"

    def __init__(
        self,
        block_size: int = 128,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        schedule_steps: int | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ConfigError(
                f"TinyGPT got width={width} and heads={heads}; rotary positions need an even number of features in "
                f"each head. Make width a multiple of {2 * heads}."
            )
        self.block_size = block_size
        self.weight_per_sample = block_size
        self.heads = heads
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule_steps = schedule_steps
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, heads, block_size, dropout) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        # As an output head the embedding must start small: the first loss is then log(256), that of a uniform guess.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the next byte at every position.

        Args:
            tokens: bytes as int64, [batch, time] with time at most `block_size`.

        Returns:
            Logits of shape [batch, time, 256].

        Raises:
            ModelError: there are more tokens than `block_size`.
        """
        if tokens.shape[1] > self.block_size:
            raise ModelError(
                f"TinyGPT got {tokens.shape[1]} tokens in a row and has positions for block_size={self.block_size}. "
                "Give the data the same block_size as the model."
            )
        hidden = self.norm(self.blocks(self.embedding(tokens)))
        return functional.linear(hidden, self.embedding.weight)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns the mean cross-entropy, in nats per byte, of (tokens, next tokens), each [batch, time]."""
        tokens, targets = batch
        loss = functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
        return {"loss": loss, "weight": torch.full((), float(targets.numel()), device=loss.device)}

    def predict_step(self, batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Returns the logits of the byte that follows each row of tokens, [batch, 256]."""
        logits: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return logits[:, -1]

    def configure_optimizers(self) -> OptimizerPlan:
        """Returns AdamW; with `schedule_steps`, also a warm-up and cosine that are stepped every optimiser step."""
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"name": "matrices", "params": matrices, "weight_decay": self.weight_decay},
                {"name": "vectors", "params": vectors, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        if self.schedule_steps is None:
            return OptimizerPlan(optimizer)
        cosine = warmup_cosine(
            optimizer, self.schedule_steps, warmup_steps=self.schedule_steps // 10, minimum_factor=0.1
        )
        return OptimizerPlan(optimizer, [Schedule(cosine, interval="step")])

    def tensor_plan(self, ranks: int) -> dict[str, ParallelStyle]:
        """Returns how ranks compute a layer together: each some of the heads, and some of the hidden units.

        Norms and the embedding, which is the output head too, are whole on each of them. Shoeybi et al., "Megatron-LM"
        (https://arxiv.org/abs/1909.08053).

        Args:
            ranks: that compute together.

        Raises:
            ConfigError: they cannot share the heads evenly.
        """
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel  # noqa: PLC0415 - a second

        if self.heads % ranks:
            raise ConfigError(
                f"TinyGPT has {self.heads} heads, which {ranks} ranks cannot share: a head is computed by one of them. "
                f"Make heads a multiple of {ranks}, or tensor_parallel a divisor of {self.heads}."
            )
        return {
            "blocks.*.attention_input": ColwiseParallel(),
            "blocks.*.attention_output": RowwiseParallel(),
            "blocks.*.feed_forward.0": ColwiseParallel(),
            "blocks.*.feed_forward.2": RowwiseParallel(),
        }

    @torch.inference_mode()
    def generate(
        self,
        prompt: bytes,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        generator: torch.Generator | None = None,
    ) -> bytes:
        """Returns the prompt and what the model writes after it.

        The model should be in eval mode. The whole context is run again for every byte: simple, and fast enough for
        a model of this size.

        Args:
            prompt: at least one byte; only the last `block_size` are seen.
            max_new_tokens: bytes to write.
            temperature: divides the logits; 0 always takes the likeliest byte.
            generator: the source of randomness, on the model's device; None takes the global one.

        Raises:
            ValueError: the prompt is empty, or the temperature negative.
        """
        if not prompt or temperature < 0:
            raise ValueError(
                f"generate() got a prompt of {len(prompt)} bytes and temperature {temperature}; "
                "it needs at least one byte and a temperature of 0 or more."
            )
        device = self.embedding.weight.device
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.block_size :])[:, -1]
            if temperature == 0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, following), dim=1)
        return bytes(tokens[0].tolist())
