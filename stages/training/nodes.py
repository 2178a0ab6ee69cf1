"""The machines that train one model together, as each of them knows it: where they meet, and which one this is."""

import fcntl
import socket
import struct
from dataclasses import dataclass, replace

from stages.files.artifacts import Refusal

SIOCGIFADDR = 0x8915  # the address of an interface (netdevice(7))
ANYWHERE = "192.0.2.1"  # of no machine (RFC 5737): the kernel says which of its addresses it would use


@dataclass(frozen=True)
class Nodes:
    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"  # of node 0
    port: int = 0  # 0: the kernel chooses, which only one node can do
    join_seconds: float = 60.0

    def resolved(self) -> "Nodes":
        """With the number of the address, and for node 0 one that the others reach, not the 127.0.1.1 that Debian
        gives a machine's own name."""
        try:
            address = socket.gethostbyname(self.address)
        except OSError as error:
            hint = "engine.master_address is to be an address of node 0 that every node reaches"
            raise Refusal(f"{self.address}: no such host here ({error.strerror}): {hint}") from None
        is_name = address != self.address and self.address != "localhost"
        if self.rank == 0 and is_name and address.startswith("127."):
            address = _address_towards(ANYWHERE)
        return replace(self, address=address)

    def network_environment(self) -> dict[str, str]:
        """So that ranks listen and speak on the interface that leads to node 0, and on no other."""
        own = self.address if self.rank == 0 else _address_towards(self.address)
        interface = _interface_of(own)
        return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface) if interface else {}


ALONE = Nodes()


def _address_towards(other: str) -> str:
    """The address of this machine that packets to another carry; none is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise Refusal(f"{other} cannot be reached from here ({error.strerror})") from None


def _interface_of(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
