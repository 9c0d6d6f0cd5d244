#!/usr/bin/env bash
# {{ title }}
#
#   sbatch [options of sbatch] {{ usage }} [RUN.yaml] [section.key=value ...]
#
# Rendered by `jetmoe launch slurm`. {{ minutes }} before the time limit the run saves, and the job queues itself again
# until the run is done; after a failure too, without the node that failed. See docs/slurm.md.

{% for option in options %}
#SBATCH {{ option }}
{% endfor %}

set -euo pipefail

run={{ run | quote }}
if [[ $# -gt 0 && ($1 != *=* || -f $1) ]]; then
  run=$1
  shift
fi
trainer={{ trainer | quote }}
if [[ ! -f $trainer || ! -f $run ]]; then
  echo "no $trainer or no $run in $PWD: submit from the folder that their paths start in" >&2
  exit 2
fi

{% include "environment.sh" %}

# --- this start of the job ---

restarts=${SLURM_RESTART_COUNT:-0}
start=$SLURM_JOB_ID-$restarts
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Below the ephemeral ports. The next start, or the next job, on the same node gets a different port.
port=$((20000 + (SLURM_JOB_ID + 1009 * restarts) % 10000))
# The end of the job's time, in seconds since 1970; 0 if SLURM does not say.
end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p' || true)
end=$([[ $end ]] && date -d "$end" +%s 2>/dev/null || echo 0)

{% if container %}
container=({{ container_options }})
{% endif %}
# On this node, where the Python of the ranks is.
here() { {{ "srun --overlap --nodes=1 --ntasks=1 " if container == "pyxis" }}{{ inside }}"$@"; }

# Wrong input ends the job here, with status 2.
nodes=$(IFS=,; echo "${hosts[*]}")
folder=$(here "$python" -m jetmoe_megatron.launch.job begin "$start" --nodes "$nodes" "$run" "$@")
export JETMOE_RANK_LOGS=$folder JETMOE_FAILED_NODES=$folder/failed_nodes

# --- signals ---

# Before the time limit SLURM signals only this script (--signal=B). srun passes the signal on to the ranks, which save
# and exit with 75. TERM means that the job is being cancelled or preempted or, at the end of its time, that saving takes
# longer than the time it was given.
signalled=
cancelled=
srun_pid=
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  signalled=yes
  kill -USR1 "$srun_pid" 2>/dev/null || true
}
# shellcheck disable=SC2329
end_or_cancel() {
  ((end && $(date +%s) >= end)) || cancelled=--cancelled
  pass_on
}
trap pass_on USR1
trap end_or_cancel TERM

# --- the ranks ---

{% if tasks == "rank" %}
export MASTER_ADDR=$address
{% endif %}
# Starts all ranks and waits for their end: PORT, and what each rank runs.
# srun does not inherit --cpus-per-task since SLURM 22.05.
# --kill-on-bad-exit=0: nodes exit with 75 within seconds of each other, and the first exit must not kill the others.
# --wait: a node that fails leaves the others waiting for it in a collective; they are killed after this time.
run_ranks() {
  local port=$1
  shift
{% if tasks == "node" %}
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=300 \
    {{ inside }}"$python" -m jetmoe_megatron.launch.elastic \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks_per_node" --max-restarts=0{{ numa_binding }} \
    --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$start" "$@" &
{% else %}
  MASTER_PORT=$port srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=300 \
    {{ inside }}"$python" -m jetmoe_megatron.launch.slurm_rank "$@" &
{% endif %}
  srun_pid=$!
  # A trapped signal ends `wait` early: repeat it until it ends without one.
  while
    signalled=
    status=0
    wait "$srun_pid" || status=$?
    [[ $signalled ]]
  do :; done
}

{% if doctor %}
# A sick rank ends this start with status 5.
run_ranks $((port + 1)) -m jetmoe_megatron.doctor --ranks --tolerance {{ doctor_tolerance }} "$run" "$@"
if ((status == 0)); then
  run_ranks "$port" "$trainer" "$run" "$@"
fi
{% else %}
run_ranks "$port" "$trainer" "$run" "$@"
{% endif %}

# --- what follows ---

read -r next failed_nodes < <(here "$python" -m jetmoe_megatron.launch.job end "$start" --status "$status" \
  ${cancelled:+"$cancelled"} --most {{ starts_without_progress }} "$run" "$@") || true

{% include "queue_again.sh" %}

# The nodes that failed, besides those of earlier starts. SLURM takes the list only from a job that waits.
leave_out() {
  local failed=$1 before usable
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
  [[ ! $before || $before == "(null)" ]] || failed=$before,$failed
  usable=$(sinfo --noheader --Node --format=%N --partition="$SLURM_JOB_PARTITION" --states=alloc,comp,idle,mix |
    sort -u | grep -cvxF "$(scontrol show hostnames "$failed")" || true)
  if ((usable < SLURM_JOB_NUM_NODES)); then
    echo "$1 cannot be left out: partition $SLURM_JOB_PARTITION has no other nodes" >&2
  elif scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$failed"; then
    echo "left out from now on: $failed"
  fi
}

if [[ $next == again ]]; then
  trap '' TERM # SLURM sends it to this script when it queues the job again
  queue_again "$SLURM_JOB_ID" && [[ $failed_nodes ]] && leave_out "$failed_nodes"
fi
exit "$status"
