"""Whole trainings: against PEFT, continued after a kill, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.adapter_file import read_adapter
from chunkllama.tuning.files import StepResult, read_state
from chunkllama.tuning.folder import ADAPTER, STATE, Example
from chunkllama.tuning.load import load_trainer
from chunkllama.tuning.passes import accumulate
from chunkllama.tuning.trainer import Trainer, batch_of
from chunkllama.tuning_messages import TuningOptions

OPTIONS = TuningOptions(n_epochs=2, batch_size=4, learning_rate=4e-3, seed=5, rank=4, alpha=8.0)


def conversations(count: int = 10) -> list[Example]:
    """Texts of one form, so that there is something to learn."""
    generator = torch.Generator().manual_seed(9)
    made = []
    for _ in range(count):
        length = int(torch.randint(20, 40, (1,), generator=generator))
        ids = torch.randint(97, 122, (length,), generator=generator).tolist()
        answer = [min(token + 1, 122) for token in ids[-10:]]
        made.append(Example([*ids, *answer], list(range(length, length + 10))))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


Make = Callable[..., Trainer]


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    def build(folder: Path = tmp_path, options: TuningOptions = OPTIONS, **changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "model_path": model,
            "spec": read_spec(model),
            "name": "tiny",
            "max_model_len": 256,
            "device": torch.device("cpu"),
            "examples": conversations(),
            "options": options,
            "folder": folder,
            "max_bytes": 1 << 30,
            "slice_tokens": 16,
            "on_step": lambda step: None,
        }
        folder.mkdir(exist_ok=True)
        return load_trainer(**{**settings, **changes})

    return build


def finish(trainer: Trainer) -> list[StepResult]:
    for piece in trainer.work():
        if piece == "wait" and trainer.writing is not None:
            trainer.writing.result()
    trainer.close()
    return trainer.steps


def peft_losses(model: Path, trainer: Trainer) -> list[float]:
    """The losses of an ordinary loop over transformers' model with PEFT's adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=OPTIONS.rank, lora_alpha=8, target_modules="all-linear"
    )
    made = get_peft_model(base, config)
    start = trainer._parameters
    trained = []
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data.copy_(start[own].detach())
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=OPTIONS.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(trainer.total_steps):
        batch = batch_of(conversations(), OPTIONS, step)
        longest = max(len(example.token_ids) for example in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
            mask[row, : len(example.token_ids)] = 1
            labels[row, example.targets] = ids[row, example.targets]
        optimizer.zero_grad()
        loss = made(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_loss_curve_is_that_of_peft(model: Path, make: Make) -> None:
    trainer = make()
    expected = peft_losses(model, trainer)
    losses = [step.loss for step in finish(trainer)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=0.02)


def test_every_epoch_has_every_example_in_an_order_of_its_own() -> None:
    examples = conversations(10)
    options = TuningOptions(batch_size=4, seed=3)
    epochs = [
        [example for step in range(3) for example in batch_of(examples, options, 3 * epoch + step)]
        for epoch in range(2)
    ]
    assert all(sorted(map(id, epoch)) == sorted(map(id, examples)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    "pieces", [250, *(pytest.param(count, marks=pytest.mark.nightly) for count in (1, 90, 400))]
)
def test_a_training_that_ends_anywhere_continues_with_at_most_one_step_again(
    make: Make, tmp_path: Path, pieces: int
) -> None:
    whole = [step.loss for step in finish(make(tmp_path / "whole"))]
    killed = make(tmp_path / "killed")
    list(islice(killed.work(), pieces))
    done = len(killed.steps)
    killed.close()
    again = make(tmp_path / "killed")
    assert done - 1 <= len(again.steps) <= done
    assert [step.loss for step in finish(again)] == pytest.approx(whole, rel=1e-4)
    first, second = (
        (tmp_path / name / ADAPTER / "adapter_config.json").read_text()
        for name in ("whole", "killed")
    )
    assert first == second


def test_updates_and_copies_of_a_large_adapter_are_several_pieces(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [step.loss for step in finish(make(tmp_path / "whole"))]
    monkeypatch.setattr("chunkllama.tuning.trainer._PIECE_NUMBERS", 2000)
    trainer = make(tmp_path / "parts")
    pieces = []
    for piece in trainer.work():
        pieces.append(piece)
        if piece == "wait" and trainer.writing is not None:
            trainer.writing.result()
    trainer.close()
    assert [step.loss for step in trainer.steps] == whole
    groups = [sum(map(torch.numel, group.values())) for group in trainer._groups]
    assert max(groups) <= 2000 and len(groups) > 5
    steps = trainer.total_steps
    assert pieces.count("update") == steps * (2 + len(groups))
    assert pieces.count("save") == (steps + 1) * len(groups)
    states = [read_state(tmp_path / name) for name in ("whole", "parts")]
    assert states[0] is not None and states[1] is not None
    for name, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][name]), name


def test_a_state_is_written_after_every_step_and_read_whole(make: Make, tmp_path: Path) -> None:
    trainer = make()
    finish(trainer)
    found = read_state(tmp_path)
    assert found is not None
    tensors, progress = found
    assert progress.steps == trainer.steps and len(progress.steps) == trainer.total_steps
    for name, tensor in trainer._parameters.items():
        assert torch.equal(tensors[name], tensor.detach()), name
    assert not list(tmp_path.glob("**/*.new"))


def test_the_adapter_loads_into_an_engine_and_into_peft(
    make: Make, model: Path, tmp_path: Path
) -> None:
    finish(make())
    folder = tmp_path / ADAPTER
    found = read_adapter(folder, read_spec(model))
    assert found.rank == 4 and len(found.modules) == 14
    core = build_engine(EngineConfig.from_flat(model=str(model), threads=1, num_chunks=8))
    reply = core.load_adapter(LoadAdapter(command_id=1, name="a", folder=str(folder)))
    while reply is None:
        core.step()
        reply = next(iter(core.adapter_replies()), None)
    core.close()
    assert not reply.error
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_bytes": 1 << 20}, "finetune_memory: an example of"),
        ({"max_model_len": 32}, "the model takes 32"),
        ({"options": TuningOptions(rank=2)}, "other settings"),
        ({"examples": conversations(11)}, "other conversations"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    make: Make, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    first = make()
    list(islice(first.work(), 150))
    first.close()
    assert (tmp_path / STATE).exists()
    with pytest.raises(ConfigError, match=words) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_less_memory_than_the_machine_has_left_is_needed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkllama.tuning.load.memory_left", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"finetune_memory: .* are free now"):
        make()


def test_a_state_of_other_weights_of_the_same_shape_is_refused(make: Make, tmp_path: Path) -> None:
    first = make()
    list(islice(first.work(), 150))
    first.close()
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ConfigError, match="another model"):
        make(model_path=other)


def test_a_gradient_that_is_not_finite_ends_the_training_before_a_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()

    def without_a_number(*arguments: Any) -> Any:
        sums = yield from accumulate(*arguments)
        next(iter(trainer._parameters.values())).grad[0, 0] = torch.inf
        return sums

    monkeypatch.setattr("chunkllama.tuning.trainer.accumulate", without_a_number)
    with pytest.raises(ConfigError, match="step 1 or its gradient is not finite"):
        finish(trainer)
    trainer.close()
    assert not trainer.steps
    assert all(bool(tensor.isfinite().all()) for tensor in trainer._parameters.values())


def test_a_loss_that_is_not_finite_ends_the_training(make: Make) -> None:
    trainer = make()
    with torch.no_grad():
        trainer._parameters["model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        finish(trainer)
    trainer.close()


def test_a_damaged_state_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ConfigError, match="no state of a training"):
        make()
