"""Prompt files that come with the project."""
