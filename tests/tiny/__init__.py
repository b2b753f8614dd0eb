"""Tiny pipelines of real diffusers classes, built from configuration: nothing is downloaded."""
