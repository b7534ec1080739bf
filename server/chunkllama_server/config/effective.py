"""What automatic settings become on this machine, for ``chunkllama config show``. No torch."""

from __future__ import annotations

import shutil

from chunkllama.backends.choice import NATIVE_CHUNK_SIZES
from chunkllama.backends.cpu.build import available_levels, find_compiler, is_built
from chunkllama.config import EngineConfig
from chunkllama.engine.size import EngineSize, may_have_gpu, plan_size
from chunkllama.engine.step_size import choose_step_tokens
from chunkllama.errors import ConfigError
from chunkllama.models.loading.hub import local_model
from chunkllama.resources import usable_threads
from chunkllama_server.config.kinds import kind_of, show_value
from chunkllama_server.config.settings import Settings


def effective_values(settings: Settings) -> tuple[dict[str, str], str]:
    """Return values by key, where they differ from the setting's own, and what is not known.

    Downloads, converts and starts nothing. Where there may be a GPU, only a start finds what
    depends on the device; of a cluster, only its replicas.
    """
    config = settings.engine()
    has_keys = bool(settings.api_key or settings.api_key_file)
    values: dict[str, object] = {
        "served_model_name": ", ".join(settings.model_names),
        "threads": config.model.threads or usable_threads(),
        "isolation": settings.isolation or ("tenant" if has_keys else "off"),
        "max_peer_connections": settings.max_peer_connections or settings.max_connections * 3 // 4,
        "files_dir": settings.files_folder,
        "batch_requests": settings.max_batch_lines(settings.max_num_seqs),
    }
    note = ""
    if settings.cluster is not None:
        note = "cluster: values that depend on a machine are those of each replica's"
        del values["threads"]
    elif config.model.device != "cpu" and may_have_gpu():
        note = "device: there may be a GPU; a start tells which values depend on it"
    else:
        try:
            folder, draft = local_model(config.model.model), config.scheduler.draft_model
            if folder is None or (draft is not None and local_model(draft) is None):
                note = "model: not on this machine yet; values that depend on it are not shown"
                values |= {"device": "cpu"}
            else:
                values |= _of_the_engine(config, plan_size(config, folder))
        except ConfigError as error:
            note = str(error)
    kinds = {key: kind_of(key, Settings.model_fields[key]) for key in values}
    shown = {key: show_value(value, kinds[key]) for key, value in values.items()}
    given = {key: show_value(getattr(settings, key), kinds[key]) for key in values}
    return {key: text for key, text in shown.items() if text != given[key]}, note


def _of_the_engine(config: EngineConfig, size: EngineSize) -> dict[str, object]:
    backend = _backend(config, size)
    levels = available_levels()
    automatic = config.model.isa_level == "auto"
    level = levels[0].name if automatic else config.model.isa_level
    return {
        "device": size.device,
        "dtype": size.dtype,
        "kv_dtype": size.kv_dtype,
        "backend": backend,
        **({"isa_level": level} if backend == "cpu" else {}),
        "max_model_len": size.max_model_len,
        "max_num_batched_tokens": choose_step_tokens(
            config,
            size.spec,
            size.device,
            level if backend == "cpu" else "",
            config.model.threads or usable_threads(),
        ),
        "num_chunks": size.num_chunks,
        "kv_cache_memory": size.pool_bytes,
    }


def _backend(config: EngineConfig, size: EngineSize) -> str:
    """The backend that a start chooses for "auto" on a CPU."""
    if config.model.backend != "auto":
        return config.model.backend
    if config.cache.chunk_size not in NATIVE_CHUNK_SIZES:
        return "reference"
    is_there = any(is_built(level) for level in available_levels())
    return "cpu" if is_there or shutil.which(find_compiler()[0]) else "reference"
