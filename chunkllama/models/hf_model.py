"""Any decoder that transformers builds, on this project's chunks and attention.

transformers computes everything but attention: its ``AttentionInterface`` calls ``attend``, which
appends the keys and values that it gets to the pool and attends over the plan's chunks. The rows of
a step are one batch of one, told apart by their positions alone. Slower than a native model, as
every layer is eager torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from chunkllama.backends.adapter import AdapterRows, AdapterWeights, PreparedAdapter
from chunkllama.backends.base import DevicePlan
from chunkllama.errors import ConfigError
from chunkllama.model_spec import LayerSpec, ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.hf_probe import ACTIVE, NAME, PROBE_NAME, Probe, register
from chunkllama.models.loading.safetensors import HARMLESS

_STATELESS_LAYERS: Final = {"full_attention", "sliding_attention"}
_OWN_ATTENTION: Final = "it computes attention in code of its own (no AttentionInterface)"
# What transformers and torch raise for values that do not fit each other.
_OF_THE_MODEL: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
_PROBE: Final = 6
# Of the largest logit, between the first answer through the pool and transformers' own attention.
_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class _Slice:
    """A ``PlannedSlice`` of the first answer, which lies in chunk 0."""

    first_position: int
    num_tokens: int
    chunk_ids: NDArray[np.int32]
    slot: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """A ``PlannedStep``."""

    slices: tuple[_Slice, ...]
    plan_version: int = 0


class _Output:
    """What a decoder returns of hidden states [1, N, H]; all else that a head may pass on is None.

    Args:
        hidden: the states.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenHidden(torch.nn.Module):
    """Stands for the decoder where only the head is to be computed."""

    @property
    def decoder(self) -> _GivenHidden:
        """Itself: OPT's decoder lies one module deeper."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(kwargs["inputs_embeds"])


class TransformersModel:
    """Implement ``RunnableModel``; ``attach`` gives it the pool.

    Attributes:
        spec: the given one, with the heads, windows and soft cap that the layers ask for.

    Args:
        folder: with safetensors weights.
        spec: as ``read_spec`` returns it.
        dtype: of weights and K/V.
        device: where to compute.

    Raises:
        ConfigError: transformers does not know the model, or it keeps a state that is not keys and
            values of each token and layer.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._path = folder
        self._dtype = dtype
        self._causal = _load(folder, spec.architecture, dtype).to(device)
        prefix = self._causal.base_model_prefix
        self._base: Any = getattr(self._causal, prefix, None)
        if self._base is None:  # Llama 4
            raise self._unsupported(f"it has no decoder of the name {prefix}")
        setattr(self._causal, prefix, _GivenHidden())
        self._device = device
        self.spec = self._probed(spec)

    def attach(self, attention: Attention, max_model_len: int) -> None:
        """Take the pool and the plans, and compare a first answer with transformers' attention.

        Raises:
            ConfigError: the answers differ.
        """
        self._attention = attention
        half = torch.ones(max_model_len, self.spec.head_dim // 2)
        # cos 1, sin 0: transformers has rotated q and k.
        self._still = torch.cat((half, torch.zeros_like(half)), dim=1).to(self._device)
        self._check()

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: DevicePlan,
        adapters: Sequence[AdapterRows] = (),
    ) -> torch.Tensor:
        """[T] ids and positions -> normalised hidden states [T, H]."""
        assert not adapters, "an adapter of a model that takes none"
        self._positions, self._plan = positions, plan
        return self._hidden(token_ids, positions, self)

    def prepare_adapter(self, weights: AdapterWeights) -> tuple[PreparedAdapter, int]:
        """Refuse it: adapters belong to linear layers of architectures of this server."""
        raise AssertionError("read_adapter refuses adapters of other architectures")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, vocab_size] float32, with all that the model does to its logits."""
        output = self._causal(inputs_embeds=hidden[None].to(self._dtype), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits[:, : self.spec.vocab_size].float().contiguous()

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, tokens = self.logits(hidden).max(dim=1)
        return values, tokens

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Append k and v to the pool, attend over the plan's chunks."""
        rows, backend = query.shape[2], self._attention.backend
        # Zeros in keys change no score, and in values they are cut off again.
        parts = [
            pad(x[0].transpose(0, 1), (0, self.spec.head_dim - x.shape[3])).reshape(rows, -1)
            for x in (query, key, value)
        ]
        plan = self._plan.for_window(self._attention.windows[layer])
        kv, positions = self._attention.kv, self._positions
        q = backend.rope_append(torch.cat(parts, dim=1), positions, self._still, kv, layer, plan)
        scale = options.get("scaling")
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        softcap = options.get("softcap")
        out = backend.tpp_attention(q, kv, layer, positions, plan, scale, softcap)
        return out.to(query.dtype).view(1, rows, query.shape[1], -1)[..., : value.shape[3]]

    def _hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, to: Any) -> torch.Tensor:
        token = ACTIVE.set(to)
        try:
            output = self._base(
                input_ids=token_ids.long()[None],
                position_ids=positions.long()[None],
                use_cache=False,
            )
        finally:
            ACTIVE.reset(token)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _probed(self, spec: ModelSpec) -> ModelSpec:
        probe = Probe()
        ids = torch.zeros(2, dtype=torch.long, device=self._device)
        with self._named_errors(probe):
            self._base.set_attn_implementation(PROBE_NAME)
            self._hidden(ids, torch.arange(2, device=self._device), probe)
            self._base.set_attn_implementation(NAME)
        if not probe.calls:
            raise self._unsupported(_OWN_ATTENTION)
        calls = [probe.calls.get(layer, []) for layer in range(spec.num_layers)]
        if any(len(layer) != 1 for layer in calls) or len(probe.calls) != spec.num_layers:
            raise self._unsupported("a layer has no attention of its own, or more than one")
        flat = [layer[0] for layer in calls]
        shapes = {(x.num_qo_heads, x.num_kv_heads, x.head_dim, x.value_dim) for x in flat}
        kinds = set(getattr(self._base.config, "layer_types", None) or ())
        if len(shapes) != 1:
            raise self._unsupported("its layers differ in their heads")
        if others := sorted({name for x in flat for name in x.others}):
            raise self._unsupported(f"attention with {', '.join(others)}")
        if not kinds <= _STATELESS_LAYERS:
            raise self._unsupported(f"layers of the types {', '.join(sorted(kinds))}")
        if "sliding_attention" in kinds and all(x.window is None for x in flat):
            raise self._unsupported("sliding windows that only its mask shows")
        softcaps = {x.softcap for x in flat}
        if len(softcaps) != 1:
            raise self._unsupported("layers differ in their soft cap")
        return replace(
            spec,
            num_qo_heads=flat[0].num_qo_heads,
            num_kv_heads=flat[0].num_kv_heads,
            head_dim=max(flat[0].head_dim, flat[0].value_dim),
            layers=tuple(LayerSpec(rope=None, window=x.window) for x in flat),
            attention_softcap=softcaps.pop(),
        )

    @contextlib.contextmanager
    def _named_errors(self, probe: Probe | None = None) -> Iterator[None]:
        """Turn what transformers raises for a model that it, or this server, cannot run into a
        ``ConfigError``; without a call of ``probe`` it need not have come to attention.
        """
        try:
            yield
        except _OF_THE_MODEL as error:
            _raise_if_of_the_machine(error)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if probe is not None and not probe.calls:
                reason = f"{_OWN_ATTENTION}, or fails before: {reason}"
            raise self._unsupported(reason) from None

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare an answer in two slices with transformers' attention over the whole: state that a
        layer keeps beside K and V would show.
        """
        with self._named_errors():
            distance = self._first_distance()
        if not distance <= _TOLERANCE[self._dtype]:
            raise self._unsupported(
                f"its answer over cached keys and values is {distance:.2g} (of the largest logit) "
                "away from transformers' own attention"
            )

    def _first_distance(self) -> float:
        ids = torch.arange(1, _PROBE + 1, device=self._device) % self.spec.vocab_size
        positions = torch.arange(_PROBE, dtype=torch.int32, device=self._device)
        rows = []
        for begin, end in ((0, _PROBE // 2), (_PROBE // 2, _PROBE)):
            part = slice(begin, end)
            piece = _Slice(begin, end - begin, np.zeros(1, np.int32))
            plan = self._attention.plan(_Step((piece,)))
            rows.append(self.logits(self.forward(ids[part], positions[part], plan)))
        self._base.set_attn_implementation("eager")
        expected = self.logits(
            self._base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        )
        self._base.set_attn_implementation(NAME)
        distance = (torch.cat(rows) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        return float(distance)

    def _unsupported(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: {self.spec_name} cannot run on this server's attention: {why}"
        )

    @property
    def spec_name(self) -> str:
        """The model's class."""
        return type(self._causal).__name__


# torch raises a plain RuntimeError for these, as for sizes that do not match.
_MACHINE_ERRORS: Final = re.compile(r"\b(CUDA|HIP|NCCL)\b|cuBLAS|cuDNN", re.IGNORECASE)
_NO_MEMORY: Final = re.compile(r"(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)


def _raise_if_of_the_machine(error: Exception) -> None:
    """Raise again what is no fault of the model: memory that is used up, a device that fails.

    Raises:
        MemoryError: the system has no memory for a tensor.
        RuntimeError: ``error``, which a device has raised.
    """
    if not isinstance(error, RuntimeError):
        return
    if _NO_MEMORY.search(str(error)):
        raise MemoryError(str(error)) from error
    is_typed = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if is_typed or _MACHINE_ERRORS.search(str(error)):
        raise error


def _load(folder: Path, architecture: str, dtype: torch.dtype) -> Any:
    import transformers

    register()
    library: Any = transformers
    library.logging.set_verbosity_error()
    try:
        model, loading = library.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (*_OF_THE_MODEL, ImportError, OSError) as error:
        _raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError) and error.args == (NAME,):  # a table of its own
            reason = _OWN_ATTENTION
        if "trust_remote_code" in reason:
            reason = "its code is in files of the model, which are not executed"
        raise ConfigError(
            f"{folder}: transformers cannot load {architecture}: {reason[:200]}"
        ) from None
    if missing := sorted(loading["missing_keys"]):  # transformers would make them up
        raise ConfigError(
            f"{folder}: no tensor {missing[0]} ({len(missing)} are missing); download it again"
        )
    unexpected = sorted(x for x in loading["unexpected_keys"] if not x.endswith(HARMLESS))
    if unexpected:  # and leave these unused
        raise ConfigError(
            f"{folder}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all); the model "
            "differs from config.json"
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    ropes = rope.values() if all(isinstance(x, dict) for x in rope.values()) and rope else [rope]
    # Dynamic scaling begins behind max_position_embeddings, which max_model_len does not pass here.
    if any(each.get("rope_type") == "longrope" for each in ropes):
        raise ConfigError(
            f"{folder}: rope_type longrope depends on the length of each sequence, which "
            "transformers' implementation does not support with cached keys"
        )
    return model.eval()
