"""HTTP and nothing else: routes, JSON, statuses, who is calling."""
