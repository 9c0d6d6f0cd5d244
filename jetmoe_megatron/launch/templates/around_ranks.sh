# Before the ranks start (`begin`) and after they have ended (`end`): keeps the record of starts, and prints the folder of
# this start, or what follows: `again` or `stop`, and the nodes to leave out. A fault of the file system may pass.
ask_job() { # begin or end, and the other arguments of `launch/job.py`
  local what=$1 answer status
  shift
  for _ in {1..5}; do
    # The last line: a container may print its own.
    if answer=$(here "$python" -m jetmoe_megatron.launch.job "$what" "$start" "$@" | tail -n 1); then
      echo "$answer"
      return 0
    else
      status=$?
      ((status == 1)) || return "$status" # wrong input, or no Python
    fi
    sleep 60 >/dev/null
  done
  return 1
}
