"""Studies whose results the project keeps. Part of the checkout, of no wheel."""
