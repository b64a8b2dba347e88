"""What every command does alike: its folder, logs, provenance, progress, signals, faults and exit codes."""
