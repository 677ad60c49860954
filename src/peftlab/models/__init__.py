"""A name becomes a frozen base with adapters."""
