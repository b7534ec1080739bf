"""Compare an engine with speculation with one without, on texts where it helps and where it cannot.

    python benchmarks/speculation.py [--rounds 5] [--save]

Both engines are in one process and take turns, in an order reversed from round to round. Each round
is another tenant's, so that no answer of an earlier round is known. Answers end by themselves, or
after ``--tokens`` tokens. The texts are this repository's own. The loads A to E are those of
``compare.py``, and "from two tokens" has greedy answers that begin to repeat themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compare import SCENARIOS, make_prompts
from machine import cpu_name, new_result

from chunkllama.config import DEMO_MODEL, EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.models.loading.hub import resolve_model
from chunkllama.sampling_params import GrammarSpec, SamplingParams
from chunkllama.text.chat_template import ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer
from chunkllama_server.bench.workload import PromptMaker

ROOT = Path(__file__).parent.parent
SCHEMA = {
    "type": "array",
    "minItems": 3,
    "maxItems": 6,
    "items": {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 24},
            "family_name": {"type": "string", "maxLength": 24},
            "age_in_years": {"type": "integer", "minimum": 0, "maximum": 120},
            "favourite_animal": {"enum": ["cat", "dog", "bird"]},
        },
        "required": ["first_name", "family_name", "age_in_years", "favourite_animal"],
        "additionalProperties": False,
    },
}
GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.0}


@dataclass(frozen=True)
class Request:
    """A user's message, or a prompt, and what the answer is predicted to be."""

    message: str = ""
    prediction: str = ""
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """Requests of one kind, ``concurrency`` at once."""

    name: str
    requests: list[Request]
    concurrency: int
    sampling: dict[str, object]
    tokens: int | None = None  # of each answer; None: up to ``--tokens``


def paragraphs() -> list[str]:
    """Return paragraphs of the documentation with 400 to 1,200 characters."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    parts = [part.strip() for text in texts for part in text.split("\n\n")]
    return [p for p in parts if 400 <= len(p) <= 1200 and p[0].isalpha() and "|" not in p]


def sources() -> list[str]:
    """Return files of the reference backend."""
    files = sorted((ROOT / "chunkllama/backends/reference").glob("*.py"))
    return [text for file in files if 300 <= len(text := file.read_text()) <= 2500]


def loads(tokenizer: Tokenizer) -> list[Case]:
    """Return the loads of ``compare.py``, and one of long answers to short prompts."""
    maker = PromptMaker(tokenizer, seed=1)
    exact = {**GREEDY, "ignore_eos": True}
    made = []
    for name, scenario in SCENARIOS.items():
        systems = [tokenizer.encode(maker.text(scenario.system)) for _ in range(scenario.tenants)]
        prompts = make_prompts(maker, tokenizer.encode, systems, scenario)
        requests = [Request(prompt=tuple(prompt)) for prompt in prompts]
        made.append(
            Case(f"load {name}", requests, scenario.concurrency, exact, tokens=scenario.output)
        )
    short = [Request(prompt=(number + 100, 7)) for number in range(32)]
    return [*made, Case("from two tokens, 32 at once", short, 32, exact, tokens=1000)]


def cases(only: str, tokenizer: Tokenizer) -> list[Case]:
    """Return the cases whose names contain ``only``."""
    quoted = [
        Request(f"Summarize this text. Quote its sentences word for word.\n\n{text}")
        for text in paragraphs()[:6]
    ]
    edits = [
        Request(f"Write this file again, with the docstring's first word in capitals:\n\n{t}", t)
        for t in sources()[:4]
    ]
    places = ("a farm", "a school", "a ship", "a small town", "a hospital", "a theatre")
    records = [Request(f"List the people of {place} as JSON.") for place in places]
    topics = ("the sea", "bread", "a journey by train", "winter", "music", "an old clock")
    free = [Request(f"Write a short story about {topic}.") for topic in topics]
    grammar = GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA))
    all_cases = [
        Case("quoting", quoted, 1, GREEDY),
        Case("code edits, predicted", edits, 1, GREEDY),
        Case("JSON by schema", records, 1, {**GREEDY, "grammar": grammar}),
        Case("quoting, 6 at once", quoted, 6, GREEDY),
        Case("JSON by schema, 6 at once", records, 6, {**DRAWN, "grammar": grammar}),
        *(Case(f"stories, {n} at once", free * -(-n // 6), n, DRAWN) for n in (1, 6, 16, 32)),
        *loads(tokenizer),
    ]
    return [case for case in all_cases if only in case.name]


class Side:
    """One of the engines."""

    def __init__(self, model: str, dtype: str, **settings: object) -> None:
        config = EngineConfig.from_flat(model=model, dtype=dtype, num_chunks=1536, **settings)
        self.core: EngineCore = build_engine(config)
        folder = resolve_model(model)
        self.tokenizer = load_tokenizer(folder)
        self._template: ChatTemplate | None = load_chat_template(folder, self.tokenizer)

    def run(self, case: Case, tenant: str, max_tokens: int) -> tuple[float, int, list[list[int]]]:
        """Run all requests; returns seconds, steps and the answers."""
        waiting = iter(self._engine_requests(case, tenant, max_tokens))
        answers: dict[str, list[int]] = {}
        steps = self.core.stats().steps_total
        started = time.perf_counter()
        for _, request in zip(range(case.concurrency), waiting, strict=False):
            self.core.add(request)
        while self.core.has_work():
            for delta in self.core.step():
                for choice in delta.choices:
                    answers.setdefault(delta.request_id, []).extend(choice.token_ids)
                    if choice.finish_reason and (request := next(waiting, None)):
                        self.core.add(request)
        seconds = time.perf_counter() - started
        ordered = [answers[name] for name in sorted(answers)]
        return seconds, self.core.stats().steps_total - steps, ordered

    def _engine_requests(self, case: Case, tenant: str, max_tokens: int) -> Iterator[EngineRequest]:
        assert self._template is not None
        for number, request in enumerate(case.requests):
            message = {"role": "user", "content": request.message}
            yield EngineRequest(
                request_id=f"{number:03}",
                prompt_token_ids=[*request.prompt] or self._template.encode([message]),
                prediction_token_ids=self.tokenizer.encode(request.prediction),
                sampling=SamplingParams(
                    max_tokens=case.tokens or max_tokens, seed=number, **case.sampling
                ),
                namespace=tenant,
                tenant=tenant,
            )


def compare(
    plain: Side, drafting: Side, case: Case, options: argparse.Namespace
) -> dict[str, object]:
    """Measure one case on both sides, in turns."""
    ratios, per_step, speeds = [], [], []
    number = same = 0
    for turn in range(options.rounds + 1):
        sides = [plain, drafting] if turn % 2 else [drafting, plain]
        tenant = f"{case.name}-{turn}"
        ran = {side: side.run(case, tenant, options.tokens) for side in sides}
        if turn == 0:  # the first steps of a shape
            continue
        rates = {side: sum(map(len, answers)) / took for side, (took, _, answers) in ran.items()}
        ratios.append(rates[drafting] / rates[plain])
        speeds.append(rates[plain])
        _, steps, answers = ran[drafting]
        _, plain_steps, expected = ran[plain]
        tokens = sum(map(len, answers)) / steps
        per_step.append(tokens / (sum(map(len, expected)) / plain_steps))
        number += len(answers)
        same += sum(a == b for a, b in zip(answers, expected, strict=True))
    return {
        "case": case.name,
        "concurrency": case.concurrency,
        "plain_tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_step_ratio": round(statistics.median(per_step), 3),
        "speed_ratios": [round(ratio, 3) for ratio in ratios],
        "speed_ratio": round(statistics.median(ratios), 3),
        "equal_answers": f"{same} of {number}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--draft-model", help="that guesses, too")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--save", action="store_true", help="write a file in results/")
    options = parser.parse_args()
    plain = Side(options.model, options.dtype)
    drafting = Side(
        options.model, options.dtype, speculation="auto", draft_model=options.draft_model
    )
    results = []
    for case in cases(options.only, plain.tokenizer):
        result = compare(plain, drafting, case, options)
        results.append(result)
        print(
            f"{case.name}: {result['speed_ratio']}x of {result['plain_tokens_per_s']} tokens/s, "
            f"{result['tokens_per_step_ratio']}x tokens a step, {result['equal_answers']} equal",
            flush=True,
        )
    if options.save:
        record = {
            "machine": cpu_name(),
            "date": time.strftime("%Y-%m-%d"),
            **{name: getattr(options, name) for name in ("rounds", "tokens", "dtype")},
            "model": Path(options.model).name,
            "draft_model": Path(options.draft_model).name if options.draft_model else None,
            "cases": results,
        }
        new_result("speculation").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
