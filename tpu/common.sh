# shellcheck shell=bash
# Settings and helpers of the scripts in this folder; they source it.
#
#   TPU_NAME     name of the queued resource (and of its nodes)
#   ZONE         such as us-west4-a
#   PROJECT      Google Cloud project; default: gcloud's own setting
#   ACCELERATOR  such as v5litepod-16, v5p-64, v6e-8 (of one slice)
#   SLICES       number of slices, joined over the data centre network; default 1
#   SPOT         1: cheaper, and may be taken away at any time (default); 0: on demand
#   BUCKET       gs://bucket/folder for results and checkpoints
#
# --dry-run prints the exact commands and runs none of them.

DRY_RUN=0
ARGUMENTS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done

need() {
  local name
  for name in "$@"; do
    if [[ -z "${!name:-}" ]]; then
      echo "error: set $name, for example: $name=... $0; tpu/common.sh says what it means" >&2
      exit 2
    fi
  done
}

need TPU_NAME ZONE
SLICES="${SLICES:-1}"
WHERE=("--zone=$ZONE")
if [[ -n "${PROJECT:-}" ]]; then WHERE+=("--project=$PROJECT"); fi

# Print a command as a shell would take it; run it unless this is a dry run.
run() {
  printf '%q ' "$@"
  printf '\n'
  if [[ "$DRY_RUN" == 0 ]]; then "$@"; fi
}

QUEUED=(gcloud compute tpus queued-resources)

# The same command on every worker of every slice.
on_all() {
  run "${QUEUED[@]}" ssh "$TPU_NAME" "${WHERE[@]}" --node=all --worker=all "--command=$1"
}

to_all() {
  local file
  for file in "$@"; do
    run "${QUEUED[@]}" scp "$file" "$TPU_NAME:$(basename "$file")" "${WHERE[@]}" --node=all --worker=all
  done
}
