"""Whether the hub can be asked. Without a network its client would try every absent file again for half a minute."""

import functools
import os


@functools.cache
def hub_obstacle() -> str | None:
    """Return why this process cannot ask the hub, None where it can; asked once.

    Without a network the hub's client is set to its cache only, here and in the processes that this one starts.
    """
    import httpx2
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        if not get_session().head(constants.ENDPOINT, timeout=10).is_server_error:
            return None
    except httpx2.TransportError:
        pass
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    return f"{constants.ENDPOINT} cannot be reached"
