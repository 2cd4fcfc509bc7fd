#!/usr/bin/env bash
# Start `ftjax train` on every worker; it goes on from the newest checkpoint where there is one.
#
#   TPU_NAME=ft ZONE=us-west4-a BUCKET=gs://mine/first tpu/train.sh run.yaml [key=value ...] [--dry-run]
#
# FILES="a.jsonl b.jsonl" are copied beside the configuration on every worker, under their names without folders.
# Checkpoints are kept in BUCKET/checkpoints: the workers have no disk in common. HF_TOKEN is handed on where it is set.
set -euo pipefail
source "$(dirname "$0")/common.sh"
need BUCKET
if [[ "${#ARGUMENTS[@]}" == 0 ]]; then
  echo "error: which configuration? tpu/train.sh run.yaml" >&2
  exit 2
fi

config="${ARGUMENTS[0]}"
read -ra files <<<"${FILES:-}"
to_all "$config" ${files[@]+"${files[@]}"}
settings="$(printf '%q ' "$(basename "$config")" "training.checkpoint_dir=$BUCKET/checkpoints" "${ARGUMENTS[@]:1}")"
token=""
if [[ -n "${HF_TOKEN:-}" && "$DRY_RUN" == 0 ]]; then token="HF_TOKEN=$(printf '%q' "$HF_TOKEN") "; fi
# The pid is kept for stopping; SIGTERM to one worker makes all of them save.
on_all "${token}nohup ftjax-venv/bin/ftjax train ${settings}> ftjax.log 2>&1 < /dev/null & echo \$! > ftjax.pid"
