"""What every experiment needs and none writes: trials, checkpoints, costs, records, the command line, the report."""
