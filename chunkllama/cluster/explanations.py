"""Why a prompt's match ended on one replica, where another one has more of the prompt.

A replica knows what it has itself. The front end knows, from the prefixes that it has routed and
from the replicas' digests, which other replica has the rest.
"""

from __future__ import annotations

from typing import Final

import msgspec

from chunkllama.messages import CacheExplanation, CacheReason

# What a replica says of tokens that it has not seen.
_NOT_SEEN_HERE: Final[frozenset[CacheReason]] = frozenset(
    {"unknown", "never_seen", "diverged", "another_namespace"}
)


def is_own(namespace: str, tenant: str, *, are_isolated: bool) -> bool:
    """Return whether a namespace has what one tenant has sent, and nothing of others.

    Args:
        are_isolated: whether tenants have namespaces of their own; without, they share that of a
            salt.
    """
    return not tenant or (namespace != "" and are_isolated)


def with_others(explanation: CacheExplanation, num_tokens: int) -> CacheExplanation:
    """Return the explanation of the whole cluster.

    Args:
        explanation: of the replica that has answered.
        num_tokens: the most leading tokens that another replica has, in the caller's own namespace
            and under the same adapter; 0 is not known.
    """
    if explanation.reason not in _NOT_SEEN_HERE or num_tokens <= explanation.num_matched_tokens:
        return explanation
    known = max(explanation.num_known_tokens, num_tokens)
    return msgspec.structs.replace(explanation, reason="another_replica", num_known_tokens=known)
