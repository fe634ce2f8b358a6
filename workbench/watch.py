"""Worker processes end with the process that started them, however it went."""

from __future__ import annotations

import os
import threading
import time

from workbench.files import alive


def _wait(parent: int) -> None:
    while os.getppid() == parent:  # a process that nobody has waited for is gone, and still there
        time.sleep(0.5)
    os._exit(1)


def watch(parent: int) -> None:
    """Start watching; called in a worker before it imports anything heavy, which takes seconds in
    which the parent may go as well.
    """
    if os.getppid() == parent:
        threading.Thread(target=_wait, args=(parent,), daemon=True).start()
    elif not alive(parent):
        os._exit(1)
