"""What the other hosts do where the first one talks: read and decode the same, so that all have their parts."""

from ..bundle.loading import KVPModel
from ..device.hosts import Hosts
from .context import Context
from .dial import Dial
from .reply import reply


def follow(model: KVPModel, hosts: Hosts) -> None:
    """Do what the first host's ``reply`` does, request after request, until it has finished."""
    context = Context(model)
    while (request := hosts.hear()) is not None:
        context.keep(request["cached"])
        for _ in reply(context, request["ids"], Dial(**request["dial"]), **request["how"]):
            pass
