#!/usr/bin/env bash
# {{ title }}
#
#   bash {{ usage }} [section.key=value ...]
#
# Rendered by `jetmoe launch`. After a failure the run starts again{% if ssh %}, without the host that failed if there are others{% endif %}. See docs/launch.md.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd {{ folder | quote }} # where it was launched: paths of the run file start there
run={{ run | quote }}
hosts=({{ hosts }})
nodes={{ nodes }}

{% include "python.sh" %}

# --- signals: the ranks save and stop, and the run does not start again ---

# As USR1, which a terminal does not send to the ranks too: a second signal of one kind would end them at once. A host
# whose launcher does not listen yet finds the file `stop`.
signalled=
ended_by=
chosen=()
logs=
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  signalled=yes ended_by=--cancelled
  [[ $logs ]] || return 0
  touch "$logs/stop" || true
  for host in "${chosen[@]}"; do
    [[ ! -f $logs/$host.pid ]] || on "$host" kill -USR1 "$(cat "$logs/$host.pid")" 2>/dev/null || true
  done
}
trap pass_on INT TERM HUP USR1

{% if ssh %}
on() {
  local host=$1
  shift
  # A host that dies is noticed within two minutes.
  ssh -n -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=8 "$host" \
    "$(printf '%q ' "$@")"
}
{% else %}
on() { "${@:2}"; }
{% endif %}

here() { "$@"; }
{% include "around_ranks.sh" %}

# --- starts ---

job=$(date -u +%Y%m%dT%H%M%SZ)
left_out=" "
for ((number = 0; ; number++)); do
  start=$job-$number
  chosen=()
  for host in "${hosts[@]}"; do
    [[ ${#chosen[@]} -ge $nodes || $left_out == *" $host "* ]] || chosen+=("$host")
  done
  logs=
  [[ ! $ended_by ]] || exit 143
  logs=$(ask_job begin --nodes "$(IFS=,; echo "${chosen[*]}")" "$run" "$@")
  endpoint={{ endpoint }}
  pids=()
  for host in "${chosen[@]}"; do
    on "$host" bash "$here/host.sh" "$PWD" "$host" "$nodes" "$endpoint" "$start" "$logs" "$run" "$@" &
    pids+=($!)
  done
  [[ ! $ended_by ]] || pass_on # the signal came before all of them were there
  status=0
  for number_of_host in "${!pids[@]}"; do
    pid=${pids[number_of_host]}
    # A trapped signal ends `wait` early: repeat it until it ends without one.
    while
      signalled=
      ended=0
      wait "$pid" || ended=$?
      [[ $signalled ]]
    do :; done
{% if ssh %}
    if ((ended == 255)); then
      lost=$logs/failed_nodes/${chosen[number_of_host]}
      [[ -e $lost ]] || echo "ssh lost it" >"$lost" || true
      ended=4 # its ranks may still run: the next start waits for the run folder
    fi
{% endif %}
    ((ended <= status)) || status=$ended
  done
  answer=$(ask_job end --status "$status" ${ended_by:+"$ended_by"} --most {{ starts_without_progress }} "$run" "$@") || true
  read -r next {{ "failed" if ssh else "_" }} <<<"$answer" || true
  [[ $next == again && ! $ended_by ]] || exit "$status"
{% if ssh %}
  left_out+=${failed//,/ }" "
  others=0
  for host in "${hosts[@]}"; do [[ $left_out == *" $host "* ]] || others=$((others + 1)); done
  if ((others < nodes)); then
    echo "no other hosts are left: the next start takes all of them again" >&2
    left_out=" "
  fi
{% endif %}
done
