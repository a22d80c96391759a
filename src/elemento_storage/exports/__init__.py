"""How bytes are offered: one driver per protocol, and the loop that keeps what is served true to what is on disk."""
