"""Measures of one pair of videos."""
