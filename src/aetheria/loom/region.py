"""The memory that a training process and its sidecar share: commands one way, reports the other, signs of life.

Neither side ever waits for the other. What the sidecar writes: the commands (slots), the command word, its own sign of
life, how far it has read. What the training process writes: the rings, its sign of life, that a slot is free again.
Words are 8 bytes, aligned, and read and written in one piece.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import time
from zlib import crc32

from loguru import logger

from aetheria.errors import HubError
from aetheria.loom.ring import CURSOR_WORDS, RING_WORDS, RingReader, RingWriter
from aetheria.loom.subjects import COMMANDS_ON_THE_WAY
from aetheria.protocol import COMMAND_BYTES

__all__ = ["EVENT_BYTES", "LAYOUT", "METRIC_BYTES", "SLOTS", "Region"]

LAYOUT = 2  # both processes are of the same version, or they do not talk
SLOTS = COMMANDS_ON_THE_WAY
METRIC_BYTES = 4 << 20
EVENT_BYTES = 1 << 20

_MAGIC = int.from_bytes(b"AETHLOOM", "little")
_HEADER_BYTES = 4096
_SLOT_HEAD = 64  # bytes: state, order, length, checksum
_SLOT_BYTES = _SLOT_HEAD + COMMAND_BYTES
_FREE, _FULL = 0, 1

# Which word says what. Those that different processes write lie 64 bytes apart, so that they share no cache line.
_MAGIC_WORD, _LAYOUT_WORD, _SIZE_WORD, _ID_WORD, _METRIC_SIZE_WORD, _EVENT_SIZE_WORD = range(6)
_COMMAND_WORD = 8
_TRAINER_TIME, _TRAINER_STEP, _CLOSING = 16, 17, 18
_SIDECAR_TIME, _SIDECAR_PID, _HUB_KNOWN, _RECORDED_STEP, _RECORDED_ANY = 24, 25, 26, 27, 28
_METRIC_RING, _EVENT_RING = 32, 40
_CURSORS = {"metrics sent": 48, "metrics recorded": 56, "events sent": 64, "events recorded": 72}


class Region:
    """Shared memory, seen from either side.

    Attributes:
        descriptor: the open file behind it; close-on-exec.
        id: told apart from every other region, for names of what passes through it.
        word: the command word: one word of format "Q" that changes whenever there is a command to take.
        metrics: the ring of metrics, 4 MB: the training process writes.
        events: the ring of outcomes and events, 1 MB: the training process writes.
    """

    def __init__(self, descriptor: int) -> None:
        """Maps an open file that `create` made.

        Raises:
            HubError: it is none, or of another version.
        """
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        if size < _HEADER_BYTES:
            raise HubError(f"a region of {size} bytes is no region.")
        whole = memoryview(mmap.mmap(descriptor, size))
        self._words = words = whole.cast("Q")
        if words[_MAGIC_WORD] != _MAGIC or words[_LAYOUT_WORD] != LAYOUT or words[_SIZE_WORD] != size:
            raise HubError(
                f"the shared memory is of layout {words[_LAYOUT_WORD]}, this process knows layout {LAYOUT}: was "
                "Aetheria upgraded while the run was going on? Restart the run."
            )
        self.id = f"{words[_ID_WORD]:016x}"
        self.word = words[_COMMAND_WORD : _COMMAND_WORD + 1]
        self._whole = whole
        metric_start = _HEADER_BYTES + SLOTS * _SLOT_BYTES
        event_start = metric_start + words[_METRIC_SIZE_WORD]
        self._metric_words = words[_METRIC_RING : _METRIC_RING + RING_WORDS]
        self._event_words = words[_EVENT_RING : _EVENT_RING + RING_WORDS]
        self._metric_data = whole[metric_start:event_start]
        self._event_data = whole[event_start : event_start + words[_EVENT_SIZE_WORD]]
        self.metrics = RingWriter(self._metric_words, self._metric_data)
        self.events = RingWriter(self._event_words, self._event_data)
        self._taken_at = 0  # the command word as of the last look into the slots
        self._damaged = 0

    @classmethod
    def create(cls, *, metric_bytes: int = METRIC_BYTES, event_bytes: int = EVENT_BYTES) -> Region:
        """Makes a region. It has no name: it ends with the last process that has it open.

        Where there is no `memfd_create` (macOS, some sandboxes) it is a file in the folder for temporary ones, whose
        name is taken away at once.
        """
        size = _HEADER_BYTES + SLOTS * _SLOT_BYTES + metric_bytes + event_bytes
        descriptor = _anonymous_file()
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as memory, memoryview(memory) as whole, whole.cast("Q") as words:
            words[_LAYOUT_WORD] = LAYOUT
            words[_SIZE_WORD] = size
            words[_ID_WORD] = secrets.randbits(64)
            words[_METRIC_SIZE_WORD] = metric_bytes
            words[_EVENT_SIZE_WORD] = event_bytes
            words[_MAGIC_WORD] = _MAGIC
        region = cls(descriptor)
        region._touch()
        return region

    def _touch(self) -> None:
        """Has the system find memory for the metrics now, once (4 ms), and not little by little between two steps."""
        pages = self._metric_data[:: mmap.PAGESIZE]
        pages[:] = bytes(len(pages))

    def close(self) -> None:
        """Closes the file. What is mapped stays so until nobody holds it: a loop may still look at the word."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    # --- commands, on the sidecar's side ---------------------------------------------------------------------------
    def offer(self, data: bytes) -> bool:
        """Puts a command into a free slot. Returns whether there was one.

        Raises:
            ValueError: it is longer than any command.
        """
        if len(data) > COMMAND_BYTES:
            raise ValueError(f"a command of {len(data):,} bytes; at most {COMMAND_BYTES:,} are possible.")
        words = self._words
        for slot in range(SLOTS):
            head = self._slot(slot)
            if words[head] == _FREE:
                start = head * 8 + _SLOT_HEAD
                self._whole[start : start + len(data)] = data
                words[head + 1] = words[_COMMAND_WORD] + 1
                words[head + 2] = len(data)
                words[head + 3] = crc32(data)
                words[head] = _FULL
                words[_COMMAND_WORD] += 1
                return True
        return False

    def announce(self) -> None:
        """Changes the command word if there is something to take: a sidecar that was killed may not have come to it."""
        if self.full:
            self._words[_COMMAND_WORD] += 1

    @property
    def full(self) -> int:
        """How many slots hold a command that was not taken."""
        return sum(self._words[self._slot(slot)] == _FULL for slot in range(SLOTS))

    # --- commands, on the training process's side ------------------------------------------------------------------
    def take(self) -> list[bytes]:
        """Returns the commands in the slots, in the order in which they were offered, and frees their slots."""
        words = self._words
        now = words[_COMMAND_WORD]
        if now == self._taken_at:
            return []
        # While the slots are looked through others are filled: one that comes late must not be found, and one before it
        # not, because its slot had been passed. What the word did not count yet waits for the next look.
        full = [(words[head + 1], head) for head in map(self._slot, range(SLOTS)) if words[head] == _FULL]
        heads = sorted(found for found in full if found[0] <= now)
        taken: list[bytes] = []
        for _, head in heads:
            start = head * 8 + _SLOT_HEAD
            data = bytes(self._whole[start : start + words[head + 2]])
            if crc32(data) != words[head + 3]:
                self._damaged += 1
                if self._damaged < 1000:  # still on its way from one processor to another: look again the next time
                    return taken
            else:
                taken.append(data)
            self._damaged = 0
            words[head] = _FREE
        self._taken_at = now
        return taken

    @staticmethod
    def _slot(slot: int) -> int:
        """Returns the number of the first word of a slot."""
        return (_HEADER_BYTES + slot * _SLOT_BYTES) // 8

    # --- reports ---------------------------------------------------------------------------------------------------
    def reader(self, what: str) -> RingReader:
        """Returns a reader that goes on where the last one of its name was.

        Args:
            what: "metrics sent", "metrics recorded", "events sent" or "events recorded".
        """
        metrics = what.startswith("metrics")
        first = _CURSORS[what]
        return RingReader(
            self._metric_words if metrics else self._event_words,
            self._metric_data if metrics else self._event_data,
            self._whole[first * 8 : (first + CURSOR_WORDS) * 8],
        )

    # --- signs of life ---------------------------------------------------------------------------------------------
    def beat(self, step: int) -> None:
        """The training process is alive, and so far."""
        words = self._words
        words[_TRAINER_STEP] = step
        words[_TRAINER_TIME] = time.monotonic_ns()

    @property
    def step(self) -> int:
        """The step of the training process's last sign of life."""
        return int(self._words[_TRAINER_STEP])

    @property
    def trainer_age(self) -> float:
        """Seconds since the training process's last sign of life."""
        return (time.monotonic_ns() - self._words[_TRAINER_TIME]) / 1e9

    def sidecar_beat(self) -> None:
        """The sidecar is alive."""
        self._words[_SIDECAR_PID] = os.getpid()
        self._words[_SIDECAR_TIME] = time.monotonic_ns()

    @property
    def sidecar_age(self) -> float:
        """Seconds since the sidecar's last sign of life; infinite before the first."""
        last = self._words[_SIDECAR_TIME]
        return (time.monotonic_ns() - last) / 1e9 if last else float("inf")

    @property
    def hub_known(self) -> bool:
        """Whether a hub has ever taken this run in: then what is not delivered to it counts as such."""
        return bool(self._words[_HUB_KNOWN])

    @hub_known.setter
    def hub_known(self, known: bool) -> None:
        self._words[_HUB_KNOWN] = known

    @property
    def closing(self) -> int:
        """0, or until when the sidecar is to have delivered what there is, and to end: in nanoseconds, monotonic."""
        return int(self._words[_CLOSING])

    @closing.setter
    def closing(self, deadline: int) -> None:
        self._words[_CLOSING] = deadline

    @property
    def recorded_step(self) -> int | None:
        """The largest step whose metrics are in run.db; None where there are none."""
        return int(self._words[_RECORDED_STEP]) if self._words[_RECORDED_ANY] else None

    @recorded_step.setter
    def recorded_step(self, step: int) -> None:
        self._words[_RECORDED_STEP] = step
        self._words[_RECORDED_ANY] = 1


def _anonymous_file() -> int:
    """Returns the descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create("aetheria", os.MFD_CLOEXEC)
        except OSError as error:
            logger.debug("No memfd here: {}", error)
    with tempfile.TemporaryFile(prefix="aetheria-") as file:
        return os.dup(file.fileno())
