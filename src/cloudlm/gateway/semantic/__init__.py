"""Answers to questions that mean the same: vectors propose, guards refuse, a calibration tells how
often that goes wrong."""
