"""`jetmoe doctor`: is this machine, or this cluster, fit to train? docs/doctor.md says how to read what it prints.

Start reading at `here.py` (one machine, no ranks) and `ranks.py` (all ranks of a job).
"""
