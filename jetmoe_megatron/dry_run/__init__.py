"""What a start of a run would do, found without starting it (`pretrain_jetmoe.py RUN.yaml --dry-run`)."""
