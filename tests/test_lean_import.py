"""Importing lowbit costs little over importing torch, and drags in nothing that most users never call."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

HEAVY = ["onnx", "onnxscript", "onnxruntime", "openvino", "jinja2", "typer", "rich", "scipy", "yaml"]
PROBE = f"""
import gc, json, sys, time
gc.disable()  # one pass over all of torch's objects would count on whichever side it falls
begin = time.process_time()  # what else runs on the machine does not count
import torch
before, middle = set(sys.modules), time.process_time()
import lowbit
cost = (time.process_time() - middle) / (middle - begin)
print(json.dumps([cost, sorted(set({HEAVY!r}) & (set(sys.modules) - before))]))
"""


def test_import_is_lean() -> None:
    runs = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True) for _ in range(3)]
    results = [json.loads(run.stdout) for run in runs]
    assert [loaded for _, loaded in results] == [[]] * 3
    assert statistics.median(cost for cost, _ in results) <= 0.25
