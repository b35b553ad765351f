"""Snapshots of experts where they are quickest to reach: device, memory of the host, disk."""

from collections import OrderedDict

import psutil
import torch
from torch import Tensor

from mmdd.devices import upload
from mmdd.experts import ExpertBuffer

_MOST_BYTES = 4 * 2**30  # of snapshots kept in memory, where a quarter of what is free is not less


class SnapshotCache:
    """Snapshots of experts, each read from the disk once as long as they fit somewhere.

    device_limit: bytes to keep on a GPU, by default a quarter of what is free there; the first
    ones stay. What does not fit is kept in (pinned) memory of the host up to `limit` bytes, by
    default a quarter of what is free, at most 4 GiB; there the snapshots that were not asked for
    the longest give way, and are read from the disk again. Book: notebooks/08_mdm.
    """

    def __init__(
        self,
        buffer: ExpertBuffer,
        device: torch.device,
        limit: int | None = None,
        device_limit: int | None = None,
    ) -> None:
        if limit is None:
            limit = min(_MOST_BYTES, psutil.virtual_memory().available // 4)
        if device_limit is None:
            device_limit = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
        self.buffer, self.device, self.limit = buffer, device, limit
        self.device_limit = device_limit
        self.num_bytes = self.device_bytes = 0
        self.reads = 0  # from the disk
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._on_device: dict[tuple[int, int], Tensor] = {}

    def read(self, expert: int, snapshot: int) -> Tensor:
        """What `ExpertBuffer.read` gives, on the device; not to be changed."""
        key = (expert, snapshot)
        if key in self._on_device:
            return self._on_device[key]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].to(self.device, non_blocking=True)
        flat = self.buffer.read(expert, snapshot)
        self.reads += 1
        if self.device_bytes + flat.nbytes <= self.device_limit:
            self._on_device[key] = upload(flat, self.device)
            self.device_bytes += flat.nbytes
            return self._on_device[key]
        if self.device.type == "cuda" and flat.nbytes <= self.limit:
            flat = flat.pin_memory()
        self._kept[key] = flat
        self.num_bytes += flat.nbytes
        while self.num_bytes > self.limit:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return flat.to(self.device, non_blocking=True)
