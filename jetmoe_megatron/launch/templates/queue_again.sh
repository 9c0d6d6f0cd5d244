queue_again() { # job
  for _ in {1..30}; do # SLURM's controller may be away for a moment
    scontrol requeue "$1" && return
    sleep 10
  done
  echo "job $1 could not be queued again: submit again to continue" >&2
  return 1
}
