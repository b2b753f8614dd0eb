"""A small Wan pipeline of diffusers' and transformers' real classes, and the program that shows it."""
