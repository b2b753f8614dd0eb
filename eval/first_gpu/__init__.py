"""A first look at an H100 or H200 in under eight minutes: `make first-gpu`."""
