"""Side by side with the peers, on this machine, in one run: libvirt, qemu-img, a bare web application.

`.venv/bin/python -m bench` writes ``docs/bench.md`` (the tables) and ``build/bench.json`` (every single figure).
"""
