"""A prompt file to videos: what to make, how, and what is there already."""
