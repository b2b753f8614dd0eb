"""What all programs share: errors, files, the environment, the command line."""
