"""Elemento Storage Server: keeps the disks of virtual machines and puts them within reach of hypervisors."""

__version__ = "0.1.0"

API_VERSION = "v1.0"
