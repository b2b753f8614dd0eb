"""Programs around the library: a prompt file to videos, the demo, the doctor."""
