"""Weight-only INT4, for modulation layers."""
