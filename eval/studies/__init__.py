"""Studies whose results the project keeps. Only in a checkout: no wheel has them."""
