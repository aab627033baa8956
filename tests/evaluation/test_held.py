from pathlib import Path

from coin.evaluation.held import HeldNetworks
from coin.networks.adapted import resident_nbytes


def test_what_is_held_stays_within_the_bound_and_uses_it(write_experts):
    paths = [Path(path) for path in write_experts([3] * 8).values()]
    held = HeldNetworks(width=3, memory_mib=1)
    most = 0
    for path in paths:
        held.need([path])
        total = sum(resident_nbytes(network) for network in held._held.values())
        assert total <= 2**20
        most = max(most, total)
    one = resident_nbytes(held[paths[-1]])
    assert most + one > 2**20
