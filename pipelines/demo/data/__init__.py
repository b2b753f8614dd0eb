"""The weights of the demo's models and one set of captured tensors, as the distribution xattn-video-demo-data."""
