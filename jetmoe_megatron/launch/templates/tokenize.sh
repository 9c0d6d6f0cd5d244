#!/usr/bin/env bash
# Tokenize on several machines: an array of jobs takes a part of the files each, then a job merges the parts.
#
{% for line in usage %}
#   {{ line }}
{% endfor %}
#
# Rendered by `jetmoe launch tokenize`. At its time limit a job queues itself again and continues; after a failure too, up
# to {{ starts_without_progress }} times. See docs/data.md.

{% for option in options %}
#SBATCH {{ option }}
{% endfor %}

set -euo pipefail

{% if arguments %}
[[ $# -gt 0 ]] || set -- {{ arguments }}
{% endif %}
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "error: the arguments are PARTS PREFIX, then inputs and options of: jetmoe data tokenize" >&2
  exit 2
fi
parts=$1 prefix=$2
shift 2

{% include "python.sh" %}
{% for variable in environment %}
export {{ variable | assignment }}
{% endfor %}
{% if container %}
container=({{ container_options }})
{% endif %}
here() { {{ 'srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" ' if container == "pyxis" }}{{ inside }}"$@"; }
# --- what this job does: the tasks of the array have numbers, the job that merges has none ---

part=${SLURM_ARRAY_TASK_ID:-}
if [[ $part ]]; then
  # Not SLURM_JOB_ID: that of one of the tasks stands for the whole array.
  job=${SLURM_ARRAY_JOB_ID}_$part
  command=(tokenize "$@" --output "$prefix" --part "$part/$parts" --workers "$SLURM_CPUS_PER_TASK")
else
  job=$SLURM_JOB_ID
  datasets=()
  for ((number = 1; number <= parts; number++)); do
    datasets+=("$prefix.part-$number-of-$parts")
  done
  command=(merge "${datasets[@]}" --output "$prefix"{{ " --overwrite" if overwrite }})
fi

# --- starts again ---

ended_by= # by whom, if SLURM has ended it
{% include "queue_again.sh" %}

again() { # why
  echo "job $job: $1; it is queued again" >&2
  queue_again
}
failed() { # how
  count_fault || return
  if ((faults > {{ starts_without_progress }})); then
    echo "job $job: $1, and was queued again {{ starts_without_progress }} times before: mend it, and submit it again" >&2
  else
    again "$1"
  fi
}
remove_parts() {
  for dataset in "${datasets[@]}"; do
    rm -rf "$dataset".{bin,idx,skipped.txt,partial} || return
  done
  rm -f "$prefix.part-settings.json" "$prefix.merging"
}
# Joins the lists of broken lines, and removes the parts.
finish_merge() {
  rm -f "$prefix.skipped.txt" || return
  for dataset in "${datasets[@]}"; do
    [[ ! -f $dataset.skipped.txt ]] || cat "$dataset.skipped.txt" >>"$prefix.skipped.txt" || return
  done
  echo "$job has merged" >"$prefix.merging" || return
  remove_parts
}
signalled=
# shellcheck disable=SC2329 # called by the trap
at_the_limit() {
  signalled=yes
  again "the time limit is near" || true
}
trap at_the_limit USR1 # SLURM signals only this script (--signal=B)
trap 'signalled=yes ended_by=--cancelled' TERM # and the work

if ! here "$python" -c 'import data_tools'; then
  failed "$python does not find data_tools: submit from the root of the repository, or install it" || true
  exit 1
fi
if [[ ! $part ]]; then # the file `merging` tells what an earlier start of this job has done
  case $(cat "$prefix.merging" 2>/dev/null || true) in
    "$job has merged")
      remove_parts || failed "the parts cannot be removed" || true
      exit
      ;;
    "$job merges") command+=(--overwrite) ;;
    *) [[ -e $prefix.bin || -e $prefix.idx ]] || echo "$job merges" >"$prefix.merging" ;;
  esac
fi
[[ ! $ended_by ]] || exit 143
here "$python" -m data_tools "${command[@]}" &
work=$!
# A trapped signal ends `wait` early: repeat it until it ends without one.
while
  signalled=
  status=0
  wait "$work" || status=$?
  [[ $signalled ]]
do :; done

case $status in
  0) ;;
  2 | 143) exit "$status" ;; # bad input; cancelled
  *)
    failed "it ended with status $status" || true
    exit "$status"
    ;;
esac

if [[ ! $part ]] && ! finish_merge; then
  failed "the parts cannot be removed" || true
  exit 1
fi
