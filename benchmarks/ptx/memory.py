"""Memory that knows more than a GPU's: what belongs to a tensor, what was written, and by whom.

Every byte carries flags beside its value. A load or store is refused, with the instruction that
does it, when it

* touches a byte outside the tensors (global) or the program's allocation (shared);
* is not aligned to its full width, vectors included;
* reads what nobody has written;
* stores different values to one address, from lanes of an instruction or from two programs;
* in shared memory, meets an access by another warp since the last barrier, one of them a store.

The last is a happens-before check by warps: what the threads of a warp do is taken to be ordered,
which holds for the code that Triton emits (`bar.warp.sync` and shuffles), and time is counted in
barriers of the whole program. It depends on no timing: a race is noticed even where the order in
which the threads are run here happens to give the right result.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Fault", "Global", "Memory", "Shared"]

SEVERAL = -2  # readers of a byte: more than one warp
Array = np.ndarray


class Fault(Exception):
    """Something that the compiled program must not do."""


@dataclass(frozen=True)
class Access:
    """The lanes of one instruction that take part, what each moves, and for which messages."""

    addresses: Array  # (lanes,) int64
    warps: Array  # (lanes,)
    size: int
    """bytes of an element"""
    count: int
    """elements a lane"""
    what: str

    @property
    def bytes(self) -> Array:
        """(lanes, size * count) addresses of bytes."""
        return self.addresses[:, None] + np.arange(self.size * self.count)


class Memory:
    """Bytes from address `base` on; none may be used until it is allotted."""

    kind = "memory"

    def __init__(self, size: int, base: int = 0) -> None:
        self.base = base
        self.data = np.zeros(size, np.uint8)
        self.allotted = np.zeros(size, bool)
        self.written = np.zeros(size, bool)

    def load(self, access: Access) -> list[Array]:
        """Elements as uint64, one array of lanes for each of a vector."""
        at = self._checked(access)
        if not self.written[at].all():
            raise Fault(f"{access.what}: reads {self.kind} memory that nobody has written")
        self.note_read(at, access)
        data = self.data[at].reshape(len(at), access.count, access.size).astype(np.uint64)
        places = np.arange(access.size, dtype=np.uint64) * np.uint64(8)
        return list((data << places).sum(2, dtype=np.uint64).T)

    def store(self, access: Access, values: list[Array]) -> None:
        """Write the elements of each lane."""
        at = self._checked(access)
        places = np.arange(access.size, dtype=np.uint64) * np.uint64(8)
        elements = np.stack(values, 1)[:, :, None]  # (lanes, count, 1)
        data = (elements >> places & np.uint64(255)).astype(np.uint8).reshape(at.shape)
        self.note_write(at, data, access)
        self.data[at] = data
        if (self.data[at] != data).any():
            raise Fault(f"{access.what}: lanes disagree about what one address holds")
        self.written[at] = True

    def _checked(self, access: Access) -> Array:
        """Indices of bytes, all allotted."""
        width = access.size * access.count
        if (access.addresses % width).any():
            raise Fault(f"{access.what}: misaligned for {width} bytes")
        at = access.bytes - self.base
        inside = (at >= 0) & (at < self.data.size)
        if not inside.all() or not self.allotted[at].all():
            raise Fault(f"{access.what}: out of bounds of {self.kind} memory")
        return at

    def note_read(self, at: Array, access: Access) -> None:
        """Remember who read; nothing to do here."""

    def note_write(self, at: Array, data: Array, access: Access) -> None:
        """Remember who wrote; nothing to do here."""


class Global(Memory):
    """Tensors, at addresses that keep their alignment, with gaps between them."""

    kind = "global"
    GAP = 4096

    def __init__(self, size: int) -> None:
        super().__init__(size, base=1 << 28)
        self.top = self.GAP
        self.stored = np.zeros(size, bool)  # in this launch

    def put(self, data: Array, shift: int, written: Array | None) -> int:
        """Allot bytes at an address that is `shift` modulo 256; return it."""
        at = self.top + shift
        span = slice(at, at + data.size)
        self.data[span] = data
        self.allotted[span] = True
        self.written[span] = True if written is None else written
        self.top = (at + data.size + self.GAP + 255) // 256 * 256
        return self.base + at

    def note_write(self, at: Array, data: Array, access: Access) -> None:
        """Two programs may store to one address only what is equal."""
        if (self.stored[at] & (self.data[at] != data)).any():
            raise Fault(f"{access.what}: written twice in one launch, differently")
        self.stored[at] = True


class Shared(Memory):
    """A program's shared memory, and the accesses since its last barrier."""

    kind = "shared"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.allotted[:] = True
        self.epoch = 1  # barriers passed
        self.writes, self.reads = np.zeros(size, int), np.zeros(size, int)  # epoch of the last
        self.writer, self.reader = np.zeros(size, int), np.zeros(size, int)  # warps

    def barrier(self) -> None:
        """All accesses so far are over for all threads."""
        self.epoch += 1

    def note_read(self, at: Array, access: Access) -> None:
        """Refuse to read what another warp wrote since the barrier."""
        at, warp = (a.reshape(-1) for a in np.broadcast_arrays(at, access.warps[:, None]))
        if ((self.writes[at] == self.epoch) & (self.writer[at] != warp)).any():
            raise Fault(f"{access.what}: race, reads another warp's store without a barrier")
        again = (self.reads[at] == self.epoch) & (self.reader[at] != warp)
        self.reader[at] = np.where(again, SEVERAL, warp)
        self.reader[at[self.reader[at] != warp]] = SEVERAL  # several in this one instruction
        self.reads[at] = self.epoch

    def note_write(self, at: Array, data: Array, access: Access) -> None:
        """Refuse to write what another warp read, or wrote otherwise, since the barrier."""
        warp = np.broadcast_to(access.warps[:, None], at.shape)
        if ((self.reads[at] == self.epoch) & (self.reader[at] != warp)).any():
            raise Fault(f"{access.what}: race, stores over another warp's load without a barrier")
        other = (self.writes[at] == self.epoch) & (self.writer[at] != warp)
        if (other & (self.data[at] != data)).any():
            raise Fault(f"{access.what}: race, stores over another warp's store without a barrier")
        self.writes[at], self.writer[at] = self.epoch, warp

    def begin_copy(self, access: Access) -> None:
        """An asynchronous copy may land from now on: nobody may read until it is waited for."""
        at = self._checked(access)
        self.note_write(at, self.data[at], access)
        self.written[at] = False
