"""Real guests for end-to-end tests: what they boot, how they are started and moved, and what their disk must hold."""
