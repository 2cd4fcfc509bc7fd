#!/usr/bin/env bash
# Look every MINUTES (default 5) whether the TPUs were taken away; if so ask for new ones, set them up and go on.
# Ends when the run has written final/ to the first worker; takes the settings and arguments of tpu/train.sh.
#
#   TPU_NAME=ft ZONE=us-west4-a ACCELERATOR=v5litepod-16 BUCKET=gs://mine/first tpu/keep_running.sh run.yaml [key=value ...]
#
# With --dry-run: one round, as if the TPUs had been taken away.
set -euo pipefail
source "$(dirname "$0")/common.sh"
need ACCELERATOR BUCKET
here="$(dirname "$0")"
dry=()
if [[ "$DRY_RUN" == 1 ]]; then dry=(--dry-run); fi

state() {
  if [[ "$DRY_RUN" == 1 ]]; then
    echo SUSPENDED
  else
    "${QUEUED[@]}" describe "$TPU_NAME" "${WHERE[@]}" "--format=value(state.state)" 2>/dev/null || echo NONE
  fi
}

started=0
while true; do
  now="$(state)"
  case "$now" in
    ACTIVE)
      if [[ "$started" == 0 ]]; then
        "$here/setup.sh" ${dry[@]+"${dry[@]}"}
        "$here/train.sh" "${ARGUMENTS[@]}" ${dry[@]+"${dry[@]}"}
        started=1
      elif "${QUEUED[@]}" ssh "$TPU_NAME" "${WHERE[@]}" --node=0 --worker=0 "--command=grep -q '^done; the result' ftjax.log"; then
        echo "the run is complete: tpu/copy.sh copies it, tpu/delete.sh gives the TPUs back"
        exit 0
      fi
      ;;
    SUSPENDED | FAILED | NONE)
      started=0
      if [[ "$now" != NONE ]]; then "$here/delete.sh" ${dry[@]+"${dry[@]}"}; fi
      "$here/create.sh" ${dry[@]+"${dry[@]}"}
      ;;
  esac
  if [[ "$DRY_RUN" == 1 ]]; then
    "$here/setup.sh" --dry-run
    "$here/train.sh" "${ARGUMENTS[@]}" --dry-run
    exit 0
  fi
  sleep "$((60 * ${MINUTES:-5}))"
done
