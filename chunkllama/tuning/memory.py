"""The memory that a training takes, before any of it is allocated. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.tensors import LinearTensors, layer_tensors

_WORD = 4  # bytes of a float32
# Copies of the adapter: itself, its gradient, two moments of AdamW, and three that a thread
# writes to the disk.
_ADAPTER_COPIES = 7
# Rows of a layer that autograd keeps, in sizes of the widest ones.
_KEPT_ROWS = 6


@dataclass(frozen=True, slots=True)
class TuningSize:
    """What a training takes.

    Attributes:
        fixed_bytes: that do not depend on the length of the examples.
        token_bytes: of each token that is computed at once.
    """

    fixed_bytes: int
    token_bytes: int

    def max_tokens(self, max_bytes: int, longest: int) -> int:
        """Tokens that may be computed at once.

        Args:
            max_bytes: that the training may take.
            longest: tokens of the longest example.

        Raises:
            ConfigError: the longest example does not fit.
        """
        if self._fitting(max_bytes) < longest:
            raise ConfigError(
                f"finetune_memory: an example of {longest} tokens takes {self._needed(longest)}, "
                f"of which {_mib(self.fixed_bytes)} are weights, adapter and workspace; it is "
                f"{_mib(max_bytes)}: raise it, or train shorter examples or a lower rank"
            )
        return self._fitting(max_bytes)

    def free_tokens(self, free_bytes: int, longest: int) -> int:
        """The same for the memory that is free on the machine now.

        Raises:
            ConfigError: the longest example does not fit.
        """
        if self._fitting(free_bytes) < longest:
            raise ConfigError(
                f"finetune_memory: an example of {longest} tokens takes {self._needed(longest)}, "
                f"and {_mib(free_bytes)} are free now; end other programs or lower kv_cache_memory"
            )
        return self._fitting(free_bytes)

    def _fitting(self, num_bytes: int) -> int:
        return (num_bytes - self.fixed_bytes) // self.token_bytes

    def _needed(self, longest: int) -> str:
        return _mib(self.fixed_bytes + longest * self.token_bytes)


def tuning_size(
    spec: ModelSpec, weight_bytes: int, rank: int, longest: int, slice_tokens: int
) -> TuningSize:
    """Return what a training of an adapter of all linear layers takes.

    Args:
        weight_bytes: of the weights as they are loaded for it.
        longest: tokens of the longest example.
        slice_tokens: of a piece of work.
    """
    adapter = layer = widest = 0
    for index in range(spec.num_layers):
        tensors = layer_tensors(spec, index)
        sources = (getattr(tensors, item.name) for item in fields(tensors))
        linears = [source for source in sources if isinstance(source, LinearTensors)]
        shapes = [(rows, each.columns) for each in linears for _, rows in each.parts]
        adapter += rank * sum(rows + columns for rows, columns in shapes)
        layer = max(layer, sum(rows * columns for rows, columns in shapes))
        widest = max(widest, max(sum(rows for _, rows in each.parts) for each in linears))
    head = spec.vocab_size * spec.hidden_size
    scores = 4 * spec.num_qo_heads * longest
    logits = 3 * spec.vocab_size
    workspace = slice_tokens * (_KEPT_ROWS * widest + scores + logits)
    fixed = weight_bytes + _WORD * (head + layer + _ADAPTER_COPIES * adapter + workspace)
    # The stream before each layer, two gradients and a layer's output; keys and values, gradients.
    row = (spec.num_layers + 4) * spec.hidden_size + 4 * spec.num_kv_heads * spec.head_dim
    return TuningSize(fixed, _WORD * row)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
