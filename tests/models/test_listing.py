"""What ``chunkllama models list`` says is what happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_families import VOCAB, BuildCore, answers, random_model

from chunkllama.backends.cpu.fused_model import FusedModel
from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.listing import NOTES, entries
from chunkllama_server.commands import run

BY_NAME = {entry.architecture: entry for entry in entries()}
# What published models have, where the class's own value of it is another kind of layer.
TYPICAL = {"GraniteForCausalLM": {"embedding_multiplier": 12.0, "logits_scaling": 8.0}}
QUICK = ("Qwen2ForCausalLM", "Gemma3ForCausalLM")


def test_every_architecture_is_listed() -> None:
    assert list(BY_NAME) == list(ARCHITECTURES)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly)
        for name in ARCHITECTURES
    ],
)
def test_an_architecture_runs_as_listed_in_each_quantization(
    name: str, tmp_path: Path, build_core: BuildCore
) -> None:
    """Fused or not, and near the answer in float32."""
    model = random_model(name.removesuffix("ForCausalLM"), TYPICAL.get(name, {}))
    model.save_pretrained(tmp_path)
    prompt = np.random.default_rng(5).integers(3, VOCAB, 100).tolist()
    entry = BY_NAME[name]
    assert entry.quantizations == "bf16, fp32, int8, int4"
    numbers = {}
    for kind, settings in {
        "fp32": {},
        "bf16": {"dtype": "bfloat16"},
        "int8": {"dtype": "bfloat16", "quantization": "int8"},
        "int4": {"dtype": "bfloat16", "quantization": "int4"},
    }.items():
        core = build_core(tmp_path, backend="cpu", **settings)
        ours = core._executor.step_model.model  # type: ignore[attr-defined]
        assert isinstance(ours, FusedModel) == (entry.cpu == "one native call")
        (answer,) = answers(core, [prompt], with_prompts=True)
        numbers[kind] = np.array(answer.numbers[: len(prompt) - 1])
    distances = {
        kind: float(np.abs(values - numbers["fp32"]).mean()) for kind, values in numbers.items()
    }
    assert 0 < distances["bf16"] < 0.1
    assert 0 < distances["int8"] < 0.2
    assert distances["int8"] < distances["int4"] < 2


def test_the_reference_backend_takes_the_place_of_the_kernels(
    tmp_path: Path, build_core: BuildCore
) -> None:
    random_model("Qwen2", {"head_dim": 24}).save_pretrained(tmp_path)
    assert build_core(tmp_path).info.backend == "reference"
    assert "multiples of 16 up to 256" in NOTES[0]


def test_the_command_prints_all_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run(["models", "list"]) == 0
    printed = capsys.readouterr().out
    for entry in BY_NAME.values():
        assert entry.architecture in printed
        assert entry.limits in printed
    for note in NOTES:
        assert note in printed
