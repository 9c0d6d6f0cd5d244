# What SLURM says about this job: the value of one field; empty if it is not set, or if SLURM does not answer.
field() { scontrol show job "$job" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | sed '2,$d; s/^(null)$//' || true; }

restarts=$(field Restarts)
export SLURM_RESTART_COUNT=${restarts:-${SLURM_RESTART_COUNT:-0}} # not that of a job that submitted this one
restarts=$SLURM_RESTART_COUNT

# Before the next try: SLURM's controller may be away for a moment. A signal ends it.
pause() {
  sleep 10 >/dev/null &
  wait "$!" || true
}

# Faults in a row are counted at the end of the job's comment.
comment() {
  local said
  said=$(scontrol show job "$job") || return 1
  sed -n 's/^ *Comment=//p' <<<"$said" | sed 's/^(null)$//; s/ *$//'
}
# One more, as `faults`; with an argument, that number. Fails if SLURM does not take it.
count_fault() {
  local before text
  for _ in {1..30}; do
    [[ ! $ended_by ]] || return 1
    if text=$(comment); then
      before=0
      if [[ $text =~ ^(.*[^ ])?\ *jetmoe-faults-([0-9]+)(.*)$ ]]; then
        before=${BASH_REMATCH[2]} text=${BASH_REMATCH[1]}${BASH_REMATCH[3]}
      fi
      faults=${1:-$((before + 1))}
      ((faults == 0)) || text+=${text:+ }jetmoe-faults-$faults
      ((faults != before)) || return 0
      ! scontrol update JobId="$job" Comment="$text" || return 0
    fi
    pause
  done
  echo "job $job: SLURM does not count its faults, so it is not queued again" >&2
  return 1
}

# Fails if somebody cancels the job meanwhile.
queue_again() {
  for _ in {1..30}; do
    [[ $ended_by != --requeued ]] || return 0 # SLURM has done it
    [[ ! $ended_by ]] || return 1
    if scontrol requeue "$job"; then
      trap '' TERM # SLURM sends it to this script
      return 0
    fi
    pause
  done
  echo "job $job could not be queued again: submit again to continue" >&2
  return 1
}
