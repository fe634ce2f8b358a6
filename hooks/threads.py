"""Which thread a forward pass belongs to: hooks sit on the model, and another thread may run it
too.
"""

from __future__ import annotations

import threading


class Owner:
    """The thread that entered a capture or an edit, whose passes alone count.

    Threads that Python did not start belong to the owner as well: those are autograd's, which run
    checkpointed blocks again during a backward pass on a GPU.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def works(self) -> bool:
        """Whether what happens now, in this thread, is part of the owner's work."""
        if threading.get_ident() == self._thread:
            return True
        return isinstance(threading.current_thread(), threading._DummyThread)
