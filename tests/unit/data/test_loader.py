"""What a user's loader becomes: the same batches from any cursor on, whoever reads them, and nobody else disturbed."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from aetheria.core import MicroBatch
from aetheria.data import BatchSource, Cursor, prepare_loader
from aetheria.data.keyed import draws_nothing
from aetheria.data.randomness import GeneratorStates, isolated_generators
from aetheria.data.sources import FixedSource, batch_size_of
from aetheria.errors import DataError
from aetheria.snapshot.format import plain

LENGTH, SIZE, EPOCHS = 22, 4, 3  # the last batch of an epoch is a short one

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


def noise() -> Tensor:
    """Draws from all three global generators, from NumPy's and Python's in a way that leaves something behind."""
    return 0.1 * torch.tensor([float(torch.rand(())), float(np.random.randn()), random.gauss(0, 1)])


# --- data sets ------------------------------------------------------------------------------------------------------
class Noisy(Dataset[Tensor]):
    """Augments every sample with all three global generators. The second column is the sample's id."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([torch.tensor([float(index)]), noise()])


class OnlySeveral(Dataset[Tensor]):
    """Can only be asked for several samples at once."""

    def __len__(self) -> int:
        return LENGTH

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [Noisy()[index] for index in indices]


class Named(Dataset[Tensor]):
    """Indexed by names. Its length is nobody's business."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([torch.tensor([float(name.removeprefix("sample "))]), noise()])


class Batches(Dataset[Tensor]):
    """Each item is a batch already."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([Noisy()[3 * index + place] for place in range(3)])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(LENGTH):
            yield Noisy()[index]


class ToldStream(Stream):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        return (sample + 100 * self.epoch for sample in super().__iter__())


class PositionStream(Stream):
    """Goes on from its position, whoever set it, and remembers how often it was read."""

    def __init__(self) -> None:
        self.position = self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < LENGTH:
            self.position += 1
            yield Noisy()[self.position - 1] + 100 * self.passes
        self.position = 0
        self.passes += 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.passes = state["position"], state["passes"]


class StartStream(Stream):
    """Begins where it was told to, once; at the end of an epoch its state is that of the end."""

    start = current = 0

    def __iter__(self) -> Iterator[Tensor]:
        begin, self.start = self.start, 0
        for index in range(begin, LENGTH):
            self.current = index + 1
            yield Noisy()[index]

    def state_dict(self) -> dict[str, int]:
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.current = state["current"]


class ForgetfulStream(PositionStream):
    """Is told the epoch, and then begins at the beginning."""

    def set_epoch(self, epoch: int) -> None:
        self.position, self.passes = 0, epoch


# --- samplers and loaders -------------------------------------------------------------------------------------------
class Growing(Sampler[list[int]]):
    """A batch sampler that carries a generator and a counter from one epoch to the next."""

    def __init__(self, batch_size: int = SIZE) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.epochs = 0
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        for _ in range(3 + self.epochs):
            yield torch.randint(LENGTH, (self.batch_size,), generator=self.generator).tolist()


class Backwards(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH - 1, -1, -1))


class TwoOfEach(DataLoader[Tensor]):
    """A loader that iterates in a way of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch + noise().sum()


class StatefulLoader:
    """A loader made by hand, of the protocol that torchdata made known."""

    def __init__(self) -> None:
        self.taken = self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.taken, 5):
            self.taken = number + 1
            yield torch.stack([Noisy()[4 * number + place] for place in range(4)]) + 100 * self.passes
        self.taken = 0
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.passes = state["taken"], state["passes"]


class BareStream:
    """An iterable of batches that is no DataLoader, with a state."""

    def __init__(self) -> None:
        self.inner = PositionStream()
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def __iter__(self) -> Iterator[Tensor]:
        return (sample.reshape(1, -1) for sample in self.inner)


class LazyBatches(Sequence[Tensor]):
    """Makes a batch when it is asked for it."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: Any) -> Tensor:
        return torch.stack([Noisy()[4 * number + place] for place in range(4)])


def masking(samples: list[Tensor]) -> Tensor:
    """A collate function that draws, as those for masked language models do."""
    batch = default_collate(samples)
    return batch * (torch.rand_like(batch) > 0.3) + float(np.random.rand()) + random.random()


def masking_one(sample: Tensor) -> Tensor:
    return masking([sample])


def endless() -> Iterator[Tensor]:
    number = 0
    while True:
        yield torch.stack([Noisy()[number]] * 2)
        number += 1


def stateful_data_loader(**options: Any) -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(**options)


MADE = {
    "shuffled": lambda: DataLoader(Noisy(), SIZE, shuffle=True),
    "sequential": lambda: DataLoader(Noisy(), SIZE),
    "drop_last": lambda: DataLoader(Noisy(), SIZE, shuffle=True, drop_last=True),
    "of batches": lambda: DataLoader(Batches(), batch_size=None, shuffle=True),
    "of batches, own sampler": lambda: DataLoader(Batches(), batch_size=None, sampler=[4, 0, 0, 2]),
    "no augmentation": lambda: DataLoader(TensorDataset(torch.arange(22.0)), SIZE, shuffle=True),
    "masking collate": lambda: DataLoader(TensorDataset(torch.arange(22.0)).tensors[0], SIZE, collate_fn=masking),
    "augmentation and masking": lambda: DataLoader(Noisy(), SIZE, shuffle=True, collate_fn=masking),
    "only __getitems__": lambda: DataLoader(OnlySeveral(), SIZE, shuffle=True),
    "subset of only __getitems__": lambda: DataLoader(Subset(OnlySeveral(), range(3, 20)), SIZE, shuffle=True),
    "names": lambda: DataLoader(Named(), SIZE, sampler=[f"sample {n}" for n in (5, 2, 9, 2, 0, 7)]),
    "own sampler": lambda: DataLoader(Noisy(), SIZE, sampler=Backwards()),
    "weighted": lambda: DataLoader(Noisy(), SIZE, sampler=WeightedRandomSampler([1.0] * 10 + [3.0] * 12, 18)),
    "weighted, own generator": lambda: DataLoader(
        Noisy(), SIZE, sampler=WeightedRandomSampler([1.0] * LENGTH, 18, generator=torch.Generator().manual_seed(1))
    ),
    "with replacement": lambda: DataLoader(Noisy(), SIZE, sampler=RandomSampler(Noisy(), replacement=True)),
    "some of them": lambda: DataLoader(Noisy(), SIZE, sampler=RandomSampler(Noisy(), num_samples=9)),
    "half, in order": lambda: DataLoader(Noisy(), SIZE, sampler=SequentialSampler(range(11))),
    "given BatchSampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 5, True)),
    "given BatchSampler, own sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(Backwards(), SIZE, drop_last=False)
    ),
    "own batch sampler": lambda: DataLoader(Noisy(), batch_sampler=Growing()),
    "told the epoch": lambda: DataLoader(Noisy(), 3, sampler=DistributedSampler(Noisy(), num_replicas=2, rank=1)),
    "list of lists": lambda: DataLoader(Noisy(), batch_sampler=[[1, 2], [3], [4, 5, 6]]),
    "list": lambda: [torch.full((3,), float(number)) for number in range(6)],
    "tuple": lambda: tuple(torch.full((3,), float(number)) for number in range(6)),
    "lazy sequence": LazyBatches,
    "iterable": lambda: DataLoader(Stream(), SIZE),
    "iterable, drop_last": lambda: DataLoader(Stream(), SIZE, drop_last=True),
    "iterable of batches": lambda: DataLoader(Stream(), batch_size=None, collate_fn=masking_one),
    "iterable, masking": lambda: DataLoader(Stream(), SIZE, collate_fn=masking),
    "iterable, told the epoch": lambda: DataLoader(ToldStream(), SIZE),
    "stateful iterable, position": lambda: DataLoader(PositionStream(), SIZE),
    "stateful iterable, start": lambda: DataLoader(StartStream(), SIZE),
    "stateful iterable, told the epoch": lambda: DataLoader(ForgetfulStream(), SIZE),
    "stateful iterable, bare": BareStream,
    "stateful loader": StatefulLoader,
    "own way": lambda: TwoOfEach(Noisy(), SIZE, shuffle=True),
}


LIMITED = {
    "generator": endless,
    "mapped generator": lambda: map(torch.neg, endless()),
    **{f"limited: {kind}": make for kind, make in MADE.items()},
}
WORKERS = {
    "shuffled": lambda **options: DataLoader(Noisy(), SIZE, shuffle=True, **options),
    "of batches": lambda **options: DataLoader(Batches(), batch_size=None, **options),
    "masking collate": lambda **options: DataLoader(Noisy(), SIZE, shuffle=True, collate_fn=masking, **options),
    "own batch sampler": lambda **options: DataLoader(Noisy(), batch_sampler=Growing(), **options),
    "weighted": lambda **options: DataLoader(Noisy(), SIZE, sampler=WeightedRandomSampler([1.0] * 22, 18), **options),
    "names": lambda **options: DataLoader(Named(), SIZE, sampler=[f"sample {n % 7}" for n in range(11)], **options),
    "iterable": lambda **options: DataLoader(Stream(), SIZE, **options),
    "iterable, told the epoch": lambda **options: DataLoader(ToldStream(), SIZE, collate_fn=masking, **options),
}
TORCHDATA = {
    "map-style": lambda: stateful_data_loader(dataset=Noisy(), batch_size=SIZE, shuffle=True),
    "iterable": lambda: stateful_data_loader(dataset=PositionStream(), batch_size=SIZE),
}


# --- reading ---------------------------------------------------------------------------------------------------------
def taken(batch: MicroBatch) -> tuple[list[Any], int, list[Any] | None]:
    data = batch.data[0] if isinstance(batch.data, list) else batch.data
    return data.tolist(), batch.size, None if batch.ids is None else batch.ids.tolist()


def source_of(loader: Iterable[Any], **options: Any) -> BatchSource:
    return prepare_loader(loader, **{"role": "train", "seed": 7} | options)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Returns what is left of a state that went through a snapshot."""
    buffer = io.BytesIO()
    torch.save(plain(state, "loader"), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)  # type: ignore[no-any-return]


@dataclasses.dataclass
class Read:
    """A loader that was read whole: the batches of each epoch, and where the reader stood before each of them."""

    epochs: list[list[Any]]
    cursors: list[list[Cursor]]
    states: list[list[dict[str, Any]]]


def read_whole(source: BatchSource, epochs: int = EPOCHS) -> Read:
    read = Read([], [], [])
    cursor = Cursor()
    for _ in range(epochs):
        batches, cursors, states = [], [dataclasses.replace(cursor)], [saved(source.state_dict())]
        for batch in source.iterate(cursor):
            batches.append(taken(batch))
            cursor.advance(1, batch.size)
            cursors.append(dataclasses.replace(cursor))
            states.append(saved(source.state_dict()))
        cursor.next_epoch()
        for kept, found in ((read.epochs, batches), (read.cursors, cursors), (read.states, states)):
            kept.append(found)  # type: ignore[attr-defined]
    return read


def undisturbed(action: Callable[[], Any]) -> Any:
    """Runs something, and checks that it leaves the global generators of this process as they were."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    noise()  # leaves half a pair of normal numbers in two of the generators
    before = GeneratorStates.capture().to_plain()
    result = action()
    after = GeneratorStates.capture().to_plain()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]
    assert before["python"] == after["python"]
    return result


def check_every_cursor(make: Callable[[], Iterable[Any]], places: set[int] | None = None, **options: Any) -> Read:
    """Checks that a fresh loader, begun at any place, gives what one that was read whole gave from there on."""

    def prepared() -> BatchSource:
        with isolated_generators(5):  # as the data module's hooks are
            loader = make()
        return source_of(loader, **options)

    whole = undisturbed(lambda: read_whole(prepared()))
    assert len(whole.epochs[0]) >= 2
    for epoch in range(EPOCHS):
        for place in range(len(whole.epochs[epoch]) + 1):
            if places is not None and place not in places:
                continue
            torch.manual_seed(epoch * 100 + place)  # a process of its own has generators of its own
            source = prepared()
            source.load_state_dict(whole.states[epoch][place])
            cursor = dataclasses.replace(whole.cursors[epoch][place])
            for later in range(epoch, EPOCHS):
                rest = [taken(batch) for batch in source.iterate(dataclasses.replace(cursor))]
                assert rest == whole.epochs[later][cursor.batches :], f"from epoch {epoch}, batch {place}"
                cursor.next_epoch()
    return whole


@pytest.mark.parametrize("kind", MADE)
def test_a_loader_begun_anywhere_gives_what_it_gives_when_it_is_read_whole(kind: str) -> None:
    check_every_cursor(MADE[kind])


@pytest.mark.parametrize("kind", LIMITED)
def test_also_with_a_limit(kind: str) -> None:
    whole = check_every_cursor(LIMITED[kind], limit=2)
    counts = [len(batches) for batches in whole.epochs]
    assert counts == [2] * EPOCHS or ("stateful" in kind and counts == [2, 2, 1]), "one with a state goes on to its end"


@pytest.mark.parametrize("kind", ["stateful iterable, position", "stateful iterable, start", "stateful loader"])
def test_also_with_a_limit_that_is_just_the_length(kind: str) -> None:
    length = len(read_whole(source_of(MADE[kind]())).epochs[0])
    whole = check_every_cursor(MADE[kind], limit=length)
    assert [len(batches) for batches in whole.epochs] == [length] * EPOCHS


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", WORKERS)
def test_also_with_workers(kind: str, persistent: bool) -> None:
    make = WORKERS[kind]
    options = {"num_workers": 2, "persistent_workers": persistent}
    whole = undisturbed(lambda: read_whole(source_of(make(**options)), epochs=2))
    for epoch, place in ((0, 2), (1, 0), (1, 1)):
        source = source_of(make(**options))
        source.load_state_dict(whole.states[epoch][place])
        rest = [taken(batch) for batch in source.iterate(dataclasses.replace(whole.cursors[epoch][place]))]
        assert rest == whole.epochs[epoch][place:]
    if not kind.startswith("iterable"):  # whose workers each read all of it, unless it shares the work itself
        assert whole.epochs == read_whole(source_of(make()), epochs=2).epochs, "other data than without workers"


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("kind", TORCHDATA)
def test_torchdata(kind: str) -> None:
    check_every_cursor(TORCHDATA[kind])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_torchdata_with_workers_finds_its_place() -> None:
    source = source_of(stateful_data_loader(dataset=Noisy(), batch_size=SIZE, shuffle=True, num_workers=2))
    assert "the workers of StatefulDataLoader keep their random generators to themselves" in source.warning
    whole = read_whole(source, epochs=2)
    again = source_of(stateful_data_loader(dataset=Noisy(), batch_size=SIZE, shuffle=True, num_workers=2))
    again.load_state_dict(whole.states[1][2])
    rest = [batch.data[:, 0].tolist() for batch in again.iterate(dataclasses.replace(whole.cursors[1][2]))]
    assert rest == [[sample[0] for sample in data] for data, _, _ in whole.epochs[1][2:]]


def test_an_epoch_is_not_the_one_before() -> None:
    for kind in ("shuffled", "weighted", "own batch sampler", "told the epoch", "with replacement", "iterable"):
        first, second, third = read_whole(source_of(MADE[kind]())).epochs
        assert first != second != third, kind


# --- the same samples, however they are cut -------------------------------------------------------------------------
def samples(read: Read) -> list[list[Any]]:
    return [[sample for data, _, _ in epoch for sample in data] for epoch in read.epochs]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_samples_do_not_depend_on_the_size_of_a_batch(shuffle: bool) -> None:
    def whole(size: int) -> list[list[Any]]:
        return samples(read_whole(source_of(DataLoader(Noisy(), size, shuffle=shuffle))))

    reference = whole(SIZE)
    for size in (1, 3, LENGTH):
        assert whole(size) == reference


def test_a_run_goes_on_with_another_batch_size_where_it_stopped() -> None:
    whole = read_whole(source_of(DataLoader(Noisy(), SIZE, shuffle=True)))
    cursor = dataclasses.replace(whole.cursors[1][3])
    rest = [taken(batch)[0] for batch in source_of(DataLoader(Noisy(), 5, shuffle=True)).iterate(cursor)]
    assert [sample for data in rest for sample in data] == samples(whole)[1][12:]


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "weighted", "own batch sampler", "only __getitems__"])
def test_sample_ids_are_true(kind: str) -> None:
    for batch in source_of(MADE[kind]()).iterate(Cursor()):
        assert batch.ids.dtype == np.int64
        assert batch.ids.shape == (batch.size,)
        assert batch.data[:, 0].tolist() == batch.ids.tolist()


def test_sample_ids_of_any_kind_are_one_for_each_sample() -> None:
    names = [batch.ids.tolist() for batch in source_of(MADE["names"]()).iterate(Cursor())]
    assert names == [["sample 5", "sample 2", "sample 9", "sample 2"], ["sample 0", "sample 7"]]

    class Sized(Dataset[Tensor]):
        def __getitem__(self, key: tuple[int, tuple[int, int]]) -> Tensor:
            return torch.zeros(key[1])

    keys = [[(3, (2, 2)), (4, (2, 2))], [(5, (1, 4))]]  # the size of the image is part of the index
    batches = list(source_of(DataLoader(Sized(), batch_sampler=keys)).iterate(Cursor()))
    assert [batch.ids.tolist() for batch in batches] == keys
    assert [batch.size for batch in batches] == [2, 1]


def test_every_sample_comes_once_in_an_epoch() -> None:
    for epoch in read_whole(source_of(MADE["shuffled"]())).epochs:
        assert sorted(identity for _, _, ids in epoch for identity in ids) == list(range(LENGTH))


def test_a_batch_sampler_that_was_handed_in_keeps_its_size_and_its_last_batch() -> None:
    epochs = read_whole(source_of(MADE["given BatchSampler"]())).epochs
    assert [[size for _, size, _ in epoch] for epoch in epochs] == [[5] * 4] * EPOCHS
    assert epochs[0][0][2] != list(range(5)), "it shuffles"


# --- evaluation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [kind for kind in MADE if "stateful" not in kind])
def test_every_evaluation_sees_the_same(kind: str) -> None:
    source = source_of(MADE[kind](), role="val")
    first = [taken(batch) for batch in source.iterate(Cursor())]
    for _ in range(2):
        assert [taken(batch) for batch in source.iterate(Cursor())] == first


def test_an_evaluation_that_was_broken_off_does_not_change_the_next() -> None:
    for kind in ("shuffled", "own batch sampler", "weighted, own generator"):
        source = source_of(MADE[kind](), role="val")
        first = [taken(batch) for batch in source.iterate(Cursor())]
        next(source.iterate(Cursor()))
        assert [taken(batch) for batch in source.iterate(Cursor())] == first


def test_the_samplers_dataset_is_not_copied() -> None:
    class Heavy(Noisy):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    data = Heavy()
    source = source_of(DataLoader(data, sampler=RandomSampler(data, replacement=True)), role="val")
    assert len(list(source.iterate(Cursor()))) == LENGTH


def test_a_sampler_that_cannot_be_copied_is_refused_for_evaluation() -> None:
    class Held(Backwards):
        def __init__(self) -> None:
            self.open = (number for number in range(3))

    list(source_of(DataLoader(Noisy(), sampler=Held())).iterate(Cursor()))
    with pytest.raises(DataError, match=r"Held of an evaluation loader cannot be copied .*generator.* __deepcopy__"):
        list(source_of(DataLoader(Noisy(), sampler=Held()), role="val").iterate(Cursor()))


def test_overfitting_reads_the_same_few_for_ever() -> None:
    for kind in ("shuffled", "iterable", "list"):
        fixed = undisturbed(lambda kind=kind: FixedSource(source_of(MADE[kind]()), 2))
        whole = read_whole(fixed)
        assert whole.epochs[0] == whole.epochs[1] == read_whole(source_of(MADE[kind]())).epochs[0][:2]
        assert [taken(batch) for batch in fixed.iterate(Cursor(1, 1))] == whole.epochs[1][1:]


# --- without seeding -------------------------------------------------------------------------------------------------
def test_without_seeding_the_order_stays_and_the_dataset_draws_from_the_process() -> None:
    seeded = read_whole(source_of(MADE["shuffled"]()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = read_whole(source_of(MADE["shuffled"](), seed_samples=False))
    assert [[ids for _, _, ids in epoch] for epoch in whole.epochs] == [[ids for *_, ids in e] for e in seeded.epochs]
    assert not torch.equal(before, torch.get_rng_state())
    assert whole.epochs != seeded.epochs


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}])
@pytest.mark.parametrize("kind", ["shuffled", "iterable"])
def test_without_seeding_a_run_that_is_left_alone_can_be_repeated(kind: str, options: dict[str, Any]) -> None:
    def run() -> Read:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        return read_whole(source_of(WORKERS[kind](**options), seed_samples=False), epochs=2)

    assert run().epochs == run().epochs


def test_without_seeding_several_samples_are_asked_for_at_once() -> None:
    asked: list[int] = []

    class Several(OnlySeveral):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            asked.append(len(indices))
            return super().__getitems__(indices)

    list(source_of(DataLoader(Several(), SIZE), seed_samples=False).iterate(Cursor()))
    assert asked == [4, 4, 4, 4, 4, 2]


def test_what_draws_nothing_is_known() -> None:
    data = TensorDataset(torch.ones(3))
    assert draws_nothing(data)
    assert draws_nothing(Subset(data, [0]) + data)
    assert draws_nothing(StackDataset(data, data))
    assert draws_nothing(StackDataset(x=data))
    assert not draws_nothing(Noisy())
    assert not draws_nothing(Subset(Noisy(), [0]))


# --- what the user's own code sees -----------------------------------------------------------------------------------
class Asking(Noisy):
    """Looks itself up, as datasets do that open their files in the worker."""

    opened = False

    def __getitem__(self, index: int) -> Tensor:
        info = get_worker_info()
        assert info is not None
        assert info.dataset is self
        return torch.tensor([float(self.opened), float(np.random.rand() < 2)])


def open_in_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.opened = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_finds_the_users_own_dataset(context: str) -> None:
    loader = DataLoader(
        Asking(), SIZE, num_workers=1, worker_init_fn=open_in_worker, multiprocessing_context=context, shuffle=True
    )
    batches = list(source_of(loader).iterate(Cursor()))
    assert len(batches) == 6
    assert all(bool(batch.data.all()) for batch in batches)


def test_the_datasets_own_error_arrives() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            raise KeyError("no such image")

    with pytest.raises(KeyError, match="no such image"):
        list(source_of(DataLoader(Broken(), SIZE)).iterate(Cursor()))


def test_warnings_say_what_resuming_costs() -> None:
    assert not source_of(MADE["shuffled"]()).warning
    assert not source_of(MADE["stateful iterable, position"]()).warning
    assert "your own Backwards is kept" in source_of(MADE["own sampler"]()).warning
    assert "your own Growing is kept" in source_of(MADE["own batch sampler"]()).warning
    assert "your own Backwards is kept" in source_of(MADE["given BatchSampler, own sampler"]()).warning
    assert "Stream is iterable and has no state_dict" in source_of(MADE["iterable"]()).warning


@pytest.mark.parametrize(
    ("kind", "count"),
    [("shuffled", 6), ("drop_last", 5), ("list", 6), ("weighted", 5), ("own sampler", None), ("iterable", None)],
)
def test_the_number_of_batches_is_known_where_it_can_be(kind: str, count: int | None) -> None:
    assert source_of(MADE[kind]()).batches_per_epoch == count
    assert source_of(MADE[kind](), limit=2).batches_per_epoch == 2
    if count is not None:
        assert source_of(MADE[kind](), limit=100).batches_per_epoch == count


def test_short_windows_are_dropped_with_the_short_batch() -> None:
    source = source_of(MADE["drop_last"](), window_batches=2)
    assert [batch.size for batch in source.iterate(Cursor())] == [4] * 4


def test_a_state_that_nobody_has_read_from_yet_is_given_back() -> None:
    """A run that is ended before its first step after a resume saves what it was given."""
    whole = read_whole(source_of(MADE["stateful iterable, position"]()))
    assert not whole.states[0][0]
    source = source_of(MADE["stateful iterable, position"]())
    source.load_state_dict(whole.states[1][2])
    again = source_of(MADE["stateful iterable, position"]())
    again.load_state_dict(saved(source.state_dict()))
    assert [taken(batch) for batch in again.iterate(whole.cursors[1][2])] == whole.epochs[1][2:]


# --- what cannot be trained on ---------------------------------------------------------------------------------------
def refused(loader: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(source_of(loader, **options).iterate(Cursor()))
    return str(caught.value)


def test_nothing_to_read() -> None:
    assert "train_dataloader is empty: its dataset has no samples" in refused(DataLoader(TensorDataset(torch.ones(0))))
    assert "val_dataloader is empty: it is a list without a batch" in refused([], role="val")
    for wrong in (None, 3, object()):
        assert f"train_dataloader returned a {type(wrong).__name__}" in refused(wrong)
    assert "Named, has no __len__" in refused(DataLoader(Named(), sampler=SequentialSampler(Named())))


def test_more_than_there_is() -> None:
    found = refused(DataLoader(Noisy(), 23))
    assert found == "batch_size 23 is larger than the data: train_dataloader has 22 samples. Lower it, or add data."
    found = refused(DataLoader(Noisy(), 8), window_batches=3)
    assert "batch_size 8 x grad_accumulation_steps 3 = 24 is larger than the data" in found
    assert "one batch x grad_accumulation_steps 6 = 6 is larger" in refused(MADE["of batches"](), window_batches=6)
    assert len(list(source_of(DataLoader(Noisy(), 23), role="val").iterate(Cursor()))) == 1


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "given BatchSampler, own sampler", "iterable", "own way"])
def test_another_batch_size_than_the_configuration_says(kind: str) -> None:
    found = refused(MADE[kind](), expected_batch_size=16)
    assert "train_dataloader has batch_size 4, the configuration says 16." in found
    source_of(MADE[kind](), expected_batch_size=4)
    source_of(MADE[kind](), expected_batch_size=16, role="val")


def test_a_generator_gives_its_batches_once() -> None:
    training = source_of(batch for batch in [torch.ones(2)] * 3)
    assert len(list(training.iterate(Cursor()))) == 3
    with pytest.raises(DataError, match="a generator gives its batches once"):
        training.iterate(Cursor(epoch=1))
    evaluation = source_of(endless(), role="val", limit=2)
    list(evaluation.iterate(Cursor()))
    with pytest.raises(DataError, match="a generator gives its batches once"):
        evaluation.iterate(Cursor())


# --- how many samples a batch holds ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Graph:
    scale: float
    nodes: Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        (np.ones((4, 1)), 4),
        ({"scale": torch.tensor(2.0), "x": torch.ones(5)}, 5),
        ([["a", "b"], (None, torch.ones(2))], 2),
        (Graph(1.0, torch.ones(6, 1)), 6),
        (pack_sequence([torch.ones(3), torch.ones(2)]), 2),
        (range(7), 7),
        (torch.eye(3).to_sparse(), 3),
        (torch.tensor(1.0), 1),
    ],
)
def test_the_size_of_a_batch(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == size


@pytest.mark.parametrize("batch", [["a", "b"], {}, 3, None])
def test_a_batch_without_a_size(batch: Any) -> None:
    with pytest.raises(DataError, match="cannot tell how many samples"):
        batch_size_of(batch)
