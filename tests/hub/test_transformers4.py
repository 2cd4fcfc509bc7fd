"""Folders that ftjax writes, read by transformers 4.57 in an environment of its own, which has another PyTorch model code and
other rules for config.json and tokenizers. `make test-all` only: the environment is made with pip."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from oracle import hf_logits, load, make_hf, tokens, write_merged
from processes import ALL

from ftjax.config import FullConfig

pytestmark = pytest.mark.skipif(not ALL, reason="makes an environment with pip; FTJAX_TEST_ALL=1 runs it")
HERE = Path(__file__).parent
PACKAGES = ("transformers==4.57.6", "numpy", "sentencepiece", "protobuf", "gguf")
REFUSED = {"olmo2-tied", "phi3-whole-heads"}  # scalings for which transformers 4 has no words
ONE_BASE = {"olmo3"}  # transformers 4 has one rope_theta for all types of layers of this family


@pytest.fixture(scope="session")
def older() -> Path:
    """The Python of an environment with transformers 4.57; it is kept between runs."""
    place = HERE.parents[1] / ".cache" / "transformers4"
    python = place / "bin" / "python"
    if not (place / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        torch = f"torch=={version('torch').partition('+')[0]}"
        done = subprocess.run([*pip, torch, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {PACKAGES[0]} here: {done.stderr.strip().splitlines()[-1]}")
        (place / ".complete").touch()
    return python


def ask(python: Path, folder: Path, asked: list[dict]) -> list[dict]:
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [str(python), str(HERE / "transformers4.py"), str(folder / "asked.json"), str(folder / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


def test_every_family_has_the_same_logits(older, tmp_path):
    ids, asked, want = tokens(2, 24), [], []
    # transformers 4 takes gpt-oss's clamp and slope for constants, which they are in all that is published.
    cases = [replace(case, values={k: v for k, v in case.values.items() if not k.startswith("swiglu")}) for case in CASES]
    for case in cases:
        base, written = tmp_path / case.name, tmp_path / f"{case.name}-written"
        written.mkdir()
        want.append(hf_logits(make_hf(case, base), ids))
        write_merged(written, *load(base), FullConfig(), base)
        asked.append({"folder": str(written), "ids": ids.tolist(), "texts": []})
    apart, refused = {}, {}
    for case, theirs, ours in zip(cases, ask(older, tmp_path, asked), want, strict=True):
        if "error" in theirs:
            refused[case.name] = theirs["error"]
        elif case.name not in ONE_BASE:
            apart[case.name] = float(np.abs(np.array(theirs["logits"]) - ours).max())
    assert set(refused) == REFUSED, refused
    assert {name: value for name, value in apart.items() if not value < 1e-4} == {}
