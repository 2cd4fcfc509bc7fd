#!/usr/bin/env bash
# Copy a run folder (final/, best/, metrics, TensorBoard) from the first worker to BUCKET.
#
#   TPU_NAME=ft ZONE=us-west4-a BUCKET=gs://mine/first tpu/copy.sh runs/first [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
need BUCKET
if [[ "${#ARGUMENTS[@]}" != 1 ]]; then
  echo "error: which run folder? tpu/copy.sh runs/first" >&2
  exit 2
fi
run "${QUEUED[@]}" ssh "$TPU_NAME" "${WHERE[@]}" --node=0 --worker=0 \
  "--command=gcloud storage rsync --recursive $(printf '%q %q' "${ARGUMENTS[0]}" "$BUCKET")"
