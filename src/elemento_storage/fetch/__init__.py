"""Fetching a file over HTTP from servers nobody trusts, for callers nobody trusts either.

http.client of the standard library, in a thread of its own for each download: reads, writes and digests let go of the
interpreter, so the event loop serves others meanwhile. What the library does not do is done here: which addresses may
be connected to, redirects, going on after a broken connection, and limits on everything.
"""
