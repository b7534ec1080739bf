"""Runs the model over a step's slices and samples: the executor of a process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch

from chunkllama.backends.base import Backend, KVCache
from chunkllama.engine.adapter_rows import RunnerAdapters
from chunkllama.engine.draft_model import DraftModel
from chunkllama.engine.logprobs import token_logprobs
from chunkllama.engine.sequence_state import AllowedTokens, SequenceState
from chunkllama.engine.step_model import StepModel
from chunkllama.engine.step_sampler import StepSampler
from chunkllama.errors import ChunkLlamaError, ConfigError
from chunkllama.logger import init_logger
from chunkllama.resources import lower_priority
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import NewSequence, SampledTokens, ScheduledSlice, SchedulerOutput

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarCompiler, Matcher

logger = init_logger(__name__)

_LOGIT_ROWS = 128  # prompt log-probabilities: rows of logits at a time, 24 MiB for a 49k vocabulary


class ModelRunner:
    """Implements ``Executor``.

    Args:
        step_model: the model and its pool.
        model_path: where the tokenizer for grammars lies; None: no grammars.
        row_work_share: of the model's time that one request's masks and sampling may take in a step
            that others take part in; rows beyond it are sampled in a later step.
        clock: seconds.

    Attributes:
        spec: of the model.
        step_model: as given.
        adapters: reads adapters, and has those in memory.
        draft_model: guesses for the scheduler; None without one.
    """

    def __init__(
        self,
        step_model: StepModel,
        model_path: Path | None = None,
        *,
        row_work_share: float = 0.2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.spec = step_model.spec
        self.step_model = step_model
        self._sequences: dict[int, SequenceState] = {}
        # What choices of a request, and equal requests, share while one of them runs.
        self._allowed: WeakValueDictionary[tuple[int, ...], AllowedTokens] = WeakValueDictionary()
        self.adapters = RunnerAdapters(step_model)
        self.draft_model: DraftModel | None = None
        self._sampler = StepSampler(
            self.spec, self._sequences, row_work_share, step_model.backend, clock
        )
        self._model_path = model_path
        self._grammars: GrammarCompiler | None = None
        self._compile_thread = ThreadPoolExecutor(1, "grammar-compile", lower_priority)

    def prepare(self, sampling: SamplingParams) -> Future[None] | None:
        """Compile the request's grammar in a thread, unless it is compiled.

        The very first also reads the vocabulary, unless ``read_vocabulary`` has done so.
        """
        grammar = sampling.grammar
        if grammar is None or (self._grammars is not None and self._grammars.has(grammar)):
            return None

        def compile_grammar() -> None:
            self._grammar_compiler().prepare(grammar)

        return self._compile_thread.submit(compile_grammar)

    def read_vocabulary(self) -> None:
        """Read the vocabulary for grammars, which stops all threads for a quarter of a second.

        One that grammars cannot use fails the requests that need it, not this call.
        """
        with contextlib.suppress(ChunkLlamaError):
            self._grammar_compiler()

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Copy chunks, run the model over every slice, sample where a slice asks for it.

        Rows that an earlier step deferred are sampled too, as far as the time of their request
        goes. A step of one rank that its device lacks memory for yields nothing; the state of its
        slots is then to be freed.

        Raises:
            EngineDeadError: one of several ranks failed, also for lack of memory.
        """
        for slot in output.freed_slots:
            self._sequences.pop(slot, None)
        for new in output.new_sequences:
            self._sequences[new.slot] = self._new_state(new)
        try:
            return self._run(output)
        except torch.OutOfMemoryError as error:
            logger.warning("a step of %d tokens did not fit: %s", output.num_tokens, _line(error))
        torch.cuda.empty_cache()
        return SampledTokens(token_ids={}, ran_out=True)

    def _run(self, output: SchedulerOutput) -> SampledTokens:
        self._sampler.begin(output)
        sampled = SampledTokens(token_ids={})
        hidden = self.step_model.run(output, self.adapters.rows(output.slices, self._sequences))
        if output.slices:
            hidden = self._rows_to_sample(output, hidden, sampled)
        self._sampler.finish(output, self.step_model.model, hidden, sampled)
        self.step_model.check()
        return sampled

    def _rows_to_sample(
        self, output: SchedulerOutput, hidden: torch.Tensor, sampled: SampledTokens
    ) -> torch.Tensor:
        """Score and pool prompts; returns the hidden states [R, H] of the rows to sample."""
        end = 0
        last: list[int] = []
        for piece in output.slices:
            begin, end = end, end + piece.num_tokens
            if piece.wants_prompt_logits:
                self._score_prompt(piece, hidden[begin:end], sampled)
            if self._sequences[piece.slot].pooling:
                self._pool(piece, hidden[begin:end], sampled)
            if piece.samples:
                last += range(end - 1 - piece.num_drafts, end)
        if len(last) == end:  # all of them
            return hidden
        return hidden[self.backend.upload(np.array(last, np.int64))]

    def close(self) -> None:
        """Release the model and the pool."""
        self._sampler.close()
        self._compile_thread.shutdown(wait=True, cancel_futures=True)
        self._sequences.clear()
        self.adapters.close()
        if self.draft_model is not None:
            self.draft_model.close()
        self.step_model.close()

    @property
    def backend(self) -> Backend:
        """The device's ops."""
        return self.step_model.backend

    @property
    def kv(self) -> KVCache:
        """The chunk pool of this rank."""
        return self.step_model.kv

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
        self.step_model.run(SchedulerOutput(step=0, slices=[piece], plan_version=0))

    def _new_state(self, new: NewSequence) -> SequenceState:
        state = SequenceState(
            sampling=new.sampling,
            index=new.index,
            request_id=new.request_id,
            prompt_token_ids=np.array(new.prompt_token_ids, np.int32),
            output_token_ids=[int(token) for token in new.output_token_ids],
            pooling=new.pooling,
            adapter=new.adapter,
            allowed=self._allowed.get(new.sampling.allowed_token_ids),
        )
        if state.allowed is not None:
            self._allowed[new.sampling.allowed_token_ids] = state.allowed
        if new.sampling.grammar is not None:
            self._start_matcher(state, new.max_tokens)
        return state

    def _start_matcher(self, state: SequenceState, max_tokens: int | None) -> None:
        """Let the first mask make the matcher, or begin to make it in the thread if its grammar is
        not compiled or it has tokens to see.

        Each of a request's choices copies the state of the grammar, up to 1.5 ms for a large one.
        One that was prepared may have been pushed out by others before its request begins.
        """
        grammar, tokens = state.sampling.grammar, list(state.output_token_ids)
        assert grammar is not None

        def make() -> Matcher:
            return self._grammar_compiler().matcher(grammar, tokens, max_tokens)

        if self._grammars is not None and not tokens:
            state.new_matcher = self._grammars.maker(grammar, max_tokens)
        if state.new_matcher is None:
            state.pending_matcher = self._compile_thread.submit(make)

    def _grammar_compiler(self) -> GrammarCompiler:
        """Built when the engine is idle first, or with the first grammar."""
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
            logits = self.step_model.model.logits(hidden[start : start + len(some)])
            logprobs = logits.log_softmax(dim=1)
            if bool(logprobs.isnan().any()):
                sampled.failed[piece.slot] = "model_nan"
            num_top = [state.sampling.prompt_logprobs or 0] * len(some)
            tokens = self.step_model.backend.upload(np.array(some, np.int64))
            entries += token_logprobs(logprobs, tokens, num_top)

    def _pool(self, piece: ScheduledSlice, hidden: torch.Tensor, sampled: SampledTokens) -> None:
        """Add a slice to its sequence's embedding; with the last slice report it, L2-normalised."""
        state = self._sequences[piece.slot]
        rows = hidden.double()
        if state.pooling == "last":
            state.pooled = rows[-1]
        else:  # one row after the other: the same sum for every number of slices
            before = (
                rows.new_zeros(1, rows.shape[1]) if state.pooled is None else state.pooled[None]
            )
            state.pooled = torch.cat((before, rows)).cumsum(dim=0)[-1]
        if piece.first_position + piece.num_tokens == len(state.prompt_token_ids):
            embedding = torch.nn.functional.normalize(state.pooled, dim=0).float()
            if bool(embedding.isfinite().all()):
                sampled.embeddings[piece.slot] = embedding.tolist()
            else:
                sampled.failed[piece.slot] = "model_nan"


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
