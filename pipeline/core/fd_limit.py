"""How many files this process may have open, and so how many connections."""

from __future__ import annotations

import resource

_OTHER_FILES = 64  # results, inputs, the loop's own, resolver and TLS


def room_for(connections: int) -> int:
    """Raise the soft limit of open files as far as needed and allowed; return how many connections fit, at least 1."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return max(1, min(connections, allowed - _OTHER_FILES))
    return connections
