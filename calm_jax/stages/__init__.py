"""Stages of training: one file and one row of `table.STAGES` a stage; all else asks the table."""
