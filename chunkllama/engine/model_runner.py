"""Runs the model over a step's slices and samples; the executor of one process and one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import Activations, Backend, KVCache, KVStorage, Quantization
from chunkllama.backends.model import ModelWeights, RunnableModel
from chunkllama.backends.select import BackendName, select_backend
from chunkllama.engine.adapter_rows import RunnerAdapters
from chunkllama.engine.logprobs import token_logprobs
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.engine.step_sampler import StepSampler
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.llama import Llama
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import NewSequence, SampledTokens, ScheduledSlice, SchedulerOutput

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarCompiler, Matcher
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
        row_work_share: of the model's time that one request's masks and sampling may take in a step
            that others take part in; rows beyond it are sampled in a later step.
        clock: seconds.

    Attributes:
        adapters: reads adapters, and has those in memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: RunnableModel,
        attention: Attention,
        model_path: Path | None = None,
        *,
        row_work_share: float = 0.2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.spec = spec
        self.backend: Backend = attention.backend
        self.spare_chunks: int = attention.planner.packing.spare_chunks
        self._model = model
        self._attention = attention
        self._sequences: dict[int, SequenceState] = {}
        self.adapters = RunnerAdapters(spec, model, attention.kv.dtype, self.backend.device)
        self._sampler = StepSampler(spec, self._sequences, row_work_share, clock)
        self._model_path = model_path
        self._grammars: GrammarCompiler | None = None
        self._compile_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-compile")

    def prepare(self, sampling: SamplingParams) -> Future[None] | None:
        """Compile the request's grammar in a thread, unless it is compiled.

        The very first also reads the vocabulary, which stops all others for a quarter of a second.
        """
        grammar = sampling.grammar
        if grammar is None or (self._grammars is not None and self._grammars.has(grammar)):
            return None

        def compile_grammar() -> None:
            self._grammar_compiler().prepare(grammar)

        return self._compile_thread.submit(compile_grammar)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Copy chunks, run the model over every slice, sample where a slice asks for it.

        Rows that an earlier step deferred are sampled too, as far as the time of their request
        goes.
        """
        for slot in output.freed_slots:
            self._sequences.pop(slot, None)
        for new in output.new_sequences:
            self._sequences[new.slot] = self._new_state(new)
        self._sampler.begin(output)
        if output.copies:
            self.backend.copy_chunks(self._attention.kv, output.copies)
        sampled = SampledTokens(token_ids={})
        hidden = torch.empty(0, self.spec.hidden_size)
        if output.slices:
            hidden = self._run_slices(output, sampled)
        self._sampler.finish(output, self._model, hidden, sampled)
        return sampled

    def _run_slices(self, output: SchedulerOutput, sampled: SampledTokens) -> torch.Tensor:
        """Score and pool prompts; returns the hidden states [R, H] of the rows to sample."""
        hidden = self._forward(output)
        begin = 0
        for piece in output.slices:
            rows = hidden[begin : begin + piece.num_tokens]
            begin += piece.num_tokens
            if piece.wants_prompt_logits:
                self._score_prompt(piece, rows, sampled)
            if self._sequences[piece.slot].pooling:
                self._pool(piece, rows, sampled)
        ends = np.cumsum([piece.num_tokens for piece in output.slices])
        last = [
            row
            for piece, end in zip(output.slices, ends.tolist(), strict=True)
            if piece.samples
            for row in range(end - 1 - piece.num_drafts, end)
        ]
        if last == list(range(len(hidden))):
            return hidden
        return hidden[torch.tensor(last, dtype=torch.int64, device=hidden.device)]

    def close(self) -> None:
        """Release the model and the pool."""
        self._sampler.close()
        self._compile_thread.shutdown(wait=True, cancel_futures=True)
        self._sequences.clear()
        self._attention.kv.layers.clear()
        self.adapters.close()
        vars(self).pop("_model", None)  # closing twice does no harm

    @property
    def kv(self) -> KVCache:
        """The chunk pool."""
        return self._attention.kv

    @torch.inference_mode()
    def compute_chunk(self, token_ids: list[int], chunk_ids: list[int]) -> None:
        """Compute K/V of the last of a prompt's chunks, of which the ones before are there.

        Args:
            token_ids: of the last chunk.
            chunk_ids: all chunks of the prompt.
        """
        piece = ScheduledSlice(
            slot=-1,
            first_position=(len(chunk_ids) - 1) * self.kv.chunk_size,
            token_ids=np.array(token_ids, np.int32),
            chunk_ids=np.array(chunk_ids, np.int32),
            shared=0,
            samples=False,
        )
        self._forward(SchedulerOutput(step=0, slices=[piece], plan_version=0))

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
            self.adapters.rows(slices, self._sequences),
        )

    def _new_state(self, new: NewSequence) -> SequenceState:
        state = SequenceState(
            sampling=new.sampling,
            index=new.index,
            request_id=new.request_id,
            prompt_token_ids=np.array(new.prompt_token_ids, np.int32),
            output_token_ids=[int(token) for token in new.output_token_ids],
            pooling=new.pooling,
            adapter=new.adapter,
        )
        if new.sampling.grammar is not None:
            self._start_matcher(state, new.max_tokens)
        return state

    def _start_matcher(self, state: SequenceState, max_tokens: int | None) -> None:
        """Make the matcher, in the thread if its grammar is not compiled or it has tokens to see.

        A grammar that was prepared may have been pushed out by others before its request begins.
        """
        grammar, tokens = state.sampling.grammar, list(state.output_token_ids)
        assert grammar is not None

        def make() -> Matcher:
            return self._grammar_compiler().matcher(grammar, tokens, max_tokens)

        if tokens or self._grammars is None or not self._grammars.has(grammar):
            state.pending_matcher = self._compile_thread.submit(make)
        else:
            state.matcher = make()

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
    spec: ModelSpec,
    device: str,
    dtype: str,
    num_chunks: int,
    chunk_size: int,
    max_model_len: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
    weights: Quantization = "auto",
    int4_activations: Activations = "int8",
    kv_dtype: KVStorage = "auto",
    row_work_share: float = 0.2,
) -> ModelRunner:
    """Load a model folder's executor and allocate its pool.

    Args:
        spec, dtype: as ``read_spec`` and ``resolve_dtype`` return them.
        max_model_len: positions the rotary table covers.
        backend, isa_level: "auto" or the name of one; levels are the cpu backend's.
        weights, kv_dtype: storage of linear layers and K/V, "auto" or what the backend offers.
        int4_activations: of products of few rows with 4-bit weights.

    Raises:
        ConfigError: the folder or a setting is unusable; checked before any weight is read.
    """
    spec = spec.for_length(max_model_len)
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
        kv_dtype=kv_dtype,
    )
    if foreign is not None:
        foreign.attach(attention, max_model_len)
        return ModelRunner(spec, foreign, attention, model_path, row_work_share=row_work_share)
    loaded = load_weights(checkpoint, spec, getattr(torch, dtype), attention.backend.device)
    model = build_model(
        spec,
        loaded,
        attention,
        max_model_len=max_model_len,
        weights=weights,
        int4_activations=int4_activations,
    )
    return ModelRunner(spec, model, attention, model_path, row_work_share=row_work_share)


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
    kv_dtype: KVStorage = "auto",
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
    )
    windows = [layer.window for layer in spec.layers]
    is_bounded = spec.attention_softcap is not None or any(w is not None for w in windows)
    ops.prepare(is_bounded=is_bounded)
    kv = ops.allocate_kv(
        num_layers=spec.num_layers,
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        is_int8=kv_dtype == "int8",
    )
    packing = ops.packing(
        num_qo_heads=spec.num_qo_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
    )
    score = spec.score_scale, spec.attention_softcap
    return Attention(ops, kv, Planner(packing, chunk_size), spec.num_qo_heads, *score, windows)


def build_model(
    spec: ModelSpec,
    loaded: ModelWeights,
    attention: Attention,
    *,
    max_model_len: int,
    weights: Quantization = "auto",
    int4_activations: Activations = "int8",
) -> RunnableModel:
    """The model as the backend runs it best.

    Raises:
        ConfigError: a weight storage that the backend does not offer.
    """
    device = attention.backend.device
    rotary = tuple(table.to(device) for table in rotary_tables(spec, max_model_len))
    model = Llama(spec, loaded, attention, rotary)
    return attention.backend.fuse(model, weights, int4_activations)
