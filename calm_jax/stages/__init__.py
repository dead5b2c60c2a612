"""Stages of training: a stage is one file here and one row of `table.STAGES`."""
