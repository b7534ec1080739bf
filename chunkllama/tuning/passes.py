"""Forward and backward over whole sequences, as a series of short pieces of work.

After the token-level fine-tuning of FlexLLM (arXiv 2402.18789): a layer is computed for a slice of
tokens at a time, forward in their order and backward in the reverse one. The residual stream before
each layer is kept; what lies between is computed again on the way back. Gradients of a slice's
queries reach the keys and values of all tokens before it, and are added up there until the last
slice is done; then they go on through the layer's input. So the gradients are those of the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from chunkllama.tuning.folder import Example
from chunkllama.tuning.model import TunedLayer, TunedModel

# What the next piece is; a driver may wait before it asks for it.
Piece = Literal["layer", "keys", "forward", "head", "backward", "update", "save", "wait"]
Work = Generator[Piece, None, "Sums"]


@dataclass(slots=True)
class Sums:
    """Over the trained tokens of examples.

    Attributes:
        loss: of the negative log-probabilities.
        num_correct: how often the most probable token was the right one.
    """

    loss: float = 0.0
    num_correct: int = 0
    num_tokens: int = 0

    def add(self, other: Sums) -> None:
        self.loss += other.loss
        self.num_correct += other.num_correct
        self.num_tokens += other.num_tokens


def accumulate(
    model: TunedModel, examples: Sequence[Example], weight: float, slice_tokens: int
) -> Work:
    """Add the gradients of a weighted sum of losses to those of the adapter.

    Args:
        weight: of each trained token.
        slice_tokens: of a piece; the head's pieces have as many rows as cost about the same.

    Yields:
        What the next piece is; none of them takes longer than a layer of ``slice_tokens`` tokens,
        forward and backward.
    """
    device = model.device
    streams = [
        model.embed(torch.tensor(each.token_ids[: each.num_inputs], device=device))
        for each in examples
    ]
    kept: list[list[torch.Tensor]] = []
    for index in range(model.spec.num_layers):
        yield "layer"
        layer = model.layer(index)
        kept.append(streams)
        streams = []
        for stream in kept[-1]:
            streams.append((yield from _forward(layer, stream, slice_tokens)))
        del layer  # before the next one is widened: the memory has room for one
    sums = Sums()
    grads = [torch.zeros_like(stream) for stream in streams]
    for example, stream, grad in zip(examples, streams, grads, strict=True):
        for part in _cut(example.targets, model.head_rows(slice_tokens)):
            yield "head"
            sums.add(_head(model, example, part, stream, grad, weight))
    for index in reversed(range(model.spec.num_layers)):
        yield "layer"
        layer = model.layer(index)
        for number, stream in enumerate(kept.pop()):
            grads[number] = yield from _backward(layer, stream, grads[number], slice_tokens)
        del layer
    return sums


def _cut(items: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _slices(num_tokens: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


@torch.no_grad()
def _keys(
    layer: TunedLayer, stream: torch.Tensor, begin: int, end: int
) -> tuple[torch.Tensor, ...]:
    return layer.keys_values(stream[begin:end], begin)


@torch.no_grad()
def _joined(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


@torch.no_grad()
def _output(
    layer: TunedLayer,
    stream: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: int,
    end: int,
) -> torch.Tensor:
    return layer.output(stream[begin:end], keys[:end], values[:end], begin)


def _all_keys(
    layer: TunedLayer, stream: torch.Tensor, slice_tokens: int
) -> Generator[Piece, None, tuple[torch.Tensor, torch.Tensor]]:
    parts = []
    for begin, end in _slices(len(stream), slice_tokens):
        yield "keys"
        parts.append(_keys(layer, stream, begin, end))
    return _joined(parts)


def _forward(
    layer: TunedLayer, stream: torch.Tensor, slice_tokens: int
) -> Generator[Piece, None, torch.Tensor]:
    """The residual stream [N, H] behind a layer."""
    keys, values = yield from _all_keys(layer, stream, slice_tokens)
    parts = []
    for begin, end in _slices(len(stream), slice_tokens):
        yield "forward"
        parts.append(_output(layer, stream, keys, values, begin, end))
    return torch.cat(parts)


def _head(
    model: TunedModel,
    example: Example,
    targets: list[int],
    stream: torch.Tensor,
    grad: torch.Tensor,
    weight: float,
) -> Sums:
    """Write the gradients of some rows of the residual stream behind the last layer to ``grad``."""
    rows = torch.tensor(targets, device=stream.device) - 1
    wanted = torch.tensor([example.token_ids[target] for target in targets], device=stream.device)
    x = stream[rows].requires_grad_()
    logits = model.logits(x)
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    (grad[rows],) = torch.autograd.grad(weight * loss, x)
    num_correct = int((logits.detach().argmax(dim=1) == wanted).sum())
    return Sums(float(loss.detach()), num_correct, len(targets))


def _backward(
    layer: TunedLayer, stream: torch.Tensor, grad: torch.Tensor, slice_tokens: int
) -> Generator[Piece, None, torch.Tensor]:
    """The gradient [N, H] of the residual stream before a layer, given that behind it."""
    keys, values = yield from _all_keys(layer, stream, slice_tokens)
    keys.requires_grad_()
    values.requires_grad_()
    before = torch.empty_like(stream)
    for begin, end in reversed(_slices(len(stream), slice_tokens)):
        yield "backward"
        x = stream[begin:end].detach().requires_grad_()
        output = layer.output(x, keys[:end], values[:end], begin)
        torch.autograd.backward(output, grad[begin:end])
        assert x.grad is not None
        before[begin:end] = x.grad
    assert keys.grad is not None and values.grad is not None
    for begin, end in _slices(len(stream), slice_tokens):
        yield "backward"
        x = stream[begin:end].detach().requires_grad_()
        outputs = layer.keys_values(x, begin)
        torch.autograd.backward(outputs, (keys.grad[begin:end], values.grad[begin:end]))
        assert x.grad is not None
        before[begin:end] += x.grad
    return before
