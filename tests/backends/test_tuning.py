"""Numbers of the CPU backend: shipped, measured, written and read again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from chunkllama.backends.cpu import tune, tuning
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.build import library_directory
from chunkllama.backends.cpu.tuning import FewRows, PackingNumbers, Tuning
from chunkllama.errors import ConfigError
from chunkllama_server.commands import run

FOUND = Tuning(3, FewRows(int8=1, int4=12, int4_float=6), PackingNumbers(96, 4, 2, False, 1))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder; the libraries stay where they are."""
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(library_directory()))
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path))
    return tmp_path


def backend() -> CpuBackend:
    return CpuBackend(dtype=torch.bfloat16, head_dim=64, num_kv_heads=1)


def test_what_is_written_is_what_the_backend_reads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chunkllama"):
        level = backend().level
        assert backend().tuning == tuning.shipped_tuning()
        assert "tune" not in caplog.text
        path = tuning.save_tuning(FOUND, level, 2)
        ops = backend()
    assert ops.tuning == FOUND
    assert caplog.text.count("chunkllama tune") == 1 and str(path) in caplog.text
    packing = ops.packing(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    assert (packing.rows_per_item, packing.min_run_chunks) == (48, 4)
    assert packing.target_units == 2 * torch.get_num_threads()


def test_a_table_that_is_no_text_is_named_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    path = tuning.save_tuning(FOUND, "avx2", 2)
    path.write_bytes(b"\xff\xfe")
    assert tuning.load_tuning("avx2") == tuning.shipped_tuning()
    assert str(path) in caplog.text


def test_a_table_is_of_one_cpu_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.save_tuning(FOUND, "avx2", 2)
    assert tuning.load_tuning("avx2") == FOUND
    assert tuning.load_tuning("avx512") == tuning.shipped_tuning()
    monkeypatch.setattr(tuning, "cpu_name", lambda: "another processor")
    assert tuning.load_tuning("avx2") == tuning.shipped_tuning()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("vector_rows: 3", "vector_rows: -1", "vector_rows: -1 is not an integer from 0"),
        ("int4: 12", "int4: 33", "few_rows: 33"),
        ("int4: 12", "int4: many", "few_rows: 'many'"),
        ("int4: 12", "int5: 12", "int5"),
        ("min_run_chunks: 4", "min_run_chunks: 0", "min_run_chunks: 0"),
        ("min_run_chunks: 4", "longest_run: 4", "longest_run is unknown"),
        ("packing:", "cutting:", "packing"),
        ("vector_rows: 3", "vector_rows: [", "while parsing"),
    ],
)
def test_a_broken_table_is_named_and_not_used(
    old: str, new: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning.save_tuning(FOUND, "avx2", 2)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert tuning.load_tuning("avx2") == tuning.shipped_tuning()
    (record,) = caplog.records
    assert str(path) in record.getMessage() and reason in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    (cache / "tuning").write_text("a file")
    with pytest.raises(ConfigError, match=r"tuning.* cannot be written"):
        tuning.save_tuning(FOUND, "avx2", 2)


def test_the_last_number_before_one_that_does_not_pay() -> None:
    assert tune._last_gain({1: 0.5, 2: 1.0, 4: 1.1, 8: 0.4}) == 2
    assert tune._last_gain({1: 1.2}) == 0
    assert tune._last_gain({1: 0.3, 2: 0.4}) == 2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "OUT", 64)
    monkeypatch.setattr(tune, "IN", 128)
    monkeypatch.setattr(tune, "COPIES", 2)


@pytest.mark.usefixtures("small")
def test_every_number_follows_what_is_measured() -> None:
    """Ratios in the order of the measurements; the calls run, too."""
    level = backend().level
    rows = [0.5, 0.6, 1.2]  # most rows: 2
    has_pairs = level in ("amx", "avx512_bf16", "neon_bf16")
    searches = (3 if has_pairs else 1) + (level == "amx")
    packing = [0.99, 0.8, 0.9, 0.98, 1.1, 1.0, 0.96]  # 4 units, runs kept, 384 rows
    script: Iterator[float] = iter(rows * searches + packing)

    def ratio(first: tune.Call, second: tune.Call) -> float:
        first()
        second()
        return next(script)

    lines: list[str] = []
    found, used = tune.measure("", lines.append, ratio)
    before = tuning.shipped_tuning()
    few = FewRows(2, 2, 2) if has_pairs else replace(before.few_rows, int4=2)
    assert used == level and next(script, None) is None
    assert found.few_rows == few
    assert found.vector_rows == (2 if level == "amx" else before.vector_rows)
    changed = {"units_per_thread": 4, "query_rows_per_item": 384}
    assert found.packing == replace(before.packing, **changed)
    assert len(lines) == searches + 3 and "packing.units_per_thread: 4" in lines[searches]


def test_vectors_and_tiles_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared differs in the number of rows that the kernels are given."""
    ops = backend()
    given: list[int] = []
    attend = ops.library.ck_attention

    def record(args: object, threads: int) -> None:
        given.append(args._obj.vector_rows)  # type: ignore[attr-defined]
        attend(args, threads)

    monkeypatch.setattr(ops.library, "ck_attention", record)
    before = ops.vector_rows

    def ratio(first: tune.Call, second: tune.Call) -> float:
        first()
        second()
        return 2.0

    assert tune._Attention(ops).most_vector_rows(lambda line: None, ratio) == 0
    assert given == [max(tune.ROWS), 0] and ops.vector_rows == before


@pytest.mark.usefixtures("small")
def test_the_command_prints_or_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setattr(tune, "PAIRS", 1)
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 1e-6)
    threads = torch.get_num_threads()
    try:
        assert run(["tune", "--dry-run", "--threads", "1"]) == 0
        printed = capsys.readouterr().out
        table = yaml.safe_load(printed[printed.index("# Written by") :])
        assert set(table) == {"vector_rows", "few_rows", "packing"}
        assert "level " + backend().level + ", 1 threads" in printed
        assert not list(cache.iterdir())
        assert run(["tune", "--threads", "1"]) == 0
        (path,) = (cache / "tuning").iterdir()
        assert f"written: {path}" in capsys.readouterr().out
        assert run(["tune", "--isa-level", "mmx"]) == 2
        assert "this CPU lacks mmx" in capsys.readouterr().err
        assert run(["tune", "--threads", "4096"]) == 2
        assert "threads: 4096 are more than" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
