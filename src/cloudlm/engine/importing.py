"""Importing what is large: without the search for garbage, which finds none. No PyTorch here.

An import makes objects by the hundred thousand and keeps nearly all of them, while Python looks
through them again and again, a fifth of the time that it takes to import PyTorch. Later searches
skip them too, and hold the steps of the engine up for less. Must not surround the loading of
weights: what is in a circle when the search is resumed is never given back. For the same reason
an import that was made before does nothing: there may have been an engine meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def unsearched(module: str) -> Iterator[None]:
    """Around the import of ``module`` (its full name). Unless that was imported before: no search
    for garbage inside, and what is there at the end is never looked at again."""
    if module in sys.modules:
        yield
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
