"""How a gateway and its workers speak about a stream that may have to go on elsewhere.

With ``RESUMABLE_HEADER`` a worker adds ``NOTE`` to every chunk of a choice: the ids of the tokens
that the chunk completes and, in a choice's first chunk, the seed of its draws. The gateway takes it
out again and gathers it; what it then sends to ``RESUME_PATH`` of another worker is described in
``worker.resume``. Only words; no I/O.
"""

from __future__ import annotations

RESUMABLE_HEADER = "x-cloudlm-resumable"
RESUME_PATH = "/internal/v1/resume"
NOTE = "cloudlm_resume"
