#!/usr/bin/env bash
# Install this checkout of ftjax (what is committed) on every worker, with a Python of its own.
#
#   TPU_NAME=ft ZONE=us-west4-a tpu/setup.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"

root="$(cd "$(dirname "$0")/.." && pwd)"
run git -C "$root" archive --format=tar.gz --output=/tmp/ftjax.tar.gz HEAD
to_all /tmp/ftjax.tar.gz
# shellcheck disable=SC2016 # $HOME is the worker's
on_all 'set -e; mkdir -p ftjax && tar -xzf ftjax.tar.gz -C ftjax
command -v "$HOME/.local/bin/uv" >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.11 ftjax-venv
"$HOME/.local/bin/uv" pip install --quiet --python ftjax-venv/bin/python -c ftjax/constraints.txt "./ftjax[tpu]"'
