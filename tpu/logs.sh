#!/usr/bin/env bash
# Follow the log of one worker; the first worker of the first slice has the metrics.
#
#   TPU_NAME=ft ZONE=us-west4-a tpu/logs.sh [WORKER [SLICE]] [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
run "${QUEUED[@]}" ssh "$TPU_NAME" "${WHERE[@]}" "--node=${ARGUMENTS[1]:-0}" "--worker=${ARGUMENTS[0]:-0}" \
  "--command=tail -n 100 -F ftjax.log"
