"""What looks at a run: snapshots, measures, plots, the report, BLiMP, timing."""
