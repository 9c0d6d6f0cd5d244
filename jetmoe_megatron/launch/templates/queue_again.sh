# What SLURM says about this job: the value of one field; empty if it is not set, or if SLURM does not answer.
field() { scontrol show job "$job" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | sed '2,$d; s/^(null)$//' || true; }

# Faults in a row are counted at the end of the job's comment.
comment() { scontrol show job "$job" | sed -n 's/^ *Comment=//p' | sed 's/^(null)$//; s/ *$//'; }
faults() { comment | sed -n 's/.*jetmoe-faults-\([0-9]*\)$/\1/p'; }
count_faults() { # their number; 0: forget them
  local text
  text=$(comment | sed 's/ *jetmoe-faults-[0-9]*$//')
  (($1 == 0)) || text+=${text:+ }jetmoe-faults-$1
  scontrol update JobId="$job" Comment="$text"
}

restarts=$(field Restarts)
restarts=${restarts:-${SLURM_RESTART_COUNT:-0}}

# Fails if somebody cancels the job meanwhile.
queue_again() {
  for _ in {1..30}; do # SLURM's controller may be away for a moment
    if scontrol requeue "$job"; then
      trap '' TERM # SLURM sends it to this script
      return 0
    fi
    sleep 10 &
    wait "$!" || true # a signal ends it
    [[ ! ${ended_by:-} ]] || return 1
  done
  echo "job $job could not be queued again: submit again to continue" >&2
  return 1
}
