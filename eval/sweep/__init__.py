"""Quality and speed over settings."""
