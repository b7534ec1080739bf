"""Train an adapter: optimizer steps, each saved, continued where a former process ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from chunkllama.errors import ConfigError
from chunkllama.tuning.files import Progress, StepResult, read_state, write_adapter, write_state
from chunkllama.tuning.folder import ADAPTER, STATE, Example
from chunkllama.tuning.model import TunedModel
from chunkllama.tuning.passes import Piece, Sums, accumulate
from chunkllama.tuning_messages import TuningOptions

_MAX_NORM: Final = 1.0  # of the gradient
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_PIECE_NUMBERS: Final = 1 << 20  # that a piece updates or copies; a single matrix may have more


class Trainer:
    """One training.

    Args:
        folder: where its state and the adapter are written.
        name: of the model, noted in the adapter.
        source: see ``source_digest``.
        max_tokens: computed at once; a batch of more is computed in parts.
        slice_tokens: see ``accumulate``.
        on_step: told each step that is done.

    Attributes:
        steps: results of the steps that are done, those of former processes included.
        writing: the state or the adapter that a thread writes to the disk.

    Raises:
        ConfigError: the folder has a state of other options or another source.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: TunedModel,
        examples: list[Example],
        options: TuningOptions,
        folder: Path,
        name: str,
        source: str,
        max_tokens: int,
        slice_tokens: int,
        on_step: Callable[[StepResult], None] = lambda step: None,
    ) -> None:  # fmt: skip
        self._model = model
        self._examples = examples
        self._options = options
        self._folder = folder
        self._name = name
        self._source = source
        self._max_tokens = max_tokens
        self._slice_tokens = slice_tokens
        self._on_step = on_step
        self._parameters = model.lora.parameters()
        self._groups = _grouped(self._parameters)
        self._optimizers = [
            torch.optim.AdamW(
                group.values(), lr=options.learning_rate, weight_decay=0.0, fused=True
            )
            for group in self._groups
        ]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tuning-save")
        self.steps: list[StepResult] = []
        self.writing: Future[None] | None = None
        self._resume()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return num_steps(len(self._examples), self._options)

    def work(self) -> Generator[Piece, None, None]:
        """Train to the end and write the adapter.

        Yields:
            What the next piece is, before it is done; "wait": a file is being written, and
            ``writing`` is done when it is.

        Raises:
            ConfigError: the loss or its gradient is not finite.
            OSError: a file cannot be written.
        """
        for step in range(len(self.steps), self.total_steps):
            yield from self._step(step)
            progress = Progress(self._options, self._source, list(self.steps))
            tensors = yield from self._copied(with_moments=True)
            self._write(write_state, self._folder, tensors, progress)
        adapter = yield from self._copied(with_moments=False)
        yield from self._written()
        self._write(write_adapter, self._folder / ADAPTER, adapter, self._options, self._name)
        yield from self._written()

    def close(self, *, wait: bool = True) -> None:
        """End the thread behind what it writes.

        Args:
            wait: until it has ended; else ``writing`` tells.
        """
        self._thread.shutdown(wait=wait)

    def _step(self, step: int) -> Generator[Piece, None, None]:
        yield "update"
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        batch = batch_of(self._examples, self._options, step)
        num_targets = sum(len(example.targets) for example in batch)
        sums = Sums()
        for part in _parts(batch, self._max_tokens):
            sums.add(
                (yield from accumulate(self._model, part, 1 / num_targets, self._slice_tokens))
            )
        loss = sums.loss / num_targets
        yield "update"
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), _MAX_NORM)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ConfigError(
                f"the loss of step {step + 1} or its gradient is not finite; lower the learning "
                "rate"
            )
        yield from self._written()  # so that a process that ends loses one step at most
        for optimizer in self._optimizers:
            yield "update"
            optimizer.step()
        done = StepResult(step + 1, loss, sums.num_correct / num_targets, num_targets)
        self.steps.append(done)
        self._on_step(done)

    def _write(self, write: Callable[..., None], *arguments: object) -> None:
        """Write in the thread."""
        self.writing = self._thread.submit(write, *arguments)

    def _written(self) -> Generator[Piece, None, None]:
        while self.writing is not None:
            if self.writing.done():
                self.writing.result()
                self.writing = None
            else:
                yield "wait"

    def _copied(self, *, with_moments: bool) -> Generator[Piece, None, dict[str, torch.Tensor]]:
        """A copy of the adapter, perhaps with the optimizer's moments, on the host."""
        copied = {}
        for group, optimizer in zip(self._groups, self._optimizers, strict=True):
            yield "save"
            for name, parameter in group.items():
                copied[name] = _on_host(parameter)
                if with_moments:
                    state = optimizer.state[parameter]
                    copied |= {f"{moment} {name}": _on_host(state[moment]) for moment in _MOMENTS}
        return copied

    def _resume(self) -> None:
        """Continue from the folder's state, if it has one."""
        found = read_state(self._folder)
        if found is None:
            return
        tensors, progress = found
        if (progress.options, progress.source) != (self._options, self._source):
            raise ConfigError(
                f"{STATE}: is of a training with other settings, other conversations or another "
                "model; repeat them, or choose another folder"
            )
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        if any(name not in tensors or tensors[name].shape != shapes[name] for name in shapes):
            raise ConfigError(f"{STATE}: is damaged; remove it")
        self.steps = progress.steps
        with torch.no_grad():
            for group, optimizer in zip(self._groups, self._optimizers, strict=True):
                for name, parameter in group.items():
                    parameter.copy_(tensors[name])
                    moments = {
                        moment: tensors[f"{moment} {name}"].to(parameter.device, copy=True)
                        for moment in _MOMENTS
                    }
                    count = torch.tensor(float(len(self.steps)), device=parameter.device)
                    optimizer.state[parameter] = {"step": count, **moments}


def num_steps(num_examples: int, options: TuningOptions) -> int:
    """Optimizer steps of all epochs; the last batch of an epoch may be smaller."""
    return options.n_epochs * -(-num_examples // options.batch_size)


def batch_of(examples: list[Example], options: TuningOptions, step: int) -> list[Example]:
    """The examples of a step: each epoch has all of them, in a random order of its own."""
    per_epoch = -(-len(examples) // options.batch_size)
    epoch, number = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(options.seed + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    begin = number * options.batch_size
    return [examples[index] for index in order[begin : begin + options.batch_size]]


def _parts(batch: list[Example], max_tokens: int) -> list[list[Example]]:
    """A batch in parts of at most so many tokens to compute."""
    parts: list[list[Example]] = []
    free = 0
    for example in batch:
        if example.num_inputs > free:
            parts.append([])
            free = max_tokens
        parts[-1].append(example)
        free -= example.num_inputs
    return parts


def _grouped(parameters: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Parameters in groups of ``_PIECE_NUMBERS`` numbers, or of one parameter that has more."""
    groups: list[dict[str, torch.Tensor]] = []
    left = 0
    for name, parameter in parameters.items():
        left -= parameter.numel()
        if left < 0:
            groups.append({})
            left = _PIECE_NUMBERS - parameter.numel()
        groups[-1][name] = parameter
    return groups


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
