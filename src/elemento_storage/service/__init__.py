"""The use cases: each reads as lock, check, do, record."""
