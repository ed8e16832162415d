"""Where the judge of answers is: an OpenAI-compatible endpoint, named by the environment only (eval/judge/judge.py).

Here, and not with the judge, so that a pipeline can tell before a training that nobody will judge its answers.
"""

import ipaddress
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

from ba_lora.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is; the key shows up in no text made of this."""

    model: str
    base_url: str
    api_key: str = field(repr=False)

    @property
    def public_url(self) -> str:
        """The address without user, password and query, for records and messages."""
        parts = urllib.parse.urlsplit(self.base_url)
        host = parts.hostname or ""
        return urllib.parse.urlunsplit(
            (parts.scheme, f"{host}:{parts.port}" if parts.port else host, parts.path, "", "")
        )

    @property
    def unencrypted_host(self) -> str | None:
        """The host, where it is another machine and the way there is plain http, else None."""
        parts = urllib.parse.urlsplit(self.base_url)
        host = parts.hostname or ""
        try:
            is_here = ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_here = host == "localhost" or host.endswith(".localhost")
        return None if is_here or parts.scheme == "https" else host


def endpoint_from_environment(environ: Mapping[str, str] | None = None) -> Endpoint:
    """Return the endpoint that the environment (os.environ) names. Raises UserError naming the variable to set."""
    environ = os.environ if environ is None else environ
    model = environ.get("JUDGE_MODEL", "").strip()
    if not model:
        raise UserError("JUDGE_MODEL is not set: name the judge, e.g. JUDGE_MODEL=gpt-4-0613")
    own_url = environ.get("JUDGE_BASE_URL", "").strip()
    key = environ.get("JUDGE_API_KEY", "").strip()
    if not own_url:
        key = key or environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "JUDGE_API_KEY is not set: set the key of the judge's endpoint"
            + (" (any text where it needs none)" if own_url else ", or OPENAI_API_KEY for OpenAI's")
        )
    url = own_url or environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        name = "JUDGE_BASE_URL" if own_url else "OPENAI_BASE_URL"
        raise UserError(f"{name} is no http address: give one such as http://127.0.0.1:8000/v1")
    return Endpoint(model, url.rstrip("/"), key)
