"""How many replicas does one's own traffic need, and how many if ten times as much came?

Takes the ledger of this installation and puts it in the place of the traffic of
scenarios/capacity.yaml; nothing is started or paid for.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from cloudlm import Client

CAPACITY = Path(__file__).parent / "scenarios" / "capacity.yaml"
CLOUDLM = [sys.executable, "-m", "cloudlm.cli.main", "simulate"]

with Client() as cloud, cloud.openai() as inference:  # a new installation has no ledger yet
    asked = [{"role": "user", "content": "Where is my card?"}]
    for _ in range(12):
        inference.chat.completions.create(model="bank-helper", messages=asked, max_tokens=16)

with tempfile.TemporaryDirectory() as folder:
    ledger = Path(folder, "ledger.csv")
    export = [*CLOUDLM, "--export-ledger", str(ledger), "--since", "7d"]
    while not ledger.exists() or len(ledger.read_text().splitlines()) <= 12:
        time.sleep(0.5)  # rows are written a moment after the answers
        subprocess.run(export, check=True, capture_output=True)
    scenario = yaml.safe_load(CAPACITY.read_text())
    for speed in (1, 10):
        scenario["traffic"] = {"source": "ledger", "file": ledger.name, "speed": speed}
        own = Path(folder, "own.yaml")
        own.write_text(yaml.safe_dump(scenario))
        print(f"traffic as it came, {speed} times as fast:", flush=True)
        subprocess.run([*CLOUDLM, str(own)], check=True)
