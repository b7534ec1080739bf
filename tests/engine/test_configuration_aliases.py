"""Old names of configuration values."""

from __future__ import annotations

import logging

import pytest

from chunkllama.config import EngineConfig


def test_the_old_name_of_the_cpu_backend_is_accepted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A command that an earlier test ran in this process may have set the level.
    with caplog.at_level(logging.WARNING, logger="chunkllama"):
        assert EngineConfig.from_flat(backend="native").model.backend == "cpu"
    assert "native is now called cpu" in caplog.text
