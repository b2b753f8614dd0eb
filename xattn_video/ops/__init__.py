"""The method: score blocks, select blocks, attend to the selected ones. Pure functions over tensors."""
