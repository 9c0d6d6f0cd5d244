#!/usr/bin/env bash
# The ranks of one host, as `hosts.sh` starts them: FOLDER HOST HOSTS ENDPOINT START LOGS RUN.yaml [section.key=value ...]

set -euo pipefail

cd "$1"
host=$2 hosts=$3 endpoint=$4 start=$5 logs=$6
shift 6

{% include "environment.sh" %}

export JETMOE_NODE=$host JETMOE_RANK_LOGS=$logs JETMOE_FAILED_NODES=$logs/failed_nodes
echo $$ >"$logs/$host.pid"
exec "$python" -m jetmoe_megatron.launch.elastic \
  --nnodes="$hosts" --nproc-per-node="$ranks_per_node" --max-restarts=0{{ numa_binding }} \
  --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$start" {{ trainer | quote }} "$@"
