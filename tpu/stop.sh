#!/usr/bin/env bash
# Save and stop: SIGTERM to every worker. tpu/train.sh goes on from there.
#
#   TPU_NAME=ft ZONE=us-west4-a tpu/stop.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
# shellcheck disable=SC2016 # the worker reads the file
on_all 'kill -TERM "$(cat ftjax.pid)"'
