#!/usr/bin/env bash
# Give the TPUs back, and what is on their disks. Copy results first.
#
#   TPU_NAME=ft ZONE=us-west4-a tpu/delete.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
run "${QUEUED[@]}" delete "$TPU_NAME" "${WHERE[@]}" --force --quiet
