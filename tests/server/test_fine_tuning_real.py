"""Fine-tuning on a real engine: beside requests, and after a process has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fake_engine import MODEL
from tiny_model import write_tiny_model
from tiny_server import TinyServer, serve

QUESTIONS = ["one", "two", "three"]


def sdk(server: TinyServer) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http)


def create(client: openai.OpenAI, count: int, **hyperparameters: Any) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Which letter is number {i}?"},
                {"role": "assistant", "content": chr(97 + i % 26) * 8},
            ]
        }
        for i in range(count)
    ]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, method=method).id


def answers(client: openai.OpenAI, model: str = MODEL) -> list[str | None]:
    return [
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=16,
            temperature=0,
            extra_body={"ignore_eos": True},
        ).choices[0].message.content
        for question in QUESTIONS
    ]  # fmt: skip


def metrics(client: openai.OpenAI, job_id: str) -> list[tuple[int, float]]:
    """Step and loss of each step, oldest first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    found = [event.data for event in events if event.type == "metrics"][::-1]
    return [(each["step"], each["train_loss"]) for each in found]  # type: ignore[index]


def ended(client: openai.OpenAI, job_id: str) -> Any:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def test_answers_stay_right_beside_a_job_and_its_model_is_served(tiny_server: TinyServer) -> None:
    with sdk(tiny_server) as client:
        expected = answers(client)
        job_id = create(client, 16, n_epochs=2, batch_size=4, learning_rate_multiplier=20)
        while client.fine_tuning.jobs.retrieve(job_id).finished_at is None:
            assert answers(client) == expected
        job = ended(client, job_id)
        assert job.status == "succeeded", job.error
        losses = [loss for _, loss in metrics(client, job_id)]
        assert len(losses) == 8 and losses[-1] < losses[0]
        assert answers(client) == expected
        assert answers(client, job.fine_tuned_model) != expected


def engine_of(server: TinyServer) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


@pytest.mark.nightly
@pytest.mark.parametrize("whole_server", [False, True])
def test_a_killed_process_loses_at_most_one_step(tmp_path: Path, whole_server: bool) -> None:
    write_tiny_model(tmp_path)
    options = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 20}
    with contextlib.ExitStack() as stack:
        first = serve(tmp_path)
        server = first.__enter__()
        with sdk(server) as client:
            expected = create(client, 24, **options)
            assert ended(client, expected).status == "succeeded"
            whole = metrics(client, expected)
            job_id = create(client, 24, **options)
            while len(metrics(client, job_id)) < 10:
                time.sleep(0.01)
            done = metrics(client, job_id)[-1][0]
        if whole_server:
            server.process.kill()
            with contextlib.suppress(AssertionError):  # it did not end by itself
                first.__exit__(None, None, None)
            server = stack.enter_context(serve(tmp_path))
        else:
            stack.push(first)
            os.kill(engine_of(server).pid, signal.SIGKILL)
        with sdk(server) as client:
            assert ended(client, job_id).status == "succeeded"
            again = metrics(client, job_id)
            assert [step for step, _ in again] == list(range(1, 73))
            losses = [loss for _, loss in whole]
            assert [loss for _, loss in again] == pytest.approx(losses, rel=1e-3)
            (message,) = [
                event.message
                for event in client.fine_tuning.jobs.list_events(job_id, limit=100)
                if event.message.startswith("Training continues after step")
            ]
            assert int(message.split()[4]) >= done - 1
