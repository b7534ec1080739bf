"""What a model of transformers asks of attention, collected in a forward pass that computes none.

transformers shows a sliding window to an attention function in an argument, in the mask, or in
both; eager attention follows the mask. While a model is probed its masks therefore hold a number
each, which says by what rule they were to be made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch

NAME: Final = "chunkllama"
PROBE_NAME: Final = "chunkllama_probe"
# Attention sinks and learned biases.
_REFUSED: Final = ("s_aux", "position_bias")
_NO_WINDOW: Final = 6  # up to which length a causal mask is compared

# What attends in the forward pass in progress.
ACTIVE: ContextVar[Any] = ContextVar("chunkllama_attention")


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer asks of attention.

    Attributes:
        window: keys that a query sees, itself included; None: all before it.
        others: names of what this server's attention does not have.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    softcap: float | None
    others: tuple[str, ...]


class Probe:
    """Collects the calls of a forward pass; attention itself yields zeros.

    Attributes:
        calls: of each layer.
    """

    def __init__(self) -> None:
        self.calls: dict[int, list[Call]] = {}
        self._windows: list[int | None] = []  # of the masks made; 0: of another rule

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Record q, k, v [1, heads, T, D] and the options; return zeros [1, T, Hq, D]."""
        others = [name for name in _REFUSED if options.get(name) is not None]
        window, mask = options.get("sliding_window"), options["attention_mask"]
        if mask is not None:
            window = self._window_of(mask)
            others += ["attention_mask"] if window == 0 else []
        call = Call(
            *(query.shape[1], key.shape[1], key.shape[3], value.shape[3]),
            *(window, options.get("softcap"), tuple(others)),
        )
        self.calls.setdefault(layer, []).append(call)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def mask(self, window: int | None, shape: tuple[int, int], device: Any) -> torch.Tensor:
        """A mask [1, 1, queries, keys] float32 that stands for a rule."""
        self._windows.append(window)
        return torch.full((1, 1, *shape), float(len(self._windows)), device=device)

    def _window_of(self, mask: Any) -> int | None:
        """The window of a mask that ``mask`` has made; 0: of one that it has not."""
        if not isinstance(mask, torch.Tensor) or mask.dtype == torch.bool:
            return 0
        low, high = float(mask.min()), float(mask.max())
        if low != high or low not in range(1, len(self._windows) + 1):
            return 0
        return self._windows[int(low) - 1]


def register() -> None:
    """Make ``NAME`` and ``PROBE_NAME`` known to transformers; masks are made for the latter."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name in (NAME, PROBE_NAME):
        AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(PROBE_NAME, _mask)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls: q, k, v [1, heads, T, D] -> [1, T, Hq, D]."""
    options["attention_mask"] = attention_mask
    return ACTIVE.get().attend(module.layer_idx, query, key, value, options), None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: Any = None,
    **_: Any,
) -> torch.Tensor:
    """What transformers calls for a mask; ``local_size`` is a window, or another length."""
    window = _window_shown(mask_function, local_size)
    mask: torch.Tensor = ACTIVE.get().mask(window, (q_length, kv_length), device)
    return mask


def _window_shown(mask_function: Callable[..., Any], size: int | None) -> int | None:
    """The window of a mask, by positions of (batch, head, query, key); None: it is causal and hides
    nothing more; 0: it is neither.
    """
    length = size or _NO_WINDOW
    zero = torch.zeros((), dtype=torch.long)
    for query in (length - 1, length, 2 * length + 1):
        keys = torch.arange(query + 2)
        expected = keys <= query
        if size:
            expected &= keys > query - size
        try:
            shown = mask_function(zero, zero, torch.tensor(query), keys)
            is_as_expected = torch.equal(shown.expand(keys.shape), expected)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return 0  # a rule that looks up the tokens
        if not is_as_expected:
            return 0
    return size or None
