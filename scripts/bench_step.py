#!/usr/bin/env python3
"""Runs `scripts/bench/step.py`, the train step compared with transformers + PEFT, under a short name; same options."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("bench") / "step.py"), run_name="__main__")
