# Before the ranks start, and after they have ended: `launch/job.py` keeps the record of starts, and says what follows. A
# fault of the file system may pass.
job_begins() { # its arguments; prints the folder of this start
  local folder
  for _ in {1..5}; do
    # The last line: a container may print its own.
    if folder=$(here "$python" -m jetmoe_megatron.launch.job begin "$start" "$@" | tail -n 1); then
      echo "$folder"
      return 0
    else
      status=$?
      ((status == 1)) || return "$status" # wrong input, or no Python
    fi
    sleep 60 >/dev/null
  done
  return 1
}
job_ends() { # its arguments; prints what follows: `again` or `stop`, and the nodes to leave out
  local answer
  for _ in {1..5}; do
    if answer=$(here "$python" -m jetmoe_megatron.launch.job end "$start" "$@" | tail -n 1); then
      echo "$answer"
      return 0
    else
      status=$?
      ((status == 1)) || return "$status"
    fi
    sleep 60 >/dev/null
  done
  return 1
}
