"""Serve /v1/fine_tuning/jobs: jobs that train adapters beside serving."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request

from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.tuning_messages import BASE_LEARNING_RATE, TuningOptions
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.paging import page_of
from chunkllama_server.api.openapi import answers, refusals
from chunkllama_server.api.schema.tuning import (
    Checkpoint,
    CheckpointList,
    ChosenHyperparameters,
    DeletedModel,
    EventList,
    FineTuningJob,
    FineTuningRequest,
    Hyperparameters,
    JobList,
    LoraOptions,
)
from chunkllama_server.api.tuning.examples import StoppedError
from chunkllama_server.api.tuning.jobs import Job
from chunkllama_server.api.tuning.runner import TuningRunner
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.errors import (
    ApiError,
    exceeded,
    invalid,
    not_found_model,
    storage_full,
    unavailable,
)
from chunkllama_server.transport.request_context import request_info

logger = init_logger(__name__)

router = APIRouter(route_class=JsonRoute, tags=["fine-tuning"])

_GET = refusals(400, 401, 404, 405, 503)
_POST = answers(FineTuningJob)
_PATH = "/v1/fine_tuning/jobs"
Limit = Annotated[int, Query(ge=1, le=100)]


async def _runner(context: ServerContext) -> TuningRunner:
    """The runner of this server, with its jobs read.

    Raises:
        ApiError: 404 where fine-tuning is turned off, 503 where the folder cannot be used.
    """
    runner = context.tunings
    if runner is None or context.batches is None:
        raise ApiError(
            404,
            "Fine-tuning is turned off on this server; it needs the settings finetune and batches, "
            "tensor_parallel_size 1, no cluster and a load_format other than dummy",
            code="finetune_disabled",
        )
    await context.batches.open()
    await runner.open()
    return runner


async def _job(context: ServerContext, request: Request, job_id: str) -> tuple[TuningRunner, Job]:
    """A job of the caller's key. Nothing is awaited behind it: the job's status may change then."""
    runner = await _runner(context)
    found = runner.jobs.get(job_id, request_info(request.scope).tenant)
    if found is None:
        raise ApiError(
            404, f"There is no job {job_id[:100]!r}", "fine_tuning_job_id", "job_not_found"
        )
    return runner, found


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Answer 503 where a job cannot be written."""
    try:
        yield
    except OSError as error:
        logger.error("files_dir: a fine-tuning job cannot be stored: %s", error)
        raise storage_full(error) or unavailable(
            "Jobs cannot be stored on this server", "files_unavailable"
        ) from None


def _chosen(body: FineTuningRequest) -> ChosenHyperparameters:
    own = body.method.supervised if body.method is not None else None
    given = (own and own.hyperparameters) or body.hyperparameters or Hyperparameters()
    rate = given.learning_rate_multiplier
    return {
        "n_epochs": 3 if given.n_epochs == "auto" else given.n_epochs,
        "batch_size": 4 if given.batch_size == "auto" else given.batch_size,
        "learning_rate_multiplier": 1.0 if rate == "auto" else rate,
    }


@router.post(_PATH, responses=_POST)
async def create_job(body: FineTuningRequest, request: Request, context: Context) -> FineTuningJob:
    """Train an adapter from an uploaded file of conversations."""
    info = await context.admit(body, request)
    if info.adapter:
        raise invalid("An adapter cannot be trained further; name the model", "model")
    runner = await _runner(context)
    try:
        await runner.weights.identify()
    except (ConfigError, StoppedError) as error:
        logger.error("fine-tuning: %s", str(error) or "the server ends")
        raise unavailable("The model's weights cannot be read", "weights_unavailable") from None
    store = runner.store
    store.expire()
    stored = store.files.get(body.training_file, info.tenant)
    if stored is None:
        raise ApiError(
            404, f"No file {body.training_file!r} is stored", "training_file", "file_not_found"
        )
    if stored.value["purpose"] != "fine-tune":
        raise invalid("The file's purpose is not fine-tune", "training_file")
    active = [job for job in runner.jobs.of(info.tenant) if not job.has_ended]
    if len(active) >= context.settings.finetune_jobs:
        raise exceeded(context.settings, "finetune_jobs", None)
    if store.room(info.tenant) <= 0:
        raise ApiError(
            413, "The files of this API key take all its room; delete some", None, "file_budget"
        )
    chosen, lora, seed = _chosen(body), body.lora or LoraOptions(), body.seed or 0
    options = TuningOptions(
        n_epochs=chosen["n_epochs"],
        batch_size=chosen["batch_size"],
        learning_rate=BASE_LEARNING_RATE * chosen["learning_rate_multiplier"],
        seed=seed,
        rank=lora.rank,
        alpha=lora.alpha,
    )
    value: FineTuningJob = {
        "id": f"ftjob-{uuid.uuid4().hex[:24]}",
        "object": "fine_tuning.job",
        "created_at": store.now(),
        "finished_at": None,
        "estimated_finish": None,
        "model": body.model,
        "fine_tuned_model": None,
        "organization_id": info.tenant,
        "status": "validating_files",
        "hyperparameters": chosen,
        "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
        "training_file": body.training_file,
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "error": None,
        "seed": seed,
        "user_provided_suffix": body.suffix,
        "integrations": [],
        "metadata": body.metadata,
    }
    with _storing():
        return runner.add(info.tenant, value, options).value


@router.get(_PATH, responses=_GET)
async def list_jobs(
    request: Request, context: Context, limit: Limit = 20, after: str | None = None
) -> JobList:
    """List the key's jobs, newest first."""
    jobs = (await _runner(context)).jobs.of(request_info(request.scope).tenant)
    page, has_more = page_of(jobs, limit, after, lambda job: job.id)
    return {"object": "list", "data": [job.value for job in page], "has_more": has_more}


@router.get(f"{_PATH}/{{job_id}}", responses=_GET)
async def get_job(job_id: str, request: Request, context: Context) -> FineTuningJob:
    """Describe a job."""
    _, job = await _job(context, request, job_id)
    return job.value


@router.get(f"{_PATH}/{{job_id}}/events", responses=_GET)
async def list_events(
    job_id: str, request: Request, context: Context, limit: Limit = 20, after: str | None = None
) -> EventList:
    """List what has happened to a job, newest first: each step with its loss."""
    runner, job = await _job(context, request, job_id)
    events = (await runner.store.work(runner.jobs.events, job))[::-1]
    page, has_more = page_of(events, limit, after, lambda event: event["id"])
    return {"object": "list", "data": [*page], "has_more": has_more}


@router.get(f"{_PATH}/{{job_id}}/checkpoints", responses=_GET)
async def list_checkpoints(
    job_id: str, request: Request, context: Context, limit: Limit = 10, after: str | None = None
) -> CheckpointList:
    """List the models of a job that can be requested: the one at its end."""
    runner, job = await _job(context, request, job_id)
    checkpoints: list[Checkpoint] = []
    name = job.model
    events = await runner.store.work(runner.jobs.events, job)
    steps = [each["data"] for each in events if each["data"] is not None]
    if name is not None and steps:
        last = steps[-1]
        checkpoints.append(
            {
                "id": f"ftckpt-{job.id.removeprefix('ftjob-')}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": job.value["finished_at"] or job.value["created_at"],
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job.id,
                "metrics": {
                    "step": last["step"],
                    "train_loss": last["train_loss"],
                    "train_mean_token_accuracy": last["train_mean_token_accuracy"],
                },
                "step_number": last["step"],
            }
        )
    page, has_more = page_of(checkpoints, limit, after, lambda each: each["id"])
    return {
        "object": "list",
        "data": [*page],
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": has_more,
    }


@router.post(f"{_PATH}/{{job_id}}/cancel", responses=_POST)
async def cancel_job(job_id: str, request: Request, context: Context) -> FineTuningJob:
    """End a job; it makes no model."""
    runner, job = await _job(context, request, job_id)
    _check(job, "validating_files", "queued", "running", "paused")
    with _storing():
        runner.cancel(job)
    return job.value


@router.post(f"{_PATH}/{{job_id}}/pause", responses=_POST)
async def pause_job(job_id: str, request: Request, context: Context) -> FineTuningJob:
    """Stop a job until it is resumed; its saved steps stay."""
    runner, job = await _job(context, request, job_id)
    _check(job, "validating_files", "queued", "running")
    with _storing():
        runner.pause(job)
    return job.value


@router.post(f"{_PATH}/{{job_id}}/resume", responses=_POST)
async def resume_job(job_id: str, request: Request, context: Context) -> FineTuningJob:
    """Continue a paused job."""
    runner, job = await _job(context, request, job_id)
    _check(job, "paused")
    with _storing():
        runner.unpause(job)
    return job.value


def _check(job: Job, *statuses: str) -> None:
    if job.value["status"] not in statuses:
        raise invalid(
            f"The job is {job.value['status']}; that needs one that is {' or '.join(statuses)}",
            "fine_tuning_job_id",
            "job_status",
        )


@router.delete("/v1/models/{model:path}", responses={**_GET, **refusals(409)})
async def delete_model(model: str, request: Request, context: Context) -> DeletedModel:
    """Delete a model that a job of this key has made."""
    runner = await _runner(context)
    job = runner.jobs.made_by(model, request_info(request.scope).tenant)
    if job is None:
        raise not_found_model(model)
    try:
        with _storing():
            await runner.delete(job)
    except InvalidRequestError as error:
        raise ApiError(409, error.message, "model", "adapter_in_use") from None
    except EngineDeadError:
        raise unavailable("The engine is being restarted", "engine_unavailable") from None
    return {"id": model, "object": "model", "deleted": True}
