#!/usr/bin/env python3
"""`scripts/bench/step.py`, the train step beside transformers + PEFT, under its short name; the same options."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("bench") / "step.py"), run_name="__main__")
