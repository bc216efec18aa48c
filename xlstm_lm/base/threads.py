"""Spinning time of OpenMP threads that wait for each other.

By default the threads of libgomp and libomp wait by spinning for milliseconds. On a machine with other work that takes
the processor from the very thread they wait for, and speed falls up to a hundredfold.
"""

import os

USERS_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables of the two libraries about waiting. If any is set, nothing is changed."""
BOUNDED_SPIN = {
    "GOMP_SPINCOUNT": "10000",  # libgomp (torch's wheels for Linux): turns of a loop, about 50 microseconds
    "KMP_BLOCKTIME": "1",  # libomp and libiomp (macOS, conda, MKL): milliseconds, 200 by default
}


def bound_spinning() -> None:
    """Set both variables for this process and its children, unless the user has set one of `USERS_CHOICES`.

    The libraries read them when they are loaded, so this must come before the first import of torch.
    """
    if not any(name in os.environ for name in USERS_CHOICES):
        os.environ.update(BOUNDED_SPIN)
