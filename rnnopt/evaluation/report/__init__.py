"""What a run tells: reports, figures, tables, provenance."""
