"""Launch configurations, measured on this GPU."""
