"""A pool of a Ceph cluster: connections, images, and what several servers agree on.

Everything in here blocks, and comes back within the time-outs of the connection: call it in a thread. What goes wrong
is an OSError (``CephFault``), as with a file system.
"""
