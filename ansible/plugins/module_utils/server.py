# Apache-2.0
"""What the modules share: calls to a storage server, over Ansible's own HTTP client."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from ansible.module_utils.urls import open_url
from urllib.error import HTTPError, URLError

ARGUMENTS = {
    "server": {"type": "str", "default": "http://127.0.0.1:7772"},
    "token": {"type": "str", "no_log": True},
    "client": {"type": "str"},
    "ca_path": {"type": "path"},
    "validate_certs": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 60},
}


class Refused(Exception):
    """The server says no; ``code`` is stable, the message is for people."""

    def __init__(self, status, told):
        super().__init__(told.get("error", "no reason given"))
        self.status = status
        self.code = told.get("code", "")
        self.told = told


class Server:
    """A storage server, for the module that runs."""

    def __init__(self, module):
        self._module = module
        self._arguments = module.params
        if urlsplit(self._arguments["server"]).scheme not in ("http", "https"):
            module.fail_json(msg="server has to be http://HOST:PORT or https://HOST:PORT")

    def call(self, path, key=None, **values):
        """The answer to a call. Raises Refused; a server that cannot be reached ends the module."""
        body = {name: value for name, value in values.items() if value is not None}
        headers = {"Content-Type": "application/json"}
        if self._arguments["token"]:
            headers["Authorization"] = f"Bearer {self._arguments['token']}"
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            answer = open_url(
                f"{self._arguments['server'].rstrip('/')}/api/v1.0/{path}",
                method="POST",
                data=json.dumps(body),
                headers=headers,
                timeout=self._arguments["timeout"],
                validate_certs=self._arguments["validate_certs"],
                ca_path=self._arguments["ca_path"],
                follow_redirects="none",
            )
            return json.loads(answer.read())
        except HTTPError as error:
            try:
                told = json.loads(error.read())
            except ValueError:
                told = {}
            raise Refused(error.code, told if isinstance(told, dict) else {}) from None
        except (URLError, OSError, ValueError) as error:
            self._module.fail_json(msg=f"{self._arguments['server']} does not answer: {error}")

    def refuse(self, error):
        """End the module with what the server said."""
        self._module.fail_json(msg=str(error), code=error.code, status=error.status)
