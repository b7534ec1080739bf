"""Fine-tuning jobs by openai-python, over an engine that reports what the test says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_helpers import until
from fake_engine import MODEL
from openai.pagination import SyncCursorPage
from openai.types import fine_tuning as kinds

from chunkllama.errors import ConfigError
from chunkllama.tuning.folder import ADAPTER, STATE, read_examples
from chunkllama.tuning_messages import TuningProgress

KEYS = {"alice": "a-key", "bob": "b-key"}
ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]}
    for i in range(8)
]


def upload(client: openai.OpenAI, rows: list[Any] = ROWS) -> str:
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return client.files.create(file=("train.jsonl", content), purpose="fine-tune").id


def create(client: openai.OpenAI, rows: list[Any] = ROWS, **fields: Any) -> Any:
    return client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, rows), **fields)


def status(client: openai.OpenAI, job_id: str) -> str:
    return client.fine_tuning.jobs.retrieve(job_id).status


def report(server: Any, job_id: str, state: Any = "running", **fields: Any) -> None:
    """Let the engine report, in the server's event loop."""
    runner = server.app.state.context.tunings

    async def send() -> None:
        server.engine.on_tuning(TuningProgress(job_id=job_id, state=state, **fields))

    asyncio.run_coroutine_threadsafe(send(), runner._task.get_loop()).result(60)


def steps(server: Any, job_id: str, first: int, last: int, total: int = 6) -> None:
    report(server, job_id, step=first - 1, total_steps=total)
    for step in range(first, last + 1):
        report(
            server, job_id, step=step, total_steps=total, loss=4.0 / step, accuracy=0.5,
            num_tokens=10,
        )  # fmt: skip


def succeed(server: Any, job_id: str) -> None:
    runner = server.app.state.context.tunings
    folder = next(job.adapter for job in runner.jobs if job.id == job_id)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    report(server, job_id, "succeeded")


def test_a_job_from_the_file_to_its_model(start_server, tmp_path: Path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        job = create(
            client,
            suffix="mine",
            seed=7,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 3}},
            },
            metadata={"a": "b"},
            extra_body={"lora": {"rank": 4}},
        )
        assert (job.object, job.status) == ("fine_tuning.job", "validating_files")
        assert (job.seed, job.metadata, job.hyperparameters.n_epochs) == (7, {"a": "b"}, 2)
        until(lambda: server.engine.tunings)
        (command,) = server.engine.tunings
        assert command.job_id == job.id and command.options.rank == 4
        assert (command.options.n_epochs, command.options.batch_size) == (2, 3)
        assert len(read_examples(Path(command.folder))) == len(ROWS)
        assert status(client, job.id) == "running"
        steps(server, job.id, 1, 6)
        assert client.fine_tuning.jobs.retrieve(job.id).estimated_finish is not None
        succeed(server, job.id)
        until(lambda: status(client, job.id) == "succeeded")
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.fine_tuned_model == f"ft:{MODEL}:mine:{job.id[-8:]}"
        assert job.finished_at is not None and job.error is None
        # Each answer is "yes" and the end of its turn.
        assert job.trained_tokens == 2 * 4 * len(ROWS)
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))
        losses = [event.data["train_loss"] for event in events if event.type == "metrics"][::-1]
        assert losses == pytest.approx([4.0 / step for step in range(1, 7)])
        raw = client.fine_tuning.jobs.with_raw_response
        answers = (
            (kinds.FineTuningJob, raw.retrieve(job.id).text),
            (SyncCursorPage[kinds.FineTuningJob], raw.list().text),
            (SyncCursorPage[kinds.FineTuningJobEvent], raw.list_events(job.id).text),
        )
        for kind, text in answers:
            kind.model_validate_json(text, strict=True)
        (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
        assert checkpoint.metrics.step == 6 == checkpoint.step_number
        assert job.fine_tuned_model in [model.id for model in client.models.list()]
        client.chat.completions.create(
            model=job.fine_tuned_model, messages=[{"role": "user", "content": "hi"}]
        )
        assert server.engine.requests[-1].adapter == job.fine_tuned_model
        assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
        assert not (Path(command.folder) / "examples.msgpack").exists()
        assert client.models.delete(job.fine_tuned_model).deleted
        assert job.fine_tuned_model not in server.engine.adapters
        with pytest.raises(openai.NotFoundError):
            client.models.delete(job.fine_tuned_model)
    assert not (Path(command.folder) / ADAPTER).exists()


def test_a_model_and_its_job_belong_to_one_key(start_server, tmp_path: Path) -> None:
    server = start_server(api_keys=KEYS, files_dir=tmp_path / "files")
    with server.client("a-key") as alice, server.client("b-key") as bob:
        job = create(alice)
        until(lambda: server.engine.tunings)
        steps(server, job.id, 1, 6)
        succeed(server, job.id)
        until(lambda: status(alice, job.id) == "succeeded")
        name = alice.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        for call in (
            lambda: bob.fine_tuning.jobs.retrieve(job.id),
            lambda: bob.fine_tuning.jobs.cancel(job.id),
            lambda: bob.fine_tuning.jobs.pause(job.id),
            lambda: bob.fine_tuning.jobs.list_events(job.id),
            lambda: bob.fine_tuning.jobs.checkpoints.list(job.id),
            lambda: bob.models.retrieve(name),
            lambda: bob.models.delete(name),
            lambda: bob.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hi"}]
            ),
            lambda: bob.completions.create(model=f"{MODEL}:{name}", prompt="hi"),
            lambda: bob.fine_tuning.jobs.create(model=MODEL, training_file=job.training_file),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert not list(bob.fine_tuning.jobs.list())
        assert name not in [model.id for model in bob.models.list()]
        assert name in [model.id for model in alice.models.list()]
        alice.completions.create(model=f"{MODEL}:{name}", prompt="hi")


def test_jobs_run_one_at_a_time_and_keys_take_turns(start_server, tmp_path: Path) -> None:
    server = start_server(api_keys=KEYS, files_dir=tmp_path / "files")
    with server.client("a-key") as alice, server.client("b-key") as bob:
        first, second = create(alice), create(alice)
        other = create(bob)

        def fail(*jobs: Any) -> None:
            for job in jobs:
                until(lambda job=job: server.engine.tunings[-1:] and
                      server.engine.tunings[-1].job_id == job.id)  # fmt: skip
                report(server, job.id, "failed", error="no luck")

        fail(first, other, second)
        # A key that has had fewer turns so far has no more of them now.
        one, two = create(bob), create(bob)
        three, four = create(alice), create(alice)
        fail(one, three, two, four)
        until(lambda: status(alice, second.id) == "failed")
        failed = alice.fine_tuning.jobs.retrieve(second.id)
        assert (failed.error.code, failed.error.message) == ("training_failed", "no luck")
        assert failed.fine_tuned_model is None


def test_pause_resume_and_cancel(start_server, tmp_path: Path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        job = create(client)
        until(lambda: server.engine.tunings)
        steps(server, job.id, 1, 3)
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        assert server.engine.stopped_tunings == [job.id]
        with pytest.raises(openai.BadRequestError, match="The job is paused"):
            client.fine_tuning.jobs.pause(job.id)
        assert client.fine_tuning.jobs.resume(job.id).status == "queued"
        until(lambda: len(server.engine.tunings) == 2)
        steps(server, job.id, 3, 4)  # the third was not saved
        metrics = [
            event.data["step"]
            for event in client.fine_tuning.jobs.list_events(job.id, limit=100)
            if event.type == "metrics"
        ]
        assert metrics == [4, 3, 2, 1]
        state = Path(server.engine.tunings[0].folder) / STATE
        state.write_bytes(b"x")
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert not state.exists()
        state.write_bytes(b"x")  # by the engine, before it knew
        report(server, job.id, "stopped")
        assert not state.exists()
        report(server, job.id, "succeeded")
        assert status(client, job.id) == "cancelled"
        with pytest.raises(openai.BadRequestError, match="The job is cancelled"):
            client.fine_tuning.jobs.resume(job.id)


@pytest.mark.nightly
def test_another_process_continues_jobs_and_serves_models(start_server, tmp_path: Path) -> None:
    first = start_server(files_dir=tmp_path / "files")
    with first.client() as client:
        done = create(client)
        until(lambda: first.engine.tunings)
        steps(first, done.id, 1, 6)
        succeed(first, done.id)
        until(lambda: status(client, done.id) == "succeeded")
        name = client.fine_tuning.jobs.retrieve(done.id).fine_tuned_model
        running, waiting = create(client), create(client)
        until(lambda: len(first.engine.tunings) == 2)
        steps(first, running.id, 1, 3)
        until(lambda: status(client, waiting.id) in ("validating_files", "queued"))
    first.stop()
    again = start_server(files_dir=tmp_path / "files")
    with again.client() as client:
        until(lambda: again.engine.tunings)
        assert again.engine.tunings[0].job_id == running.id
        assert name in again.engine.adapters
        steps(again, running.id, 3, 6)
        succeed(again, running.id)
        until(lambda: status(client, running.id) == "succeeded")
        events = client.fine_tuning.jobs.list_events(running.id, limit=100)
        metrics = [event.data["step"] for event in events if event.type == "metrics"]
        assert metrics == [6, 5, 4, 3, 2, 1]
        until(lambda: again.engine.tunings[-1].job_id == waiting.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"validation_file": "file-x"}, "validation_file"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"suffix": "a b"}, "suffix"),
        ({"lora": {"rank": 129}}, "lora.rank"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, fields: dict[str, Any], param) -> None:
    with server.client() as client:
        body = {"model": MODEL, "training_file": upload(client), **fields}
    answer = server.post("/v1/fine_tuning/jobs", body)
    assert answer.status_code == 400, answer.text
    assert param in answer.json()["error"]["param"]


def test_wrong_files_and_models_are_refused(start_server, tmp_path: Path) -> None:
    server = start_server(files_dir=tmp_path / "files", finetune_jobs=1)
    path = "/v1/fine_tuning/jobs"
    with server.client() as client:
        file = upload(client)
        batch = client.files.create(file=("b", b"{}"), purpose="batch").id
        missing = server.post(path, {"model": MODEL, "training_file": "file-x"})
        assert missing.json()["error"]["code"] == "file_not_found"
        assert server.post(path, {"model": "x", "training_file": file}).status_code == 404
        wrong = server.post(path, {"model": MODEL, "training_file": batch})
        assert wrong.json()["error"]["param"] == "training_file"
        bad = create(client, [*ROWS, {"messages": [{"role": "user", "content": "x"}]}])
        until(lambda: status(client, bad.id) == "failed")
        error = client.fine_tuning.jobs.retrieve(bad.id).error
        assert error.code == "invalid_training_file" and error.param == "training_file"
        assert error.message.startswith("line 9: messages: no message of the assistant")
        create(client)
        with pytest.raises(openai.RateLimitError, match="At most 1 jobs"):
            create(client)


@pytest.mark.parametrize(
    "settings", [{"finetune": False}, {"tensor_parallel_size": 2}, {"load_format": "dummy"}]
)
def test_fine_tuning_can_be_turned_off(start_server, settings: dict[str, Any]) -> None:
    server = start_server(**settings)
    answer = server.http().get("/v1/fine_tuning/jobs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "finetune_disabled")


def test_a_job_is_refused_while_the_weights_cannot_be_read(start_server, tmp_path: Path) -> None:
    server = start_server(files_dir=tmp_path / "files")

    def fail(_: object) -> str:
        raise ConfigError("m: the weights cannot be read: Input/output error")

    weights = server.app.state.context.tunings.weights
    digest, weights._digest = weights._digest, fail
    with server.client() as client:
        body = {"model": MODEL, "training_file": upload(client)}
        refused = server.post("/v1/fine_tuning/jobs", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            503,
            "weights_unavailable",
        )
        assert client.fine_tuning.jobs.list().data == []
        weights._digest = digest
        assert server.post("/v1/fine_tuning/jobs", body).status_code == 200
