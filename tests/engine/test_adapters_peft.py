"""Adapters that PEFT has written, on the demo model, against PEFT itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest, TokenLogprob
from chunkllama.sampling_params import SamplingParams

CLOSE = 1e-4
INVOCATION = [1, 520, 9531, 198]  # "<|im_start|>assistant\n" in the demo model's vocabulary
PLAIN: dict[str, dict[str, Any]] = {
    "all": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 64, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"up_proj": 128, r"layers\.3\.self_attn\.q_proj": 1},
        "alpha_pattern": {"down_proj": 20},
    },
    "layers": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [0, 29]},
}
ACTIVATED = {
    f"activated-{name}": {**config, "alora_invocation_tokens": INVOCATION}
    for name, config in PLAIN.items()
}
KINDS = {**PLAIN, **ACTIVATED}


@pytest.fixture(scope="module")
def peft_model(
    transformers_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """The demo model with an adapter of each kind, and the folder they are saved in."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = tmp_path_factory.mktemp("peft")
    generator = torch.Generator().manual_seed(5)
    for name, config in KINDS.items():
        made = get_peft_model(
            copy.deepcopy(transformers_model), LoraConfig(task_type="CAUSAL_LM", **config)
        )
        for parameter_name, parameter in made.named_parameters():
            if "lora_B" in parameter_name:  # zero before training
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.05 * values)
        made.save_pretrained(folder / name)
    first, *others = KINDS
    base = copy.deepcopy(transformers_model)
    model = PeftModel.from_pretrained(base, folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval(), folder


@pytest.mark.nightly
def test_logits_equal_those_of_peft_alone_and_eight_in_a_batch(
    peft_model: tuple[Any, Path], make_core: Callable[..., EngineCore]
) -> None:
    model, folder = peft_model
    core = make_core(num_chunks=256)
    for name in KINDS:
        reply = core.load_adapter(LoadAdapter(command_id=1, name=name, folder=str(folder / name)))
        while reply is None:
            core.step()
            reply = next(iter(core.adapter_replies()), None)
        assert not reply.error, reply.error
    system = torch.randint(10, 40000, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = {
        name: [*system, *INVOCATION, 40 + i, *range(100, 120), *INVOCATION, 60 + i]
        for i, name in enumerate(KINDS)
    }
    expected = {}
    for name, prompt in prompts.items():
        model.set_adapter(name)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        expected[name] = logits.log_softmax(dim=0)
    found: dict[str, TokenLogprob] = {}

    def run(names: list[str], turn: str) -> None:
        for name in names:
            core.add(
                EngineRequest(
                    request_id=f"{name} {turn}",
                    prompt_token_ids=prompts[name],
                    sampling=SamplingParams(temperature=0.0, seed=1, max_tokens=1, logprobs=20),
                    adapter=name,
                )
            )
        while core.has_work():
            for delta in core.step():
                assert delta.error is None
                (entry,) = delta.choices[0].logprobs or ()
                found[delta.request_id] = entry

    for name in KINDS:
        run([name], f"alone in {name}")
    run(list(KINDS), "together")
    core.close()
    assert len(found) == 2 * len(KINDS)
    for request_id, entry in found.items():
        row = expected[request_id.split()[0]]
        assert len(entry.top) == 20
        for token, logprob in entry.top:
            assert abs(float(row[token]) - logprob) < CLOSE, request_id
