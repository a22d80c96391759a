"""Uploads on disk: what is known of each, its bytes as they arrive, and who writes them. Everything here blocks."""
