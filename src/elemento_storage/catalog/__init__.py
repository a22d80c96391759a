"""What is on disk: locations, volume directories, locks, quotas, the bin, and an index of it in memory."""
