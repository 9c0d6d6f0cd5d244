# --- environment of the ranks ---

{% include "python.sh" %}
{% if tasks == "node" %}
ranks_per_node={{ ranks_per_node }}
{% endif %}
# NCCL says nothing by default. WARN names the cause when a link or a node fails.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Each rank's share of the cores. Without it, torch would start a thread per core in each rank.
share=$(({{ cores }}{{ " / ranks_per_node" if tasks == "node" }}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
# The run folder may still be locked by a node that was lost.
export JETMOE_RESTARTS=${start##*-}
# Compilers of kernels: torch would start up to 32 for each rank.
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
# torch prints the stack of each C++ warning: 25 lines if a node leaves before the others.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Not set here, because the defaults are right: NCCL uses InfiniBand and GPUDirect if it finds them (NCCL_IB_DISABLE,
# NCCL_NET_GDR_LEVEL); torchrun sets TORCH_NCCL_ASYNC_ERROR_HANDLING=1, so that a failed collective ends the rank;
# PyTorch now does by default what TORCH_NCCL_AVOID_RECORD_STREAMS asks for.
{% for variable in environment %}
export {{ variable | assignment }}
{% endfor %}
