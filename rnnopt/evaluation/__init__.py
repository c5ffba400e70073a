"""Honest comparison: tuned baselines, intervals, inspection of a rule, reports."""
