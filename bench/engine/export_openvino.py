"""Export the HF directory for OpenVINO: <model>-ov-{fp16,int8,int4}, through optimum-intel.

    python export_openvino.py --model model --precisions fp16,int8,int4
Needs: torch (CPU build), optimum-intel[openvino,nncf]. Weight-only compression with optimum's defaults
(int8: per-channel asymmetric; int4: group 128 asymmetric, ratio 1.0, embedding and head in int8).
"""

import argparse, os, subprocess, sys

ap = argparse.ArgumentParser()
ap.add_argument("--model", default="model")
ap.add_argument("--precisions", default="fp16,int8,int4")
a = ap.parse_args()
for p in a.precisions.split(","):
    out = f"{a.model}-ov-{p}"
    cmd = [
        os.path.join(os.path.dirname(sys.executable), "optimum-cli"),
        "export",
        "openvino",
        "--model",
        a.model,
        "--task",
        "text-generation-with-past",
        "--weight-format",
        p,
    ]
    if p == "int4":
        cmd += ["--group-size", "128", "--ratio", "1.0"]
    print("rc", subprocess.call(cmd + [out]), out, flush=True)
