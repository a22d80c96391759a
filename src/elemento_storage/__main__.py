"""``python -m elemento_storage``: the command line."""

from elemento_storage.cli import main

if __name__ == "__main__":
    main()
