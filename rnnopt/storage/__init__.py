"""Files on disk: atomic writes, run folders, and the provenance of results."""
