"""The rows that the project keeps, and how they are written."""
