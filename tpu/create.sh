#!/usr/bin/env bash
# Ask for TPUs: a queued resource, spot unless SPOT=0. It waits until Google has them.
#
#   TPU_NAME=ft ZONE=us-west4-a ACCELERATOR=v5litepod-16 tpu/create.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
need ACCELERATOR

case "$ACCELERATOR" in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
command=("${QUEUED[@]}" create "$TPU_NAME" "${WHERE[@]}" "--accelerator-type=$ACCELERATOR")
command+=("--runtime-version=${RUNTIME:-$runtime}")
if [[ "$SLICES" == 1 ]]; then
  command+=("--node-id=$TPU_NAME")
else
  command+=("--node-count=$SLICES" "--node-prefix=$TPU_NAME")
fi
if [[ "${SPOT:-1}" == 1 ]]; then command+=(--spot); fi
run "${command[@]}"
run "${QUEUED[@]}" describe "$TPU_NAME" "${WHERE[@]}" "--format=value(state.state)"
