"""The offline API on the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_files import write_adapter

from chunkllama import LLM, SamplingParams
from chunkllama.errors import ConfigError, InvalidRequestError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(dtype="float32", num_chunks=64, max_num_seqs=8, max_waiting=2)
    yield llm
    llm.close()


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_chat_answers_paris(llm) -> None:
    (answer,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=40))
    assert "Paris" in answer.outputs[0].text
    assert answer.outputs[0].finish_reason == "stop"
    assert answer.outputs[0].stop_reason is None, "no stop string and no stop id of the caller"
    assert answer.finished


def test_more_prompts_than_the_engine_queues_come_back_in_order(llm) -> None:
    prompts = [f"{i} is a number. The number is" for i in range(20)]
    sampling = SamplingParams(ignore_eos=True, **GREEDY)
    together = llm.generate(prompts, sampling, use_progress_bar=False)
    assert [output.prompt for output in together] == prompts
    assert {len(output.outputs[0].token_ids) for output in together} == {12}


def test_a_stop_string_ends_the_text_before_it(llm) -> None:
    whole = texts(llm.generate("The capital of France is", SamplingParams(**GREEDY)))[0]
    stop = whole.strip().split()[1]
    (output,) = llm.generate("The capital of France is", SamplingParams(stop=(stop,), **GREEDY))
    assert output.outputs[0].text == whole[: whole.index(stop)]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop
    (same,) = llm.generate("The capital of France is", SamplingParams(stop=stop, **GREEDY))
    assert same.outputs == output.outputs
    longer = SamplingParams(stop=stop, min_tokens=GREEDY["max_tokens"], **GREEDY)
    (output,) = llm.generate("The capital of France is", longer)
    assert len(output.outputs[0].token_ids) == GREEDY["max_tokens"]


def test_progress_leaves_stdout_to_the_script(llm, capsys) -> None:
    llm.generate("Hello", SamplingParams(**GREEDY))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "generating" in shown.err


def test_best_of_returns_the_likelier_choices(llm) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 8, "seed": 5, "logprobs": 0}
    (all_five,) = llm.generate("Once upon a time", SamplingParams(n=5, **sampling))
    (best,) = llm.generate("Once upon a time", SamplingParams(n=2, best_of=5, **sampling))

    def mean(choice) -> float:
        return sum(entry.logprob for entry in choice.logprobs) / len(choice.logprobs)

    ranked = sorted(all_five.outputs, key=mean, reverse=True)
    assert [choice.token_ids for choice in best.outputs] == [c.token_ids for c in ranked[:2]]


def test_a_prompt_that_cannot_fit_leaves_nothing_running(llm) -> None:
    with pytest.raises(InvalidRequestError, match="8997 tokens"):
        llm.generate(["first", list(range(3, 9000))], SamplingParams(**GREEDY))
    assert texts(llm.generate("The capital of France is", SamplingParams(**GREEDY)))


def test_the_log_is_not_a_librarys_to_set_up() -> None:
    with pytest.raises(ConfigError, match=r"^log_level: .*getLogger\(\"chunkllama\"\)"):
        LLM(log_level="debug")


def test_an_adapter_changes_the_answer_of_its_calls_alone(llm, demo_path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", demo_path, targets=("down_proj",), rank=4, size=3.0)
    llm.load_adapter("a", str(folder))
    sampling = SamplingParams(ignore_eos=True, **GREEDY)
    plain, adapted, again = (
        texts(llm.generate("Water boils at", sampling, adapter=name, use_progress_bar=False))
        for name in ("", "a", "")
    )
    assert plain == again != adapted
    with pytest.raises(ConfigError, match="'a' is loaded already"):
        llm.load_adapter("a", str(folder))
    with pytest.raises(InvalidRequestError, match="'b' is not loaded"):
        llm.generate("x", sampling, adapter="b")
