"""Where snapshots of experts are kept."""

import torch
from torch import Tensor

from mmdd.experts import ExpertBuffer
from mmdd.snapshots import SnapshotCache


class Files(ExpertBuffer):
    """A buffer of numbered vectors that counts what is read."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def read(self, expert: int, snapshot: int) -> Tensor:
        self.asked.append((expert, snapshot))
        return torch.full((25,), 10.0 * expert + snapshot)  # 100 bytes


def test_snapshots_are_read_once_while_they_fit() -> None:
    files = Files()
    cache = SnapshotCache(files, torch.device("cpu"), limit=250)
    for expert, snapshot in ((0, 1), (1, 1), (0, 1), (0, 1)):
        assert cache.read(expert, snapshot)[0] == 10 * expert + snapshot
    assert files.asked == [(0, 1), (1, 1)]
    assert (cache.reads, cache.num_bytes) == (2, 200)
    cache.read(2, 2)  # (1, 1) was not asked for the longest
    assert cache.num_bytes == 200
    cache.read(0, 1)
    assert files.asked == [(0, 1), (1, 1), (2, 2)]
    cache.read(1, 1)
    assert files.asked[-1] == (1, 1)
    nothing = SnapshotCache(files, torch.device("cpu"), limit=50)  # less than one
    assert nothing.read(3, 3)[0] == 33
    assert nothing.num_bytes == 0
    assert SnapshotCache(files, torch.device("cpu")).limit > 100


def test_a_device_keeps_the_first_that_fit_and_the_host_the_rest() -> None:
    files = Files()
    # A device without memory of its own, which no number can be read back from.
    cache = SnapshotCache(files, torch.device("meta"), limit=250, device_limit=250)
    for _ in range(3):
        for expert in range(4):
            assert cache.read(expert, 1).device.type == "meta"
    assert files.asked == [(0, 1), (1, 1), (2, 1), (3, 1)]  # each once, two here and two there
    assert (cache.device_bytes, cache.num_bytes) == (200, 200)
    for expert in (4, 2, 0, 1):  # (2, 1) gave way on the host; nothing gives way on the device
        cache.read(expert, 1)
    assert files.asked[4:] == [(4, 1), (2, 1)]
    assert (cache.device_bytes, cache.num_bytes) == (200, 200)


def test_a_device_without_room_keeps_nothing() -> None:
    files = Files()
    cache = SnapshotCache(files, torch.device("meta"), limit=0, device_limit=99)
    for _ in range(2):
        cache.read(0, 0)
    assert files.asked == [(0, 0), (0, 0)]
    assert (cache.device_bytes, cache.num_bytes) == (0, 0)
