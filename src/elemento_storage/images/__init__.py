"""Images from outside: what they are, whether they may be let in, and their way into a format we keep.

Everything here works on files in a directory that was reserved for them, and knows nothing of volumes: a package of its
own below ``service``, so that what looks at hostile bytes can be read, and tested, by itself.
"""
