"""Measure the time per output token beside a fine-tuning job, and compare its losses with PEFT's.

    python benchmarks/finetune.py --save

Starts its own server. Streams with a shared system prompt follow one another on a few
connections, first alone, then beside a job over a file of 200 lines until the job has ended. Then
an ordinary loop of torch over transformers' model with PEFT's adapter trains on the same lines in
the same order, from the same first values. Targets: TPOT P99 at most 1.10 times the ceiling, and
losses within 2%.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from machine import cpu_name
from servers import HOST, started_server

import chunkllama
from chunkllama_server.bench.client import Endpoint, Outcome

RESULTS = Path(__file__).parent / "results"
MODEL = "m"
WORDS = ("river", "lake", "stone", "paper", "window", "garden", "silver", "market", "winter")
SEED, EPOCHS, BATCH = 11, 1, 4


def text(seed: str, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def training_lines(count: int) -> list[dict[str, Any]]:
    """Conversations whose answers follow from their questions."""
    rows = []
    for number in range(count):
        words = text(f"line {number}", 16)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Reverse the words: {words}"},
                    {"role": "assistant", "content": " ".join(reversed(words.split()))},
                ]
            }
        )
    return rows


class Traffic:
    """Streams, one after the other on each connection."""

    def __init__(self, port: int, options: argparse.Namespace) -> None:
        self._endpoint = Endpoint(f"http://{HOST}:{port}/v1")
        self._options = options
        self._number = 0

    async def run(self, until: asyncio.Event) -> list[Outcome]:
        """Outcomes of the streams that have ended when the event is set."""
        done: list[Outcome] = []

        async def connection() -> None:
            while not until.is_set():
                self._number += 1
                body = {
                    "model": MODEL,
                    "messages": [
                        {"role": "system", "content": text("system", 200)},
                        {"role": "user", "content": text(f"user {self._number}", 20)},
                    ],
                    "max_tokens": self._options.answer_tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                outcome = Outcome(0, 0, 0.0)
                done.append(await self._endpoint.stream("/v1/chat/completions", body, outcome))

        await asyncio.gather(*(connection() for _ in range(self._options.streams)))
        failed = [outcome.error for outcome in done if outcome.error]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed, the first: {failed[0]}")
        return done


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    """Milliseconds; TPOT is a stream's mean, a gap the time between two of its tokens."""
    tpot = [outcome.tpot * 1000 for outcome in outcomes]
    gaps = [
        (after - before) * 1000
        for outcome in outcomes
        for before, after in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
    ]
    return {
        "streams": len(outcomes),
        "tpot_p50_ms": round(statistics.median(tpot), 2),
        "tpot_p99_ms": round(percentile(tpot, 0.99), 2),
        "gap_p50_ms": round(statistics.median(gaps), 2),
        "gap_p99_ms": round(percentile(gaps, 0.99), 2),
        "ttft_p50_ms": round(statistics.median(each.ttft for each in outcomes) * 1000, 2),
    }


async def measure(port: int, rows: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    client = openai.AsyncOpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none")
    traffic = Traffic(port, options)
    ended = asyncio.Event()
    asyncio.get_running_loop().call_later(options.seconds_alone, ended.set)
    alone = summary(await traffic.run(ended))
    print(f"alone: {alone}", flush=True)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file = await client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": EPOCHS, "batch_size": BATCH}
    began = time.monotonic()
    job = await client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        seed=SEED,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    ended = asyncio.Event()

    async def follow() -> None:
        nonlocal job
        while job.status not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(0.2)
            job = await client.fine_tuning.jobs.retrieve(job.id)
        ended.set()

    outcomes, _ = await asyncio.gather(traffic.run(ended), follow())
    if job.status != "succeeded":
        raise SystemExit(f"the job is {job.status}: {job.error}")
    seconds = time.monotonic() - began
    beside = summary(outcomes)
    print(f"beside: {beside}", flush=True)
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    losses = [
        event.data["train_loss"]  # type: ignore[index]
        for event in reversed(events)
        if event.type == "metrics"
    ]
    return {
        "alone": alone,
        "beside": beside,
        "job_seconds": round(seconds, 1),
        "trained_tokens_per_s": round((job.trained_tokens or 0) / seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
    }


def peft_losses(model: str, rows: list[dict[str, Any]]) -> list[float]:
    """Losses of an ordinary loop over transformers' model with PEFT's adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from chunkllama.models.config import read_spec
    from chunkllama.models.loading.hub import resolve_model
    from chunkllama.text.chat_template import load_chat_template
    from chunkllama.text.tokenizer import load_tokenizer
    from chunkllama.tuning.lora import Lora
    from chunkllama.tuning.trainer import batch_of
    from chunkllama.tuning_messages import TuningOptions
    from chunkllama_server.api.tuning.examples import ExampleReader, FileLimits
    from chunkllama_server.config.limits import LimitsConfig

    folder = resolve_model(model)
    spec, tokenizer = read_spec(folder), load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer)
    eos = frozenset(spec.eos_token_ids)
    limits = FileLimits(lines=len(rows), answers=1, tokens=10**9)
    reader = ExampleReader(template, eos, spec.max_position, limits, LimitsConfig())
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        examples = reader.read(Path(file.name))
    options = TuningOptions(n_epochs=EPOCHS, batch_size=BATCH, seed=SEED)
    start = Lora(spec, options.rank, options.alpha, SEED, torch.device("cpu")).parameters()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=int(options.alpha),
        target_modules="all-linear",
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = get_peft_model(base, config)
    trained = []
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data.copy_(start[own].detach())
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(EPOCHS * -(-len(examples) // BATCH)):
        batch = batch_of(examples, options, step)
        longest = max(len(example.token_ids) for example in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--streams", type=int, default=4, help="at once")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--seconds-alone", type=float, default=20.0)
    parser.add_argument("--ceiling", type=float, default=0.1, help="finetune_max_step_seconds")
    parser.add_argument("--no-peft", action="store_true", help="leave out the comparison of losses")
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    parser.add_argument("--save", action="store_true", help="write results/finetune.json")
    options = parser.parse_args()
    rows = training_lines(options.lines)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--files-dir", f"{folder}/files", "--finetune-max-step-seconds")
        with started_server(options.model, *flags, str(options.ceiling)) as (port, _):
            result = asyncio.run(measure(port, rows, options))
    result["ceiling_ms"] = options.ceiling * 1000
    result["tpot_p99_to_ceiling"] = round(result["beside"]["tpot_p99_ms"] / result["ceiling_ms"], 3)
    print(f"TPOT P99 to the ceiling: {result['tpot_p99_to_ceiling']}")
    if not options.no_peft:
        expected = peft_losses(options.model, rows)
        result["peft_losses"] = [round(loss, 4) for loss in expected]
        result["largest_difference"] = max(
            round(abs(a - b) / b, 5) for a, b in zip(result["losses"], expected, strict=True)
        )
        print(f"largest relative difference of a loss: {result['largest_difference']}")
    if options.save:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": cpu_name(),
            "python": platform.python_version(),
            "chunkllama": chunkllama.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "note": options.note,
            **result,
        }
        (RESULTS / "finetune.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
