"""What ``chunkllama verify`` found: rows of a table, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

LOG_PROBABILITIES: Final = "log-probabilities"


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison.

    Attributes:
        area: what was compared: tokenizer, BOS, rotary embedding, head, log-probabilities, ...
        subject: with which backend, dtype and quantization; "" where there is no choice.
        is_equal: whether it agrees, within the tolerance that ``detail`` names; None: it was not
            compared.
        detail: one line: the numbers, or the first difference.
        numbers: for the JSON.
    """

    area: str
    subject: str
    is_equal: bool | None
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """All comparisons of one model.

    Attributes:
        model: as the user named it.
        reference: what it was compared with.
        architecture: as config.json names it.
        findings: in the order in which they were made.
    """

    model: str
    reference: str
    architecture: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs, and log-probabilities were compared at all."""
        return not self.areas and self.has_run

    @property
    def has_run(self) -> bool:
        """Whether log-probabilities of some variant were compared."""
        return any(x.is_equal is not None for x in self.findings if x.area == LOG_PROBABILITIES)

    @property
    def areas(self) -> list[str]:
        """Areas that differ, in order, each once."""
        return list(dict.fromkeys(x.area for x in self.findings if x.is_equal is False))

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "model": self.model,
            "reference": self.reference,
            "architecture": self.architecture,
            "equal": self.is_equal,
            "areas_that_differ": self.areas,
            "findings": [asdict(finding) for finding in self.findings],
        }
