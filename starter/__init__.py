"""The starter model: a small decoder that answers a bank's customers, trained from scratch.

``python -m starter.train`` builds the folder that ships with the package,
``python -m starter.evaluate`` measures that folder on questions no training run has seen.
"""

import os

# Threads that wait should sleep: on a machine that does other work too, spinning ones cost most
# of the time. The OpenMP runtime reads this once, when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
