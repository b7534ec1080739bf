"""Quotas of tenants: the YAML file, the fields of the key file, and their errors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from chunkllama.errors import ConfigError
from chunkllama.tenant_limits import TenantLimits
from chunkllama_server.config.files import load_yaml
from chunkllama_server.config.settings import Settings
from chunkllama_server.config.tenants import TenantQuotas, engine_message, load_quotas

EXAMPLE = Path(__file__).parents[2] / "configs" / "tenants.yaml"


def load(
    tmp_path: Path, text: str, keys: str = "alice:ka\nbob:kb\n", **settings: object
) -> dict[str, TenantQuotas]:
    (tmp_path / "keys.txt").write_text(keys)
    (tmp_path / "tenants.yaml").write_text(text)
    return load_quotas(
        Settings(
            api_key_file=tmp_path / "keys.txt",
            tenants_file=tmp_path / "tenants.yaml",
            served_model_name=("m", "n"),
            **settings,
        )
    )


def test_every_field_is_read(tmp_path: Path) -> None:
    fields = {
        "weight": 4.0,
        "max_concurrent_requests": 8,
        "max_queued_requests": 0,
        "queue_share": 0.5,
        "requests_per_minute": 60,
        "tokens_per_minute": 1000,
        "pin_chunks": 0,
        "chunk_share": 0.5,
        "chunk_floor": 0.25,
        "stored_responses": 3,
        "file_bytes": 0,
        "tokenizer_share": 0.1,
        "highest_priority": -3,
        "allowed_models": ("m",),
    }
    assert set(fields) == set(TenantQuotas.model_fields)
    listed = [f"    {k}: {list(v) if isinstance(v, tuple) else v}" for k, v in fields.items()]
    quotas = load(tmp_path, "\n".join(["tenants:", "  alice:", *listed]))
    assert quotas == {"alice": TenantQuotas(**fields), "bob": TenantQuotas()}
    words = " ".join(f"{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in fields.items())
    assert load(tmp_path, "", f"alice:ka {words}\nbob:kb\n") == quotas
    limits = engine_message(quotas).tenants["alice"]
    assert all(getattr(limits, name) == fields[name] for name in TenantLimits.__struct_fields__)


def test_defaults_hold_for_every_tenant_that_does_not_say_otherwise(tmp_path: Path) -> None:
    text = "defaults: {requests_per_minute: 9, weight: 2}\ntenants: {alice: {weight: 3}, bob: }\n"
    quotas = load(tmp_path, text, "alice:ka\nbob:kb requests_per_minute=5\ncarol:kc\n")
    assert [(q.requests_per_minute, q.weight) for q in quotas.values()] == [(9, 3), (5, 2), (9, 2)]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("x: {a: &a {<<: {mm: 1}, mm: 2}}\ny: {<<: *a}", {"x": {"a": {"mm": 2}}, "y": {"mm": 2}}),
        ("x: &a {mm: 1}\ny: &b {<<: *a, mm: 2}\nz: {<<: [*b, *a]}",
         {"x": {"mm": 1}, "y": {"mm": 2}, "z": {"mm": 2}}),
        ("x: &a {mm: 1}\ny: *a", {"x": {"mm": 1}, "y": {"mm": 1}}),
        ("{1: a, '1': b}", {1: "a", "1": "b"}),
    ],
)  # fmt: skip
def test_anchors_and_merge_keys_repeat_no_key(tmp_path: Path, text: str, held: object) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    assert load_yaml(path, "config") == held


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tenants: {alice: {weigth: 2}}", "tenant alice: unknown field weigth; did you mean weigh"),
        ("defaults: {weigth: 2}", "defaults: unknown field weigth; did you mean weight?"),
        ("tenant: {alice: {weight: 2}}", "unknown key tenant; write defaults: or tenants:"),
        ("tenants: {alice: {weight: 0}}", "tenant alice: weight: "),
        ("tenants: {alice: {weight: many}}", "tenant alice: weight: "),
        ("tenants: {alice: {weight: .nan}}", "tenant alice: weight: "),
        ("tenants: {alice: {weight: .inf}}", "tenant alice: weight: "),
        ("tenants: {alice: {requests_per_minute: yes}}", "alice: requests_per_minute: a number is"),
        ("tenants: {alice: {requests_per_minute: 0}}", "tenant alice: requests_per_minute: "),
        ("tenants: {alice: {requests_per_minute: 1.5}}", "tenant alice: requests_per_minute: "),
        ("tenants: {alice: {tokens_per_minute: -1}}", "tenant alice: tokens_per_minute: "),
        ("tenants: {alice: {max_concurrent_requests: 0}}", "alice: max_concurrent_requests: "),
        ("tenants: {alice: {queue_share: 1.1}}", "tenant alice: queue_share: "),
        ("tenants: {alice: {chunk_share: 0}}", "tenant alice: chunk_share: "),
        ("tenants: {alice: {tokenizer_share: -1}}", "tenant alice: tokenizer_share: "),
        ("tenants: {alice: {tokenizer_share: 1e-320}}", "tenant alice: tokenizer_share: "),
        ("tenants: {alice: {pin_chunks: -1}}", "tenant alice: pin_chunks: "),
        ("tenants: {alice: {stored_responses: [1]}}", "tenant alice: stored_responses: "),
        ("tenants: {alice: {highest_priority: -2000}}", "tenant alice: highest_priority: "),
        ("tenants: {alice: {allowed_models: []}}", "tenant alice: allowed_models: "),
        ("tenants: {alice: {allowed_models: [m, x]}}", "alice: allowed_models: x is not served; "),
        ("tenants: {alice: {chunk_share: 0.2, chunk_floor: 0.3}}", "tenant alice: chunk_floor: "),
        ("defaults: {chunk_floor: 0.6}", "chunk_floor: the floors of all tenants add up to 1.2"),
        ("tenants: {alice: {weight: 1}, alice: {weight: 2}}", "alice occurs twice at line 1"),
        ("tenants:\n  alice:\n    weight: 1\n    weight: 2\n", "weight occurs twice at line 4"),
        ("x: &a {m: 1}\ntenants: {alice: {<<: *a, m: 2, m: 3}}", "m occurs twice at line 2"),
        ("tenants: [alice]", "tenants: must hold key: value lines"),
        ("tenants: {alice: 3}", "tenant alice: must hold key: value lines"),
        ("tenants: {3: {weight: 1}}", "tenants: 3 is not text; put it in quotes"),
        ("- 3", "must hold key: value lines"),
        ("{", "at line"),
    ],
)
def test_an_error_names_file_tenant_and_field(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"tenants_file: {tmp_path}/tenants.yaml: ")
    assert told in message and "\n" not in message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("alice:ka weigth=2", "tenant alice: unknown field weigth; did you mean weight?"),
        ("alice:ka weight=x", "tenant alice: weight: "),
        ("alice:ka secret part", "(alice): after the key, write field=value"),
        ("alice:ka weight=1 weight=2", "(alice): after the key, write field=value, each field"),
        ("alice: weight=1", "is not of the form name:key"),
        ("alice:k\0secret", "entry 1: name:key has characters that cannot be printed; leave them"),
        ("al\x1bice:secret", "entry 1: name:key has characters that cannot be printed; leave"),
        ("alice:secret" + "k" * 4090, "entry 1: name:key has 4102 characters; use at most 4096"),
        ("other:ka", "other names the sum of small tenants in /metrics"),
    ],
)
def test_an_error_of_the_key_file_shows_no_key(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "keys.txt").write_text(f"{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_quotas(Settings(api_key_file=tmp_path / "keys.txt"))
    assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("secret\0", "entry 2 has characters that cannot be printed; leave them out"),
        ("secret" + "k" * 4091, "entry 2 has 4097 characters; use at most 4096"),
    ],
)
def test_an_operator_key_that_no_client_can_send_is_refused(key: str, told: str) -> None:
    settings = Settings(api_key=("a:k",), operator_key=("fine", key))
    with pytest.raises(ConfigError, match=f"^operator_key: {told}$"):
        settings.keys_by_tenant()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("1" + ":00" * 300 + ".0", "a number of 903 characters (write at most 100)"),
        ("1" * 101, "a number of 101 characters (write at most 100)"),
        ("!!int ''", "a value that is no int (put a text in quotes)"),
        ("!!float ''", "a value that is no float (put a text in quotes)"),
        ("!!bool x", "a value that is no bool (put a text in quotes)"),
        ("!!timestamp x", "a value that is no timestamp (put a text in quotes)"),
        ("2000-99-99", "a value that is no timestamp (put a text in quotes)"),
        ("0x_", "a value that is no int (put a text in quotes)"),
    ],
)
@pytest.mark.parametrize("form", ["- 1\n- {}\n", "a: b\n{}: c\n", "a:\n  b: {}\n"])
def test_a_bad_value_is_one_line(tmp_path: Path, value: str, told: str, form: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(form.format(value))
    with pytest.raises(ConfigError) as caught:
        load_yaml(path, "config")
    assert str(caught.value) == f"config: {path}: {told} at line 2"


@pytest.mark.parametrize(
    "text", ['"\\UFFFFFFFF"', '"\\U00110000"', "%YAML " + "9" * 5000, "!!set x"]
)
def test_a_file_that_the_parser_fails_at_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^config: \S+: not valid YAML[^\n]*$"):
        load_yaml(path, "config")


def test_a_quota_has_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tenant alice: weight is set with its key, too"):
        load(tmp_path, "tenants: {alice: {weight: 2}}", "alice:ka weight=2\n")
    with pytest.raises(ConfigError, match=r"tenant alice: weight: is in tenant_weights, too"):
        load(tmp_path, "tenants: {alice: {weight: 2}}", tenant_weights="alice=3")


def test_a_file_needs_keys_and_has_to_be_readable(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text("")
    with pytest.raises(ConfigError, match="tenants_file: needs api_key"):
        load_quotas(Settings(tenants_file=tmp_path / "tenants.yaml"))
    for name, content in (("missing", None), ("latin", b"\xe9")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"tenants_file: cannot read .*{name}: "):
            load_quotas(Settings(api_key=("a:k",), tenants_file=tmp_path / name))


def test_the_example_is_valid() -> None:
    keys = ("research:k1", "product:k2", "trial:k3")
    settings = Settings(
        api_key=keys, tenants_file=EXAMPLE, served_model_name=("smollm2-135m-instruct",)
    )
    quotas = load_quotas(settings)
    assert quotas["product"].weight == 4 and quotas["trial"].requests_per_minute == 20
    used = {name for each in quotas.values() for name in each.model_dump(exclude_none=True)}
    assert used == set(TenantQuotas.model_fields), "the example shows every field"


def test_quotas_of_a_tenant_without_a_key_are_a_warning(tmp_path: Path, caplog) -> None:
    """So that removing a key from one file alone revokes it."""
    caplog.set_level(logging.WARNING, logger="chunkllama")
    text = "tenants: {alise: {weight: 2}, alice: {weight: 3}}"
    quotas = load(tmp_path, text, "alice:ka\n")
    assert quotas == {"alice": TenantQuotas(weight=3)}
    assert "tenant alise: not used, it has no API key; did you mean alice?" in caplog.text


def test_of_many_tenants_without_a_key_a_few_are_named(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="chunkllama")
    names = [f"old{i}" for i in range(9)]
    text = f"tenants: {{{', '.join(f'{name}: {{}}' for name in names)}}}"
    load(tmp_path, text, "alice:ka\n")
    assert [name for name in names if f"tenant {name}: not used" in caplog.text] == names[:5]
    assert "tenants.yaml: 4 more tenants have no API key" in caplog.text
