"""How the demo's models were trained and its tensors captured. Part of the checkout, of no wheel."""
