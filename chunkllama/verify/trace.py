"""Where a model first differs from transformers: every stage of every layer, in float32.

Ours runs on the reference backend behind a recorder that names each op's result by the weights it
used; transformers' modules are recorded by hooks, its rotated q and k by an attention function of
our own. The first stage that differs names the area of a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from chunkllama.backends.base import KVCache, LayerRows
from chunkllama.backends.model import Linear, ModelWeights
from chunkllama.backends.quantized import widen_model
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.engine.load import build_attention
from chunkllama.model_spec import ModelSpec
from chunkllama.models.architectures import ARCHITECTURES, LayerNames
from chunkllama.models.config import read_spec
from chunkllama.models.llama import Llama
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import head_order, rotary_tables
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput
from chunkllama.verify.numbers import TheirModel
from chunkllama.verify.report import Finding

_TOLERANCE: Final = 1e-4  # of the stage's largest value
_ROWS: Final = 48  # compared of each stage, the last ones of the sequence
_TOKENS: Final = 4096  # whose embeddings are compared at once
_ATTENTION: Final = "chunkllama_verify"
# Field of LayerWeights -> area.
_AREAS: Final = {
    "input_norm": "norms",
    "qkv": "q, k, v projections",
    "q_norm": "q/k norms",
    "k_norm": "q/k norms",
    "output": "attention output projection",
    "attention_output_norm": "norms",
    "mlp_norm": "norms",
    "gate_up": "gate and up projections",
    "down": "down projection",
    "mlp_output_norm": "norms",
}
Stages = dict[str, torch.Tensor]


class _Recorder(ReferenceBackend):
    """The reference backend; keeps what each op returned, by the name of its weights.

    Args:
        num_tokens: of the sequence.
    """

    def __init__(self, device: torch.device, names: dict[int, str], num_tokens: int) -> None:
        super().__init__(device)
        self.names = names
        self.stages: Stages = {}
        self._num_tokens = num_tokens

    def keep(self, stage: str, values: torch.Tensor) -> None:
        """Keep the last rows of values [T * n, columns], n of which are of a token."""
        self.stages[stage] = _last_rows(values.reshape(self._num_tokens, -1))

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = super().linear(x, layer)
        stage = self.names[id(layer)]
        if stage.endswith(" down"):
            self.keep(stage.replace("down", "activation"), x)
        self.keep(stage, y)
        return y

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = super()._rms_norm(x, weight, eps, residual)
        stage = self.names[id(weight)]
        if residual is not None:
            self.keep(f"{stage} input", total)
        self.keep(stage, y)
        return y, total

    def rotate(
        self, qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, kv: KVCache
    ) -> torch.Tensor:
        y = super().rotate(qkv, positions, cos_sin, kv)
        layer, _, _ = next(reversed(self.stages)).partition(" ")  # of the projection before it
        self.keep(f"{layer} rotated", y[:, : y.shape[1] - 2 * kv.num_kv_heads * kv.head_dim])
        return y

    def _rope_append(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows, num_qo_heads: int
    ) -> torch.Tensor:
        q = super()._rope_append(qkv, cos_sin, rows, num_qo_heads)
        if f"{rows.layer} rotated" not in self.stages:
            self.keep(f"{rows.layer} rotated", q)
        return q

    def _tpp_attention(
        self, q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
    ) -> torch.Tensor:
        y = super()._tpp_attention(q, rows, scale, softcap)
        self.keep(f"{rows.layer} attention", y)
        return y


def window_to_pass(spec: ModelSpec) -> int:
    """How many tokens show the smallest window of a model's layers; 0: it has none."""
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    return min(windows) + _ROWS // 2 if windows else 0


def first_difference(folder: Path, reference: TheirModel, ids: list[int]) -> Finding:
    """Compare the embeddings of all tokens, then all stages of one sequence, in the order of
    computation.

    Args:
        folder: of the model.
        reference: transformers' model in float32.
        ids: of the sequence; as many are computed as show the smallest window.
    """
    spec = read_spec(folder)
    passing = window_to_pass(spec)
    ids = ids[: max(_ROWS, passing if passing <= len(ids) else 0)]
    spec = spec.for_length(len(ids))
    weights = load_weights(Checkpoint(folder, spec), spec, torch.float32, torch.device("cpu"))
    widen_model(weights, torch.device("cpu"))
    table = _decoder(reference).get_submodule("embed_tokens").get_parameter("weight")
    token = _other_embedding(weights.embedding, table.detach())
    if token is not None:
        return Finding("embedding", "stages", False, f"the embedding of token {token} differs")
    ours = _our_stages(weights, spec, ids)
    theirs = _their_stages(reference, spec, ids)
    compared = 0
    for stage, area in _order(spec):
        if stage not in ours or stage not in theirs:
            continue
        compared += 1
        mine, other = ours[stage].flatten(), theirs[stage].flatten()
        if mine.shape != other.shape:
            return Finding(area, "stages", False, f"{_title(stage)}: another shape than expected")
        distance = float((mine - other).abs().max() / other.abs().max().clamp_min(1e-6))
        if not distance <= _TOLERANCE:
            detail = (
                f"{_title(stage)} is the first to differ, by {distance:.2g} of its largest value"
            )
            return Finding(area, "stages", False, detail, {"relative_difference": distance})
    return Finding("stages", "", True, f"{compared} stages of {spec.num_layers} layers equal")


def _other_embedding(ours: torch.Tensor, theirs: torch.Tensor) -> int | None:
    """The first token whose rows [vocab_size, H] differ, which may occur in no text compared."""
    limit = _TOLERANCE * float(theirs.nan_to_num().abs().max())
    for begin in range(0, min(len(ours), len(theirs)), _TOKENS):
        mine, other = ours[begin : begin + _TOKENS], theirs[begin : begin + _TOKENS].float()
        size = min(len(mine), len(other))
        is_close = torch.isclose(mine[:size], other[:size], rtol=0, atol=limit, equal_nan=True)
        is_equal = is_close.all(dim=1)
        if not is_equal.all():
            return begin + int(is_equal.int().argmin())
    return None


def _title(stage: str) -> str:
    layer, _, rest = stage.partition(" ")
    return f"layer {layer}, {rest}" if layer.isdigit() else stage


def _last_rows(values: torch.Tensor) -> torch.Tensor:
    """Of values [T, columns], in memory of their own."""
    return values[-_ROWS:].detach().float().clone()


def _order(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """(stage, area) as they are computed."""
    yield "embedding", "embedding"
    for index in range(spec.num_layers):
        yield f"{index} input_norm input", "residual stream"
        for name in ("input_norm", "qkv"):
            yield f"{index} {name}", _AREAS[name]
        rotated = (f"{index} rotated", "rotary embedding")
        norms = [(f"{index} {name}", _AREAS[name]) for name in ("q_norm", "k_norm")]
        yield from (rotated, *norms) if spec.layer(index).norm_after_rotation else (*norms, rotated)
        yield f"{index} attention", "attention (scale, window or soft cap)"
        for name in ("output", "attention_output_norm"):
            yield f"{index} {name}", _AREAS[name]
        yield f"{index} mlp_norm input", "residual stream"
        for name in ("mlp_norm", "gate_up"):
            yield f"{index} {name}", _AREAS[name]
        yield f"{index} activation", "activation"
        for name in ("down", "mlp_output_norm"):
            yield f"{index} {name}", _AREAS[name]
    yield "final norm input", "residual stream"
    yield "final norm", "norms"
    yield "logits", "head"


def _our_stages(weights: ModelWeights, spec: ModelSpec, ids: list[int]) -> Stages:
    attention = build_attention(
        spec,
        device="cpu",
        dtype=torch.float32,
        num_chunks=-(-len(ids) // 64),
        chunk_size=64,
        backend="reference",
    )
    recorder = _Recorder(torch.device("cpu"), _names(weights), len(ids))
    attention.backend = recorder
    model = Llama(spec, weights, attention, rotary_tables(spec, len(ids)))
    token_ids = np.array(ids, np.int32)
    chunks = np.arange(-(-len(ids) // 64), dtype=np.int32)
    piece = ScheduledSlice(0, 0, token_ids, chunks, 0, True)
    with torch.inference_mode():
        plan = attention.plan(SchedulerOutput(step=1, slices=[piece], plan_version=0))
        tokens = torch.from_numpy(token_ids).long()
        recorder.keep("embedding", model._embed(tokens))
        hidden = model.forward(tokens, torch.arange(len(ids), dtype=torch.int32), plan)
        recorder.keep("logits", model.logits(hidden))
    return recorder.stages


def _names(weights: ModelWeights) -> dict[int, str]:
    names = {id(weights.norm): "final norm"}
    for index, layer in enumerate(weights.layers):
        for item in fields(layer):
            names[id(getattr(layer, item.name))] = f"{index} {item.name}"
    return names


def _their_stages(model: TheirModel, spec: ModelSpec, ids: list[int]) -> Stages:
    parts: dict[str, list[torch.Tensor]] = {}
    hooks = []

    def keep(module: Any, stage: str, *, its_input: bool = False) -> None:
        def hook(_module: Any, args: Any, output: Any) -> None:
            value = args if its_input else output
            value = value[0] if isinstance(value, tuple) else value
            if value.dim() == 4 and value.shape[1] != len(ids):  # heads before tokens
                value = value.transpose(1, 2)
            parts.setdefault(stage, []).append(_last_rows(value.reshape(len(ids), -1)))

        hooks.append(module.register_forward_hook(hook))

    names = ARCHITECTURES[spec.architecture].names
    decoder = _decoder(model)
    for index, layer in enumerate(decoder.get_submodule("layers").children()):
        for field, modules in _modules(names, spec, index).items():
            for name in modules:
                keep(layer.get_submodule(name), f"{index} {field}")
            if field in ("input_norm", "mlp_norm"):
                keep(layer.get_submodule(modules[0]), f"{index} {field} input", its_input=True)
        keep(layer.get_submodule(names.down), f"{index} activation", its_input=True)
        if spec.layer(index).norm_after_rotation:
            keep(layer.get_submodule(names.q_norm), f"{index} rotated", its_input=True)
    keep(decoder.get_submodule("norm"), "final norm input", its_input=True)
    keep(decoder.get_submodule("norm"), "final norm")
    try:
        with torch.inference_mode(), _recorded_attention(model, spec, parts):
            output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    parts["embedding"] = [_last_rows(output.hidden_states[0][0])]
    parts["logits"] = [_last_rows(output.logits[0])]
    stages = {stage: torch.cat(values, dim=1) for stage, values in parts.items()}
    return _in_our_order(stages, spec)


def _decoder(model: TheirModel) -> torch.nn.Module:
    """The module with the layers: of a multimodal model that of its text model."""
    inner = model.get_submodule("model")
    parts = dict(inner.named_children())
    return parts.get("language_model") or parts.get("text_model") or inner


def _modules(names: LayerNames, spec: ModelSpec, index: int) -> dict[str, tuple[str, ...]]:
    """Field of ``LayerWeights`` -> transformers' modules, of the parts that the layer has."""
    layer = spec.layer(index)
    modules = {
        "qkv": names.qkv,
        "output": (names.output,),
        "gate_up": names.gate_up,
        "down": (names.down,),
    }
    if layer.pre_norm:
        modules |= {"input_norm": (names.input_norm,), "mlp_norm": (names.mlp_norm,)}
    if layer.post_norm:
        modules |= {
            "attention_output_norm": (names.attention_output_norm,),
            "mlp_output_norm": (names.mlp_output_norm,),
        }
    if layer.qk_norm != "none":
        modules |= {"q_norm": (names.q_norm,), "k_norm": (names.k_norm,)}
    return modules


class _recorded_attention:
    """Run a transformers model with an attention function that keeps the rotated queries and what
    eager attention makes of them.
    """

    def __init__(
        self, model: TheirModel, spec: ModelSpec, parts: dict[str, list[torch.Tensor]]
    ) -> None:
        self._model = model
        self._parts = parts

    def __enter__(self) -> None:
        import sys

        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        eager = sys.modules[type(_decoder(self._model)).__module__].eager_attention_forward
        parts = self._parts

        def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            index, rows = module.layer_idx, query.shape[2]
            rotated = query[0].transpose(0, 1).reshape(rows, -1)
            parts.setdefault(f"{index} rotated", [_last_rows(rotated)])
            output, weights = eager(module, query, *args, **kwargs)
            parts[f"{index} attention"] = [_last_rows(output[0].reshape(rows, -1))]
            return output, weights

        AttentionInterface.register(_ATTENTION, attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        self._before = self._model.config._attn_implementation
        self._model.set_attn_implementation(_ATTENTION)

    def __exit__(self, *error: object) -> None:
        self._model.set_attn_implementation(self._before)


def _in_our_order(stages: Stages, spec: ModelSpec) -> Stages:
    """Reorder the dimensions of q and k heads as the loader does."""
    order = head_order(spec.ropes[0], spec.head_dim)
    if order is None:
        return stages
    heads = spec.num_qo_heads + spec.num_kv_heads
    for stage, values in stages.items():
        _, _, name = stage.partition(" ")
        if name in ("qkv", "rotated", "q_norm", "k_norm"):
            rotated = heads * spec.head_dim if name == "qkv" else values.shape[1]
            head = values[:, :rotated].reshape(len(values), -1, spec.head_dim)[:, :, order]
            stages[stage] = torch.cat((head.reshape(len(values), -1), values[:, rotated:]), dim=1)
    return stages
