"""Set how threads of OpenMP wait for one another, before torch starts them."""

import sys
from collections.abc import MutableMapping

#: What users set where they decide themselves; the last one is of GNU OpenMP, which torch brings along on Linux.
_DECIDED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

#: Looks at a lock before a thread sleeps, a few microseconds. By default GNU OpenMP looks for milliseconds, in which a
#: thread that waits keeps the core from the one that it waits for, if another program works on the machine.
_SPINS = "1000"


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait sleep soon, unless the environment says how they wait, or torch has read it already.

    Args:
        environment: `os.environ`.
    """
    if "torch" not in sys.modules and not any(name in environment for name in _DECIDED):
        environment["GOMP_SPINCOUNT"] = _SPINS
