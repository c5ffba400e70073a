"""What a run leaves on the disk: atomic files, run folders, provenance."""
