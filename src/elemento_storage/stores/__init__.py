"""Where bytes live. ``STORES`` says which store keeps a format."""
