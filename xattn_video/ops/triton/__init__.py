"""Triton kernels for scores, selection and attention. The only package that imports triton."""
