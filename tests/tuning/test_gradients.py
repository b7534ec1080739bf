"""Loss and gradients of slices against those of PEFT over transformers, on whole sequences."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import CASES, VOCAB, random_model

from chunkllama.models.config import read_spec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.tuning.folder import Example
from chunkllama.tuning.lora import Lora
from chunkllama.tuning.model import TunedLayer, TunedModel
from chunkllama.tuning.passes import Sums, accumulate

RANK, ALPHA, LENGTH = 4, 6.0, 45


def examples() -> list[Example]:
    """Two conversations of other lengths, with gaps between the tokens that are trained."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (LENGTH + 20,), generator=generator).tolist()
    return [
        Example(ids[:LENGTH], [*range(9, 17), *range(30, LENGTH)]),
        Example(ids[LENGTH:], [7, 12, 13]),
    ]


def ours(folder: Path) -> TunedModel:
    spec = read_spec(folder).for_length(LENGTH)
    weights = load_weights(Checkpoint(folder, spec), spec, torch.float32, torch.device("cpu"))
    lora = Lora(spec, RANK, ALPHA, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in lora.parameters().items():
            if "lora_B" in name:  # zero before training, and then A has no gradient
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    # transformers stretches a rotary embedding by the length of the sequence, too.
    return TunedModel(spec, weights, lora, rotary_tables(spec, LENGTH))


def theirs(model: torch.nn.Module, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
    )
    made = get_peft_model(model, config)
    tensors = lora.parameters()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data.copy_(tensors.pop(own).detach())
    assert not tensors
    return made.eval()


def run(model: TunedModel, batch: list[Example], slice_tokens: int) -> tuple[Sums, set[str]]:
    work, pieces = accumulate(model, batch, 1 / 30, slice_tokens), set()
    while True:
        try:
            pieces.add(next(work))
        except StopIteration as end:
            return end.value, pieces


def check(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    reference = random_model(family, changes)
    reference.save_pretrained(tmp_path)
    model, batch = ours(tmp_path), examples()
    peft = theirs(reference, model.lora)
    loss = torch.zeros(())
    for example in batch:
        logits = peft(torch.tensor([example.token_ids])).logits[0]
        rows = [target - 1 for target in example.targets]
        wanted = torch.tensor([example.token_ids[target] for target in example.targets])
        loss = loss + torch.nn.functional.cross_entropy(logits[rows], wanted, reduction="sum")
    (loss / 30).backward()
    sums, pieces = run(model, batch, 16)
    assert pieces == {"layer", "keys", "forward", "head", "backward"}
    assert sums.num_tokens == sum(len(example.targets) for example in batch)
    assert sums.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in peft.named_parameters()
        if "lora_" in name
    }
    for name, tensor in model.lora.parameters().items():
        grad = expected[name]
        assert tensor.grad is not None and grad is not None, name
        assert float(grad.abs().max()) > 0, name
        distance = float((tensor.grad - grad).abs().max() / grad.abs().max())
        assert distance < 2e-3, (name, distance)


@pytest.mark.nightly
@pytest.mark.parametrize("case", sorted(CASES))
def test_gradients_of_slices_equal_those_of_peft(case: str, tmp_path: Path) -> None:
    """The loss curve in ``test_trainer.py`` compares a Llama in every run."""
    check(case, tmp_path)


def test_slices_and_parts_of_a_batch_give_the_same_gradients(tmp_path: Path) -> None:
    random_model(*CASES["llama"]).save_pretrained(tmp_path)
    batch, found = examples(), []
    for slice_tokens, parts in ((8, [batch]), (1000, [batch]), (16, [[each] for each in batch])):
        model = ours(tmp_path)
        losses = [run(model, part, slice_tokens)[0].loss for part in parts]
        grads = {name: tensor.grad for name, tensor in model.lora.parameters().items()}
        found.append((sum(losses), grads))
    (loss, grads), *others = found
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, grad in grads.items():
            assert grad is not None and other_grads[name] is not None
            torch.testing.assert_close(other_grads[name], grad, rtol=1e-3, atol=1e-6)


def test_one_layer_at_a_time_is_held_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(*CASES["llama"]).save_pretrained(tmp_path)
    model = ours(tmp_path)
    widened: list[weakref.ref[TunedLayer]] = []
    widen = model.layer

    def layer(index: int) -> TunedLayer:
        assert all(each() is None for each in widened)
        made = widen(index)
        widened.append(weakref.ref(made))
        return made

    monkeypatch.setattr(model, "layer", layer)
    run(model, examples(), 16)
    assert len(widened) == 2 * model.spec.num_layers > 2
