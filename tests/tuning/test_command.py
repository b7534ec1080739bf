"""``chunkllama finetune``: from a file to an adapter, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from chunkllama.models.config import read_spec
from chunkllama.models.loading.adapter_file import read_adapter
from chunkllama_server.commands import run

LINE = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder)
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(LINE)}\n" * 4)
    return folder


def finetune(model: Path, *flags: str, data: str = "train.jsonl") -> int:
    folder = model.parent
    paths = ("--data", str(folder / data), "--out", str(folder / "out"))
    return run(["finetune", "--model", str(model), "--threads", "1", *paths, *flags])


def test_an_adapter_is_trained_and_the_loss_is_printed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--epochs", "3", "--batch-size", "2", "--learning-rate-multiplier", "20")
    assert finetune(model, *flags, "--rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["4 conversations, 16 trained tokens in an epoch", "6 steps"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[2:8]]
    assert losses[-1] < losses[0]
    out = model.parent / "out"
    assert read_adapter(out / "adapter", read_spec(model)).rank == 2
    assert [path.name for path in out.iterdir()] == ["adapter"]


def test_the_adapter_of_another_training_is_kept(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = model.parent / "out" / "adapter" / "mine"
    kept.mkdir(parents=True)
    assert finetune(model) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapter exists; choose another folder" in line and kept.exists()


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("none", (), "data: no file"),
        ("bad.jsonl", (), "bad.jsonl: line 2: messages: no message of the assistant is trained"),
        ("train.jsonl", ("--finetune-memory", "1MiB"), "finetune_memory: an example of"),
        ("train.jsonl", ("--finetune-memory", "much"), "finetune_memory: write a size"),
        ("train.jsonl", ("--alpha", "0"), "alpha: must be above 0"),
        ("train.jsonl", ("--rank", "129"), "--rank"),
        ("train.jsonl", ("--seed", str(2**64)), "--seed"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    flags: tuple[str, ...],
    words: str,
) -> None:
    (model.parent / "bad.jsonl").write_text(f'{json.dumps(LINE)}\n{{"messages": []}}\n')
    assert finetune(model, *flags, data=data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("name", "named"), [("w.safetensors", "w.safetensors"), (None, "state.safetensors")]
)
def test_the_file_that_cannot_be_read_is_named(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    named: str,
) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    monkeypatch.setattr("chunkllama.tuning.load.load_trainer", fail)
    assert finetune(model) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{named}: cannot be read: Input/output error")
