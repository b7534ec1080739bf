"""Settings: four sources, one precedence; limits of the machine."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.errors import ConfigError
from chunkllama.logger import configure_logging, init_logger, request_id_context
from chunkllama.resources import (
    default_kv_cache_memory,
    memory_left,
    memory_limit,
    usable_threads,
)
from chunkllama_server.commands import run
from chunkllama_server.config import extras
from chunkllama_server.config.effective import effective_values
from chunkllama_server.config.kinds import kind_of, show_value
from chunkllama_server.config.settings import Settings, load_settings
from chunkllama_server.process.launch import check_model


def _is_secret(field) -> bool:
    return "SecretStr" in str(field.annotation)


def test_precedence_and_origins(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "port: 1\nnum_chunks: 1\nthreads: 1\nstrict: true\ncors_origins: [https://a, 'null']\n"
    )
    environ = {"CHUNKLLAMA_PORT": "2", "CHUNKLLAMA_NUM_CHUNKS": "2"}
    loaded = load_settings({"port": "3"}, environ, file)
    settings = loaded.settings
    assert (settings.port, settings.num_chunks, settings.threads) == (3, 2, 1)
    assert settings.cors_origins == ("https://a", "null")
    assert settings.strict is True
    assert settings.chunk_size == 64
    origins = [loaded.origins[k] for k in ("port", "num_chunks", "threads", "chunk_size")]
    assert origins == ["command line", "environment", str(file), "default"]
    again = load_settings({}, {"CHUNKLLAMA_CONFIG": str(file)})
    assert again.settings.port == 1


def test_lists_sizes_and_flags_from_strings():
    environ = {
        "CHUNKLLAMA_SERVED_MODEL_NAME": "a, b",
        "CHUNKLLAMA_KV_CACHE_MEMORY": "1.5GiB",
        "CHUNKLLAMA_STRICT": "true",
        "CHUNKLLAMA_CHUNK_SIZE": "64",
    }
    settings = load_settings({}, environ).settings
    assert settings.served_model_name == ("a", "b")
    flags = {"served_model_name": ["a,b", "c"], "allowed_hosts": "x, y", "lora": ["m=/m,n=/n"]}
    given = load_settings(flags, {}).settings
    assert given.served_model_name == ("a", "b", "c")
    assert given.allowed_hosts == ("x", "y")
    assert given.adapter_folders == {"m": "/m", "n": "/n"}
    assert settings.kv_cache_memory == 3 << 29
    assert settings.strict is True
    assert settings.engine().cache.kv_cache_memory == 3 << 29
    assert [EngineConfig.from_flat(kv_cache_memory=v).cache.kv_cache_memory for v in (
        "2k", "2KiB", "3 MB", 7
    )] == [2000, 2048, 3_000_000, 7]  # fmt: skip


def test_a_kubernetes_service_of_our_name_changes_nothing():
    links = {
        "CHUNKLLAMA_PORT": "tcp://10.0.0.1:8000",
        "CHUNKLLAMA_SERVICE_HOST": "10.0.0.1",
        "CHUNKLLAMA_SERVICE_PORT": "8000",
        "CHUNKLLAMA_PORT_8000_TCP_ADDR": "10.0.0.1",
        "CHUNKLLAMA_METRICS_PORT": "tcp://10.0.0.2:9000",
        "CHUNKLLAMA_METRICS_SERVICE_HOST": "10.0.0.2",
        "CHUNKLLAMA_METRICS_SERVICE_PORT_HTTP": "9000",
        "CHUNKLLAMA_METRICS_PORT_9000_TCP": "tcp://10.0.0.2:9000",
    }
    assert load_settings({}, links).settings == load_settings({}, {}).settings


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"num_chunks": "x"}, {}, "num_chunks: .*'x' .from command line"),
        ({}, {"CHUNKLLAMA_DTYPE": "int4"}, "dtype: .*environment"),
        ({}, {"CHUNKLLAMA_NUMCHUNKS": "1"}, "unknown key numchunks.*did you mean num_chunks"),
        ({}, {"CHUNKLLAMA_QQQQQ": "1"}, "unknown key qqqqq in the environment"),
        ({"kv_cache_memory": "5i"}, {}, "kv_cache_memory: .*'5i'"),
        ({"kv_cache_memory": "9" * 400 + "g"}, {}, "kv_cache_memory: "),
        ({"ssl_keyfile": "x"}, {}, "ssl_certfile and ssl_keyfile must be given together"),
        ({"drain_seconds": "nan"}, {}, "drain_seconds: .*finite number.*'nan'"),
        ({"text_seconds": "inf"}, {}, "text_seconds: .*finite number.*'inf'"),
        ({"max_header_bytes": "2MiB"}, {}, "max_header_bytes: .*1048576 bytes, got 2097152"),
        ({"otlp_endpoint": "http://[::1"}, {}, "otlp_endpoint: write http://HOST:PORT"),
        ({"otlp_endpoint": "http://a:99999/"}, {}, "otlp_endpoint: write http://HOST:PORT"),
        ({"root_path": "/"}, {}, "root_path: .*'/'"),
        ({"root_path": "llm"}, {}, "root_path: .*'llm'"),
        ({"cors_origins": "a.example"}, {}, "cors_origins: write https://HOST.*'a.example'"),
        ({"cors_origins": "https://a/"}, {}, "cors_origins: write https://HOST.*'https://a/'"),
    ],
)
def test_refusals_are_one_line(flags, environ, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(flags, environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({"admin_host": "0.0.0.0"}, True),
        ({"admin_host": "0.0.0.0", "admin_port": "1"}, False),
        ({"cache_tier_bytes": "1GiB"}, True),
        ({"pack_public_key": "PEM"}, False),  # pack verify uses it, too
        ({}, False),
    ],
)
def test_a_setting_without_effect_is_named(flags, warned, caplog):
    load_settings(flags, {})
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if "(from command line) has no effect without" in line]
    assert len(said) == warned


def test_a_file_of_settings_is_text_of_a_sensible_size(tmp_path):
    with pytest.raises(ConfigError, match="config: /dev/zero is larger than 16 MiB"):
        load_settings({}, {}, Path("/dev/zero"))
    file = tmp_path / "keys"
    file.write_bytes("\ufeffblue:key-1\r\nred:key-2\r\n".encode())
    settings = load_settings({"api_key_file": str(file)}, {}).settings
    assert settings.keys_by_tenant() == {"blue": "key-1", "red": "key-2"}


def test_values_are_shown_with_their_unit():
    shown = {
        key: show_value(
            Settings.model_fields[key].default, kind_of(key, Settings.model_fields[key])
        )
        for key in ("cache_tier_bytes", "max_header_bytes", "strict", "drain_seconds", "packs")
    }
    assert shown == {
        "cache_tier_bytes": "10GiB",
        "max_header_bytes": "32KiB",
        "strict": "false",
        "drain_seconds": "30.0",
        "packs": "-",
    }
    kinds = {key: kind_of(key, field) for key, field in Settings.model_fields.items()}
    assert {key for key, kind in kinds.items() if kind == "folder"} == {
        *("cache_tier_dir", "files_dir", "packs", "snapshot_dir")
    }
    assert kinds["max_tenant_slowdown"] == kinds["min_body_rate"] == "number"
    assert kinds["keep_alive_seconds"] == "seconds"


def test_api_keys_from_flags_and_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# tenants\nblue:key-1\n\n  red:key-2\n")
    flags = {"api_key": ["key-3"], "api_key_file": str(file)}
    settings = load_settings(flags, {}).settings
    keys = settings.keys_by_tenant()
    assert [keys["blue"], keys["red"]] == ["key-1", "key-2"]
    (nameless,) = set(keys) - {"blue", "red"}
    assert keys[nameless] == "key-3" and re.fullmatch("key-[0-9a-f]{8}", nameless)
    alone = load_settings({"api_key": ["key-3"]}, {}).settings
    assert list(alone.keys_by_tenant()) == [nameless], "its name does not depend on other keys"
    assert "key-3" not in repr(settings)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_settings({"api_key_file": str(file)}, {}).settings.keys_by_tenant()
    with pytest.raises(ConfigError, match="not of the form"):
        load_settings({"api_key": ["name:"]}, {}).settings.keys_by_tenant()


def test_every_key_has_a_default_and_a_description():
    for key, field in Settings.model_fields.items():
        assert not field.is_required(), key
        assert field.description and field.description.endswith("."), key


def test_engine_settings_refuse_unknown_keys():
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        EngineConfig.from_flat(max_num_seq=3)
    config = EngineConfig.from_flat(num_chunks=3, seed=1)
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config


FORMER = [("op_set", "backend", "reference"), ("weights", "quantization", "int8")]


@pytest.mark.parametrize(("former", "key", "value"), FORMER)
def test_a_former_key_is_accepted_with_one_warning(tmp_path, caplog, former, key, value):
    file = tmp_path / "server.yaml"
    file.write_text(f"{former}: {value}\n")
    sources = {
        "command line": ({former: value}, {}, None),
        "environment": ({}, {f"CHUNKLLAMA_{former.upper()}": value}, None),
        str(file): ({}, {}, file),
    }
    for origin, source in sources.items():
        caplog.clear()
        loaded = load_settings(*source)
        assert getattr(loaded.settings.engine().model, key) == value
        assert loaded.origins[key] == origin
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"{former} in " in record.message and record.message.endswith(f"use {key}")
        assert origin in record.message


@pytest.mark.parametrize(("former", "key", "value"), FORMER)
def test_a_former_key_keeps_its_source_and_stands_alone(tmp_path, former, key, value):
    """Precedence goes by source, whichever name a source uses; one source uses one name."""
    file = tmp_path / "server.yaml"
    file.write_text(f"{key}: auto\n")
    assert getattr(load_settings({former: value}, {}, file).settings, key) == value
    file.write_text(f"{former}: {value}\n")
    assert getattr(load_settings({key: "auto"}, {}, file).settings, key) == "auto"
    with pytest.raises(ConfigError, match=f"{former} in the command line .*{key} only"):
        load_settings({former: value, key: value}, {})
    with pytest.raises(ConfigError, match=f"^{key}: "):
        load_settings({former: "nonsense"}, {})


@pytest.mark.parametrize(("former", "key", "value"), FORMER)
def test_a_former_key_of_an_engine(caplog, former, key, value):
    assert getattr(EngineConfig.from_flat(**{former: value}).model, key) == value
    (record,) = caplog.records
    assert record.message == f"{former} is a former name and will be removed; use {key}"


@pytest.mark.parametrize(("former", "key", "value"), FORMER)
def test_a_former_flag_works_and_is_not_listed(capsys, former, key, value):
    flag = f"--{former.replace('_', '-')}"
    assert run(["config", "show", flag, value]) == 0
    shown = {line.split()[1]: line.split()[3] for line in capsys.readouterr().out.splitlines()
             if line.startswith("\u2502")}  # fmt: skip
    assert shown[key] == value
    assert run(["serve", "--help"]) == 0
    listed = capsys.readouterr().out
    assert f"--{key}" in listed and f"{flag} " not in listed


def _machine(root: Path, files: dict[str, str]) -> Path:
    meminfo = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapTotal: 1048576 kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "threads", "left", "limit"),
    [
        ({}, None, 8 << 30, 17 << 30),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"},
            None,
            8 << 30,
            17 << 30,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/memory.max": str(2 << 30),
                "sys/fs/cgroup/a/b/memory.current": str(1 << 30),
                "sys/fs/cgroup/a/b/memory.stat": f"anon 5\ninactive_file {1 << 29}\n",
                "sys/fs/cgroup/a/memory.max": "max",
            },
            1,
            3 << 29,
            2 << 30,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/d\n3:cpu,cpuacct:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/d/memory.limit_in_bytes": str(1 << 30),
                "sys/fs/cgroup/memory/d/memory.usage_in_bytes": str(1 << 29),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
            },
            1,
            1 << 29,
            1 << 30,
        ),
    ],
)
def test_limits_come_from_the_control_group(files, threads, left, limit, tmp_path):
    root = _machine(tmp_path, files)
    if threads is not None:
        assert usable_threads(root) == threads
    assert usable_threads(root) >= 1
    assert memory_left(root) == left
    assert memory_limit(root) == limit


def test_default_pool_is_a_quarter_of_what_is_left():
    assert default_kv_cache_memory(1 << 30, useful=1 << 40) == 1 << 28
    assert default_kv_cache_memory(1 << 40, useful=1 << 40) == 1 << 38
    assert default_kv_cache_memory(1 << 40, useful=1 << 30) == 1 << 30


LOGGERS = ("", "chunkllama")


@pytest.fixture
def log():
    stream = io.StringIO()
    before = [(each, each.handlers, each.level) for each in map(logging.getLogger, LOGGERS)]
    yield stream
    logging.captureWarnings(False)
    for each, handlers, level in before:
        each.handlers = handlers
        each.setLevel(level)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_record_is_one_line_whatever_is_in_it(log, log_format):
    configure_logging("info", log_format, log)
    logger = init_logger("server.somewhere")
    hostile = "a\r\nfake\x1b[31m\u2028\x85\x9b"
    token = request_id_context.set("req-7")
    logger.info("said %s", hostile, extra={"ms": 3, "path": hostile})
    request_id_context.reset(token)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed")
    logger.debug("not at this level")
    logging.getLogger("some.library").error("failed\n%s", hostile)
    logging.getLogger("some.library").info("of no interest")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3
    assert all(32 <= ord(char) < 127 for line in lines for char in line)
    assert "req-7" in lines[0] and "req-7" not in lines[1]
    assert "Traceback" in lines[1]
    assert "some.library" in lines[2]
    if log_format == "json":
        record = json.loads(lines[0])
        assert record["message"] == f"said {hostile}"
        assert (record["ms"], record["request_id"], record["level"]) == (3, "req-7", "info")
        assert record["logger"] == "chunkllama.server.somewhere"


@pytest.mark.parametrize(
    ("setting", "value", "extra"),
    [
        ("otlp_endpoint", "http://127.0.0.1:4318/v1/traces", "otel"),
        ("kv_events_endpoint", "tcp://127.0.0.1:5557", "kv-events"),
        ("response_store", "valkey://127.0.0.1", "valkey"),
    ],
)
def test_a_missing_package_is_named_by_its_extra(setting, value, extra, monkeypatch):
    settings = load_settings({setting: value}, {}).settings
    monkeypatch.setattr(extras, "find_spec", lambda module: object())
    extras.check_extras(settings)

    def find(module: str) -> None:
        if "." in module:
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(extras, "find_spec", find)
    with pytest.raises(ConfigError, match=rf"^{setting}: .*pip install 'chunkllama\[{extra}\]'"):
        extras.check_extras(settings)


@pytest.mark.parametrize("key", [k for k, f in Settings.model_fields.items() if _is_secret(f)])
def test_a_refused_secret_is_not_shown(key):
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        load_settings({key: {"canary": "canary"}}, {})
    assert "canary" not in str(caught.value)
    if key == "response_store":
        for url in ("mysql://:canary@host", "unix://canary", "canary", "unix:///"):
            with pytest.raises(ConfigError, match=r"^response_store: write valkey://") as caught:
                load_settings({key: url}, {})
            assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("valkey://:p@host:1/0", "valkeys://host", "REDIS://host", "rediss://host?db=1"),
        *("valkey:///0", "valkey://", "unix:///run/valkey.sock", "unix:/run/valkey.sock"),
    ],
)
def test_a_response_store_is_what_its_client_reads(url):
    store = load_settings({"response_store": url}, {}).settings.response_store
    assert store.get_secret_value() == url


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"threads": 100_000}, "threads: 100000 are more than the"),
        ({"cpu_bind": "99999"}, "cpu_bind: this process may not run on processor 99999"),
        ({"kv_cache_memory": "900TiB"}, "kv_cache_memory: the pool takes"),
    ],
)
def test_a_clusters_replicas_check_what_depends_on_their_machine(tiny_model, flags, message):
    values = {"cluster": "auto", "model": str(tiny_model), "device": "cpu", **flags}
    settings = load_settings(values, {}).settings
    assert check_model(settings.engine(), is_served_here=False)[0] == tiny_model
    with pytest.raises(ConfigError, match=message):
        check_model(settings.engine(), is_served_here=True)
    shown, note = effective_values(settings)
    assert "threads" not in shown and note.startswith("cluster: ")
    with pytest.raises(ConfigError, match=message):
        build_engine(settings.engine())  # what a replica does
