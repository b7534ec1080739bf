"""Runs the model over a step's slices and samples; the executor of one process and one device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import Backend, Quantization
from chunkllama.backends.model import ModelWeights, RunnableModel
from chunkllama.backends.select import BackendName, select_backend
from chunkllama.engine.logprobs import token_logprobs
from chunkllama.engine.sampler import Sampled, Sampler, takes_best
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.config import read_spec
from chunkllama.models.llama import Llama
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import NewSequence, SampledTokens, ScheduledSlice, SchedulerOutput

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarCompiler
    from chunkllama.models.hf_model import TransformersModel

logger = init_logger(__name__)

_LOGIT_ROWS = 128  # prompt log-probabilities: rows of logits at a time, 24 MiB for a 49k vocabulary


class ModelRunner:
    """Implements ``Executor``.

    Args:
        spec: of the model.
        model: built on ``attention``.
        attention: the backend, the chunk pool and the planner.
        model_path: where the tokenizer for grammars lies; None: no grammars.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: RunnableModel,
        attention: Attention,
        model_path: Path | None = None,
    ) -> None:
        self.spec = spec
        self.backend: Backend = attention.backend
        self.spare_chunks: int = attention.planner.packing.spare_chunks
        self._model = model
        self._attention = attention
        self._sampler = Sampler(spec.eos_token_ids)
        self._sequences: dict[int, SequenceState] = {}
        self._model_path = model_path
        self._grammars: GrammarCompiler | None = None
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-mask")
        self._compile_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-compile")

    def prepare(self, sampling: SamplingParams) -> Future[None] | None:
        """Compile the request's grammar in a thread, unless it is compiled.

        The very first also reads the vocabulary, which stops all others for a quarter of a second.
        """
        grammar = sampling.grammar
        if grammar is None or (self._grammars is not None and self._grammars.has(grammar)):
            return None

        def compile_grammar() -> None:
            self._grammar_compiler().matcher(grammar, [])

        return self._compile_thread.submit(compile_grammar)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Copy chunks, run the model over every slice, sample where a slice asks for it."""
        for slot in output.freed_slots:
            self._sequences.pop(slot, None)
        for new in output.new_sequences:
            self._sequences[new.slot] = self._new_state(new)
        masks = self._start_masks(output.slices)
        if output.copies:
            self.backend.copy_chunks(self._attention.kv, output.copies)
        hidden = self._forward(output)
        sampled = SampledTokens(token_ids={})
        begin = 0
        for piece in output.slices:
            rows = hidden[begin : begin + piece.num_tokens]
            begin += piece.num_tokens
            if piece.wants_prompt_logits:
                self._score_prompt(piece, rows, sampled)
            if self._sequences[piece.slot].pooling:
                self._pool(piece, rows, sampled)
        self._sample(output.slices, hidden, masks, sampled)
        return sampled

    def close(self) -> None:
        """Release the model and the pool."""
        self._mask_thread.shutdown(wait=True)
        self._compile_thread.shutdown(wait=True, cancel_futures=True)
        self._sequences.clear()
        self._attention.kv.layers.clear()
        vars(self).pop("_model", None)  # closing twice does no harm

    def _forward(self, output: SchedulerOutput) -> torch.Tensor:
        """Final hidden states [T, H] of the slices' tokens, one slice after the other."""
        plan = self._attention.plan(output)
        slices = output.slices
        token_ids = np.concatenate([piece.token_ids for piece in slices])
        positions = np.concatenate(
            [
                np.arange(
                    piece.first_position, piece.first_position + piece.num_tokens, dtype=np.int32
                )
                for piece in slices
            ]
        )
        device = self.backend.device
        return self._model.forward(
            torch.from_numpy(token_ids.astype(np.int64)).to(device),
            torch.from_numpy(positions).to(device),
            plan,
        )

    def _new_state(self, new: NewSequence) -> SequenceState:
        state = SequenceState(
            sampling=new.sampling,
            index=new.index,
            prompt_token_ids=np.array(new.prompt_token_ids, np.int32),
            output_token_ids=[int(token) for token in new.output_token_ids],
            pooling=new.pooling,
        )
        if new.sampling.grammar is not None:
            try:
                compiler = self._grammar_compiler()
                state.matcher = compiler.matcher(new.sampling.grammar, state.output_token_ids)
            except (InvalidRequestError, ConfigError) as error:
                logger.warning("request %s: %s", new.request_id, error)
                state.failed = "grammar_error"
        return state

    def _grammar_compiler(self) -> GrammarCompiler:
        """Built with the first grammar: it takes a second that most servers never need."""
        if self._grammars is None:
            if self._model_path is None:
                raise ConfigError("grammars need the model's tokenizer")
            from chunkllama.engine.grammar import GrammarCompiler
            from chunkllama.text.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(self._model_path)
            self._grammars = GrammarCompiler(
                tokenizer.to_json(), self.spec.vocab_size, list(self.spec.eos_token_ids)
            )
        return self._grammars

    def _start_masks(
        self, slices: list[ScheduledSlice]
    ) -> Future[dict[int, NDArray[np.int32]]] | None:
        """Compute the grammar masks of this step's samples in a thread while the model runs."""
        matchers = {
            piece.slot: state.matcher
            for piece in slices
            if piece.samples and (state := self._sequences[piece.slot]).matcher is not None
        }
        if not matchers:
            return None
        words = -(-self.spec.vocab_size // 32)

        def compute() -> dict[int, NDArray[np.int32]]:
            masks = {}
            for slot, matcher in matchers.items():
                masks[slot] = np.zeros(words, np.int32)
                matcher.fill_mask(masks[slot])
            return masks

        return self._mask_thread.submit(compute)

    def _sample(
        self,
        slices: list[ScheduledSlice],
        hidden: torch.Tensor,
        pending_masks: Future[dict[int, NDArray[np.int32]]] | None,
        sampled: SampledTokens,
    ) -> None:
        ends = np.cumsum([piece.num_tokens for piece in slices])
        slots = [piece.slot for piece in slices if piece.samples]
        if not slots:
            return
        last_rows = [int(end) - 1 for piece, end in zip(slices, ends, strict=True) if piece.samples]
        if last_rows != list(range(len(hidden))):
            hidden = hidden[torch.tensor(last_rows, device=hidden.device)]
        states = [self._sequences[slot] for slot in slots]
        if all(takes_best(state.sampling) for state in states):
            outcomes = self._take_best(hidden)
        else:
            logits = self._model.logits(hidden)
            masks = pending_masks.result() if pending_masks is not None else {}
            of_rows = {row: masks[slot] for row, slot in enumerate(slots) if slot in masks}
            outcomes = self._sampler.sample(logits, states, of_rows)
        for slot, outcome in zip(slots, outcomes, strict=True):
            state = self._sequences[slot]
            if not (state.failed or outcome.failed):
                state.append(outcome.token_id)
            if reason := state.failed or outcome.failed:
                sampled.failed[slot] = reason
                continue
            sampled.token_ids[slot] = outcome.token_id
            if outcome.logprob is not None:
                sampled.logprobs[slot] = outcome.logprob
            if outcome.beam_candidates is not None:
                sampled.beam_candidates[slot] = outcome.beam_candidates
            if state.matcher is not None and state.matcher.is_finished:
                sampled.finished_grammar.add(slot)

    def _take_best(self, hidden: torch.Tensor) -> list[Sampled]:
        """Greedy sampling alone needs no logits in memory."""
        values, tokens = self._model.best_tokens(hidden)
        return [
            Sampled(token, failed="" if is_finite else "model_nan")
            for token, is_finite in zip(tokens.tolist(), values.isfinite().tolist(), strict=True)
        ]

    def _score_prompt(
        self, piece: ScheduledSlice, hidden: torch.Tensor, sampled: SampledTokens
    ) -> None:
        """Log-probabilities of the prompt token after each row; the last row has none after it."""
        state = self._sequences[piece.slot]
        begin = piece.first_position + 1
        targets = state.prompt_token_ids[begin : begin + piece.num_tokens].tolist()
        entries = sampled.prompt_logprobs[piece.slot] = []
        for start in range(0, len(targets), _LOGIT_ROWS):
            some = targets[start : start + _LOGIT_ROWS]
            logprobs = self._model.logits(hidden[start : start + len(some)]).log_softmax(dim=1)
            if bool(logprobs.isnan().any()):
                sampled.failed[piece.slot] = "model_nan"
            num_top = [state.sampling.prompt_logprobs or 0] * len(some)
            entries += token_logprobs(logprobs, some, num_top)

    def _pool(self, piece: ScheduledSlice, hidden: torch.Tensor, sampled: SampledTokens) -> None:
        """Add a slice to its sequence's embedding; with the last slice report it, L2-normalised."""
        state = self._sequences[piece.slot]
        rows = hidden.float()
        if state.pooling == "last":
            state.pooled = rows[-1]
        else:
            state.pooled = rows.sum(dim=0) + (0.0 if state.pooled is None else state.pooled)
        if piece.first_position + piece.num_tokens == len(state.prompt_token_ids):
            embedding = torch.nn.functional.normalize(state.pooled, dim=0)
            if bool(embedding.isfinite().all()):
                sampled.embeddings[piece.slot] = embedding.tolist()
            else:
                sampled.failed[piece.slot] = "model_nan"


def load_executor(  # noqa: PLR0913
    *,
    model_path: Path,
    device: str,
    dtype: str,
    num_chunks: int,
    chunk_size: int,
    max_model_len: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
    weights: Quantization = "auto",
) -> ModelRunner:
    """Load a model folder's executor and allocate its pool.

    Args:
        dtype: as ``resolve_dtype`` returns it.
        max_model_len: positions the rotary table covers.
        backend: "auto" or the name of one.
        isa_level: of the cpu backend, "auto" or the name of one.
        weights: storage of the linear layers, "auto" or what the backend offers.

    Raises:
        ConfigError: the folder or a setting is unusable; checked before any weight is read.
    """
    spec = read_spec(model_path).for_length(max_model_len)
    checkpoint = Checkpoint(model_path, spec)
    foreign = None
    if not spec.is_native:
        foreign = _transformers_model(model_path, spec, dtype, device, weights)
        spec = foreign.spec.for_length(max_model_len)
    attention = build_attention(
        spec,
        device=device,
        dtype=getattr(torch, dtype),
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        backend=backend,
        isa_level=isa_level,
    )
    if foreign is not None:
        foreign.attach(attention, max_model_len)
        return ModelRunner(spec, foreign, attention, model_path)
    loaded = load_weights(checkpoint, spec, getattr(torch, dtype), attention.backend.device)
    model = build_model(spec, loaded, attention, max_model_len=max_model_len, weights=weights)
    return ModelRunner(spec, model, attention, model_path)


def _transformers_model(
    path: Path, spec: ModelSpec, dtype: str, device: str, weights: Quantization
) -> TransformersModel:
    if weights != "auto":
        raise ConfigError(
            f"quantization: {weights} is not available for {spec.architecture}, which transformers "
            "runs; use auto"
        )
    logger.warning(
        "%s is not an architecture of this server: transformers runs it, which is slower, on this "
        "server's attention and prefix cache",
        spec.architecture,
    )
    from chunkllama.models.hf_model import TransformersModel

    return TransformersModel(path, spec, getattr(torch, dtype), torch.device(device))


def build_attention(
    spec: ModelSpec,
    *,
    device: str,
    dtype: torch.dtype,
    num_chunks: int,
    chunk_size: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
) -> Attention:
    """The backend for the device, its chunk pool and planner."""
    ops = select_backend(
        device,
        dtype=dtype,
        head_dim=spec.head_dim,
        chunk_size=chunk_size,
        num_kv_heads=spec.num_kv_heads,
        backend=backend,
        isa_level=isa_level,
        softcap=spec.attention_softcap is not None,
    )
    kv = ops.allocate_kv(
        num_layers=spec.num_layers,
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
    )
    packing = ops.packing(
        num_qo_heads=spec.num_qo_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
    )
    return Attention(
        ops,
        kv,
        Planner(packing, chunk_size),
        spec.num_qo_heads,
        spec.score_scale,
        spec.attention_softcap,
        [layer.window for layer in spec.layers],
    )


def build_model(
    spec: ModelSpec,
    loaded: ModelWeights,
    attention: Attention,
    *,
    max_model_len: int,
    weights: Quantization = "auto",
) -> RunnableModel:
    """The model as the backend runs it best.

    Raises:
        ConfigError: a weight storage that the backend does not offer.
    """
    device = attention.backend.device
    rotary = tuple(table.to(device) for table in rotary_tables(spec, max_model_len))
    return attention.backend.fuse(Llama(spec, loaded, attention, rotary), weights)
