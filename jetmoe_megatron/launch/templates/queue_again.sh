# What SLURM says about this job: the value of one field; empty if it is not set.
field() { scontrol show job "$job" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | sed '2,$d; s/^(null)$//'; }

# Faults in a row are counted in the job's comment.
faults() { field Comment | sed -n 's/^jetmoe-faults-\([0-9]*\)$/\1/p'; }

queue_again() {
  for _ in {1..30}; do # SLURM's controller may be away for a moment
    scontrol requeue "$job" && return
    sleep 10
  done
  echo "job $job could not be queued again: submit again to continue" >&2
  return 1
}
