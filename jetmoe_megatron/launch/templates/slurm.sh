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
most={{ starts_without_progress }} # starts in a row without a new checkpoint

# --- what brings the job back ---

job=$SLURM_JOB_ID
ended_by= # by whom, if SLURM has ended it
{% include "queue_again.sh" %}

# These nodes, and those that earlier starts left out.
left_out_with() { # nodes
  local before
  before=$(field ExcNodeList)
  echo "${before:+$before,}$1"
}

# Whether the job has enough nodes without these. Nodes count if they are like its first one.
others_than() { # nodes
  local like
  if [[ $(field ReqNodeList) || $(field Reservation) || $(field Features) ]]; then
    return 1 # the job asks for certain nodes: SLURM alone knows how many there are
  fi
  like=$(sinfo --noheader --Node --format='%c %G' --nodes="$SLURMD_NODENAME" | sed '2,$d; s/ *$//')
  # A state may have a mark: powered down (~), powering up (#), completing (+), planned (-).
  (($(sinfo --noheader --Node --format='%N %t %c %G' --partition="$SLURM_JOB_PARTITION" |
    awk -v like="$like" '$2 ~ /^(alloc|comp|idle|mix|plnd)[~#+-]?$/ && $3 " " $4 == like { print $1 }' | sort -u |
    grep -cvxF "$(scontrol show hostnames "$(left_out_with "$1")")" || true) >= SLURM_JOB_NUM_NODES))
}

# Nodes that failed. SLURM takes the list only from a job that waits.
leave_out() { # nodes
  local all
  all=$(left_out_with "$1")
  if ! others_than "$1"; then
    echo "$1 cannot be left out: no others like it are known for this job" >&2
  elif scontrol update JobId="$job" ExcNodeList="$all"; then
    echo "left out from now on: $all"
  fi
}

# A fault of this machine, of SLURM or of the file system may pass.
known_end=
fault_of_node=
# shellcheck disable=SC2329 # called by the trap
on_exit() {
  local status=$?
  [[ ! $known_end && ! $ended_by ]] || exit "$status"
  set +e
  count_fault || exit "$status"
  echo "job $job: a fault on $SLURMD_NODENAME outside the ranks (status $status), $faults of $most in a row" >&2
  ((faults < most)) && queue_again && [[ $fault_of_node ]] && leave_out "$SLURMD_NODENAME"
  exit "$status"
}
trap on_exit EXIT

# --- signals ---

# Before the time limit SLURM signals only this script (--signal=B). srun passes the signal on to the ranks, which save
# and exit with 75. TERM means that the time is over, because saving takes longer than it was given; or that SLURM itself
# has queued the job again, after a preemption or by an administrator; or that somebody cancels the job.
signalled=
asked=
srun_pid=
folder=
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  signalled=yes asked=yes
  [[ ! $folder ]] || touch "$folder/stop" || true # for launchers that do not listen yet: srun loses signals then
  [[ ! $srun_pid ]] || kill -USR1 "$srun_pid" 2>/dev/null || true
}
# shellcheck disable=SC2329
asked_to_end() {
  local now
  now=$(field Restarts)
  if [[ ! $now || $(field Reason) == TimeLimit ]]; then
    : # or SLURM does not answer: then nobody has cancelled it
  elif [[ $now != "$restarts" ]]; then
    ended_by=--requeued
  else
    ended_by=--cancelled
  fi
  pass_on
}
trap pass_on USR1
trap asked_to_end TERM

if [[ ! -f $trainer || ! -f $run ]]; then
  echo "no $trainer or no $run in $PWD on $SLURMD_NODENAME: submit from the folder that their paths start in" >&2
  fault_of_node=yes
  exit 1
fi

# --- this start of the job ---

start=$job-$restarts
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' || true)
address=${address:-${hosts[0]}}
# Below the ephemeral ports. The next start, or the next job, on the same node gets other ports.
port=$((20000 + (2 * job + 1009 * restarts) % 10000))

{% include "environment.sh" %}

{% if container %}
container=({{ container_options }})
{% endif %}
# On this node, where the Python of the ranks is.
here() { {{ "srun --overlap --nodes=1 --ntasks=1 " if container == "pyxis" }}{{ inside }}"$@"; }
{% include "around_ranks.sh" %}

folder=$(ask_job begin --nodes "$(IFS=,; echo "${hosts[*]}")" "$run" "$@") || {
  status=$?
  ((status != 2)) || known_end=yes                  # wrong input
  [[ ! $status =~ ^12[67]$ ]] || fault_of_node=yes # no Python can be run
  exit "$status"
}
export JETMOE_RANK_LOGS=$folder JETMOE_FAILED_NODES=$folder/failed_nodes

# --- the ranks ---

{% if tasks == "rank" %}
export MASTER_ADDR=$address
{% endif %}
# Starts all ranks and waits for their end: PORT, and what each rank runs.
# --overlap: a step that does not end does not keep the next one waiting.
# srun does not inherit --cpus-per-task since SLURM 22.05.
# --kill-on-bad-exit=0: nodes exit with 75 within seconds of each other, and the first exit must not kill the others.
# --wait: a node that fails leaves the others waiting for it in a collective; they are killed after this time.
run_ranks() {
  local port=$1
  shift
  if [[ $asked ]]; then # meanwhile
    status=75
    return
  fi
  rm -rf "$folder/nodes_that_came" # before
{% if tasks == "node" %}
  srun --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=300 \
    {{ inside }}"$python" -m jetmoe_megatron.launch.elastic \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks_per_node" --max-restarts=0{{ numa_binding }} \
    --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$start" "$@" &
{% else %}
  MASTER_PORT=$port srun --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=300 \
    {{ inside }}"$python" -m jetmoe_megatron.launch.slurm_rank "$@" &
{% endif %}
  srun_pid=$!
  [[ ! $asked ]] || pass_on
  # A trapped signal ends `wait` early: repeat it until it ends without one.
  while
    signalled=
    status=0
    wait "$srun_pid" || status=$?
    [[ $signalled ]]
  do :; done
  srun_pid=
}

{% if doctor %}
run_ranks $((port + 1)) -m jetmoe_megatron.doctor --ranks --tolerance {{ doctor_tolerance }} "$run" "$@"
if ((status == 5)); then # sick ranks
  touch "$JETMOE_FAILED_NODES" # a network file system then forgets what it knew of the folder
  sick=$(cd "$JETMOE_FAILED_NODES" && find . -type f -printf '%P,')
  all=$(tr , '\n' <<<"${sick%,}" | wc -l)
  if [[ ! $sick ]] || ((all == SLURM_JOB_NUM_NODES && all > 1)) || ! others_than "${sick%,}"; then
    echo "no nodes can take the place of what the doctor found: the ranks start all the same" >&2
    find "$JETMOE_FAILED_NODES" -type f -delete
    status=0
  fi
fi
if ((status == 0)); then
  run_ranks "$port" "$trainer" "$run" "$@"
fi
{% else %}
run_ranks "$port" "$trainer" "$run" "$@"
{% endif %}

# --- what follows ---

answer=$(ask_job end --status "$status" ${ended_by:+"$ended_by"} --most "$most" "$run" "$@") || true
if [[ $answer || $status =~ ^[023]$ ]]; then
  known_end=yes
fi
read -r next failed_nodes <<<"$answer" || true
if [[ $next == again && $ended_by != --cancelled ]]; then
  count_fault 0 || true
  if [[ $ended_by == --requeued ]] || queue_again; then
    [[ ! $failed_nodes ]] || leave_out "$failed_nodes"
  fi
fi
exit "$status"
