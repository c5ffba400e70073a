"""The `rnnopt` command: one file for each command."""
