"""Settings of uploaded files and of batches."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from chunkllama.config import Bytes, ConfigGroup, limit


class BatchConfig(ConfigGroup):
    """Uploaded files and batches."""

    batches: bool = Field(
        default=True, description="Serve /v1/files and /v1/batches, which store data on disk."
    )
    files_dir: Path | None = Field(
        default=None,
        description="Folder of uploaded files and of batches, which continue after a restart; "
        "mode 0700. Default: files-PORT in the cache folder, with the server's port.",
    )
    file_bytes: Bytes = limit(
        1 << 30, "bytes", "tenant", "413 file_budget",
        "Files and results of batches that a key may store.",
    )  # fmt: skip
    max_file_bytes: Bytes = limit(
        200 << 20, "bytes", "tenant", "413 request_too_large", "An uploaded file.",
        "The body is larger than {limit} bytes",
    )  # fmt: skip
    max_uploads: int = limit(
        8, "uploads", "tenant", "429 too_many_uploads", "Files of a key that arrive at once.",
        "At most {limit} files of a key are received at once; try again when one is stored", ge=1,
    )  # fmt: skip
    file_seconds: float = limit(
        2_592_000.0, "seconds", "tenant", "left out",
        "A stored file expires after this time.", gt=0,
    )  # fmt: skip
    batch_lines: int = limit(
        50_000, "lines", "tenant", "200 too_many_lines", "Lines of a batch.", ge=1,
    )  # fmt: skip
    batch_jobs: int = limit(
        20, "batches", "tenant", "429 too_many_batches", "Batches of a key that have not ended.",
        "At most {limit} batches of a key run or wait; try again when one has ended", ge=1,
    )  # fmt: skip
    batch_requests: int | None = limit(
        None, "requests", "operator", "waits",
        "Lines of batches that run at once. Default: three quarters of max_num_seqs.", ge=1,
    )  # fmt: skip

    def max_batch_lines(self, max_num_seqs: int) -> int:
        """Lines of batches that run at once in an engine of so many sequences."""
        return self.batch_requests or max(max_num_seqs * 3 // 4, 1)
