"""The client gateway (contract, section 9): the daemon on a user's machine that the vendor's clients talk to.

It knows who the user is and which storage servers there are. The client face (port 27777) asks all of them at once and
merges what they say; the login face (port 47777) takes a user's password once and remembers the account on this machine
that gave it. Nothing is kept about volumes: each answer is made of what the servers say at that moment, and a server
that does not answer within the set patience is left out, by name.

    app ── login_face ── sessions ── passwords          callers: which account is at the other end
     └──── client_face ─ volumes (merging)
              └── fleet ─ storage_server ── trust        discovery: servers that announce themselves
"""
