"""Tests the wheel: it has every file that the package reads, and runs without the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from oracle import Case, make_hf
from tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_of_the_package_is_in_the_wheel():
    """Files that are no Python are named in pyproject.toml, and every name there stands for a file."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {path for package, patterns in given.items() for one in patterns for path in _folder(package).glob(one)}
    kept = subprocess.run(["git", "ls-files", "ftjax"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    there = {ROOT / path for path in kept} or set((ROOT / "ftjax").rglob("*.*"))
    assert {path for path in there if path.suffix not in (".py", ".pyc")} == named
    assert all(any(_folder(package).glob(one)) for package, patterns in given.items() for one in patterns)


def _folder(package: str) -> Path:
    return ROOT / package.replace(".", "/")


@pytest.mark.sweep
def test_an_installed_wheel_runs_the_demo(tmp_path):
    """Built, installed apart from the repository, and run elsewhere; what it depends on comes from this environment."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "ftjax", source / "ftjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", source], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the wheel needs setuptools from an index: {built.stderr.strip().splitlines()[-1]}")
    [wheel] = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    make_hf(Case("llama", "llama", {"max_position_embeddings": 1024}), tmp_path / "tiny")
    save_tokenizer(tmp_path / "tiny", chat=True)
    settings = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XLA_FLAGS": ""}

    def ftjax(*arguments: str) -> str:
        code = "import sys, ftjax; assert 'site' in ftjax.__file__; from ftjax.cli import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "lora" in ftjax("config", "--example", "lora")
    said = ftjax("demo", "--model", "tiny", "training.max_steps=1", "data.validation=null")
    assert "exact match after:  0 of 50" in said and (tmp_path / "demo" / "merged" / "config.json").is_file()
