"""The desk: each command once, in order, in the journal before its effect; also through a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aetheria.control.desk import Action, Boundary, Desk, Done
from aetheria.control.journal import Journal, read_journal
from aetheria.control.knobs import Knob, Knobs
from aetheria.errors import CommandError
from aetheria.protocol import AnyCommand, Outcome, command_of, encode


def set_(**values: Any) -> AnyCommand:
    options = {name: values.pop(name) for name in ("expect_revision", "not_after_step", "dry_run") if name in values}
    return command_of("set", {"values": values}, **options)


class Life:
    """A run's life, as far as a desk sees of it: two numbers that can be set, and a note that can be written."""

    def __init__(self, folder: Path, *, position: int | None = None, without: str = "", run: str = "a-run") -> None:
        self.values = {"rate": 1.0, "size": 4}
        self.notes: list[str] = []
        self.told: list[Outcome] = []
        self.dies: Callable[[], object] = lambda: None
        self.journal = Journal(folder / "journal.jsonl")
        kinds = {"rate": float, "size": int}
        knobs = Knobs([self._knob(key, kind) for key, kind in kinds.items() if key != without])
        actions = {
            "note": Action(self._note),
            "ping": Action(lambda _: None),
            "rewind": Action(self._rewind, self._can_rewind),
        }
        self.desk = Desk(run, self.journal, knobs, actions, self.told.append, lambda: str(self.values))
        if position is not None:
            self.desk.continue_from(position)

    def _knob(self, key: str, kind: Any) -> Knob:
        def put(value: Any) -> None:
            self.dies()
            if value == 13:
                raise ValueError("unlucky")
            self.values[key] = value

        return Knob(key, kind, put, lambda: self.values[key], ge=0)

    def _note(self, command: Any) -> None:
        self.dies()
        self.notes.append(command.args.text)

    def _can_rewind(self, command: Any) -> None:
        if command.args.step == 13:
            raise CommandError("there is no snapshot of step 13")

    def _rewind(self, command: Any) -> Done:
        return Done("back", position=0, boundary=Boundary(command.args.step))

    def states(self) -> list[str]:
        return [outcome.state for outcome in self.told]


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Callable[..., Life]]:
    opened: list[Life] = []

    def begin(**options: Any) -> Life:
        opened.append(Life(tmp_path, **options))
        return opened[-1]

    yield begin
    for life in opened:
        life.journal.close()


Lives = Callable[..., Life]


class Killed(BaseException):
    """The process dies here."""


def kill() -> None:
    raise Killed


def test_accepted_then_applied_each_journalled_and_told(lives: Lives) -> None:
    life = lives()
    command = set_(rate=0.5)
    outcome = life.desk.receive(encode(command), 7, 1, 3)
    assert life.states() == ["accepted", "applied"]
    assert [entry.outcome for entry in read_journal(life.journal.path)] == life.told
    assert life.told[1] == outcome
    assert (outcome.step, outcome.epoch, outcome.window, outcome.revision) == (7, 1, 3, 1)
    assert outcome.result == {"before": {"rate": 1.0}, "after": {"rate": 0.5}}
    assert outcome.digest == str(life.values)


def test_it_is_in_the_journal_before_it_has_an_effect(lives: Lives) -> None:
    life = lives()
    seen: list[int] = []
    life.dies = lambda: seen.append(len(read_journal(life.journal.path)))
    life.desk.handle(set_(rate=0.5), 1)
    assert seen == [1]


def test_what_does_not_change_the_training_leaves_the_revision(lives: Lives) -> None:
    life = lives()
    outcome = life.desk.handle(command_of("note", {"text": "hello"}), 1)
    assert (outcome.state, outcome.revision, outcome.digest) == ("applied", 0, "")
    assert life.desk.revision == 0


@pytest.mark.parametrize(
    ("command", "state"),
    [(set_(rate=0.5), "applied"), (set_(rate=13), "failed"), (set_(rate=-1), "rejected"), (set_(x=1), "rejected")],
    ids=["applied", "failed", "refused", "unknown"],
)
def test_the_same_id_again_is_answered_and_not_done_again(lives: Lives, command: AnyCommand, state: str) -> None:
    life = lives()
    first = life.desk.handle(command, 1)
    assert first.state == state
    lines = life.journal.position
    life.values["rate"] = 9.0
    assert life.desk.handle(command, 5) == first
    other_content = command_of("note", {"text": "x"}, id=command.id)
    assert life.desk.handle(other_content, 5) == first
    later = lives(position=lines)
    assert later.desk.handle(command, 6) == first, "in another life, too"
    assert (life.values["rate"], later.values["rate"], life.notes) == (9.0, 1.0, [])
    assert life.journal.position == later.journal.position == lines


def test_of_two_operators_who_saw_the_same_one_is_refused(lives: Lives) -> None:
    life = lives()
    mine, theirs = set_(rate=0.5, expect_revision=0), set_(rate=0.7, expect_revision=0)
    assert life.desk.handle(mine, 3).state == "applied"
    outcome = life.desk.handle(theirs, 3)
    assert outcome.state == "rejected"
    assert "at revision 1, the command expects 0: somebody else has changed it" in outcome.message
    assert life.values["rate"] == 0.5
    assert life.desk.handle(set_(rate=0.7, expect_revision=1), 3).state == "applied"
    assert life.desk.handle(set_(rate=0.8, expect_revision=7), 3).state == "rejected", "nor from the future"


def test_revisions_go_on_in_the_next_life(lives: Lives) -> None:
    life = lives()
    life.desk.handle(set_(rate=0.5), 3)
    life.desk.handle(set_(rate=13), 3)
    later = lives(position=life.journal.position)
    assert later.desk.revision == 1
    assert later.desk.handle(set_(rate=0.6, expect_revision=1), 4).revision == 2


def test_a_dry_run_says_what_would_be_and_leaves_no_trace(lives: Lives) -> None:
    life = lives()
    good, bad = set_(rate=0.5, dry_run=True), set_(rate=-1, dry_run=True)
    outcome = life.desk.handle(good, 1)
    assert (outcome.state, outcome.message) == ("accepted", "dry run: nothing was changed")
    assert life.desk.handle(bad, 1).state == "rejected"
    assert life.values["rate"] == 1.0
    assert life.journal.position == 0
    meant = command_of("set", {"values": {"rate": 0.5}}, id=good.id)
    assert life.desk.handle(meant, 2).state == "applied", "having tried it is not having done it"


def test_too_late_it_is_refused(lives: Lives) -> None:
    life = lives()
    assert life.desk.handle(set_(rate=0.5, not_after_step=10), 10).state == "applied"
    outcome = life.desk.handle(set_(rate=0.6, not_after_step=10), 11)
    assert outcome.message == "the command was to take effect by step 10; this is step 11."


@pytest.mark.parametrize("created", [0.0, -1e9, 4e9, 1e18])
def test_clocks_decide_nothing(lives: Lives, created: float) -> None:
    life = lives()
    first = command_of("set", {"values": {"rate": 0.5}}, created=created)
    second = command_of("set", {"values": {"rate": 0.6}}, created=-created)
    assert [life.desk.handle(command, 1).state for command in (first, second)] == ["applied"] * 2
    assert life.values["rate"] == 0.6, "the order is that in which they arrive"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"op": "set", "id": "0123456789", "args": 1}', "version 1"),
        (b'{"id": "0123456789", "op": "set", "args": {"values": {"a": ' + b"[" * 5000, "recursion"),
        (encode(command_of("ping", run="b-run", id="0123456789")), "this is the run a-run; the command is for b-run"),
        (encode(command_of("validate", id="0123456789")), "this run cannot validate. It can: set, note, ping, rewind"),
        (encode(command_of("rewind", {"step": 13}, id="0123456789")), "no snapshot of step 13"),
    ],
)
def test_refused_it_is_answered_by_its_id(lives: Lives, data: bytes, words: str) -> None:
    outcome = lives().desk.receive(data, 1)
    assert (outcome.command, outcome.state) == ("0123456789", "rejected")
    assert words in outcome.message


def test_what_has_no_id_is_answered_all_the_same(lives: Lives) -> None:
    assert lives().desk.receive(b"\xffnonsense", 1).state == "rejected"


def test_a_check_that_breaks_is_a_refusal_not_the_end_of_the_run(lives: Lives) -> None:
    life = lives()

    def broken(_: Any) -> None:
        raise OSError("the disk is gone")

    life.desk.actions["rewind"] = Action(lambda _: None, broken)
    outcome = life.desk.handle(command_of("rewind", {"step": 1}), 1)
    assert (outcome.state, outcome.message) == ("rejected", "OSError: the disk is gone")


def test_closed_it_takes_nothing_and_still_knows_what_it_did(lives: Lives) -> None:
    life = lives()
    command = set_(rate=0.5)
    applied = life.desk.handle(command, 1)
    life.desk.closed = "the run has ended"
    assert life.desk.handle(set_(rate=0.6), 2).message == "the run has ended; it takes no more commands."
    assert life.desk.handle(command, 2) == applied


@pytest.mark.parametrize("small_disk", ["4k"], indirect=True)
def test_if_the_journal_cannot_be_written_nothing_is_changed(small_disk: Path) -> None:
    life = Life(small_disk)
    (small_disk / "other").write_bytes(b"x" * 4096)
    command = set_(rate=0.5)
    outcome = life.desk.handle(command, 1)
    assert outcome.state == "rejected"
    assert "the journal cannot be written" in outcome.message
    assert "No space left" in outcome.message
    assert life.values["rate"] == 1.0
    assert life.journal.path.stat().st_size == 0
    (small_disk / "other").unlink()
    assert life.desk.handle(command, 2).state == "applied", "there is room again, and it had not been taken"
    life.journal.close()


# --- another life ----------------------------------------------------------------------------------------------------
def crash(lives: Lives, command: AnyCommand, boundary: Boundary) -> None:
    life = lives()
    life.dies = kill
    with pytest.raises(Killed):
        life.desk.handle(command, *boundary)
    assert life.states() == ["accepted"]


def test_accepted_and_not_done_it_is_done_at_its_boundary_and_once(lives: Lives) -> None:
    crash(lives, set_(rate=0.5), Boundary(7, 1, 3))
    life = lives(position=0)
    assert life.desk.next_step == 7
    for boundary in (Boundary(6, 1, 2), Boundary(7, 1, 2)):
        life.desk.catch_up(boundary)
        assert life.told == []
    life.desk.catch_up(Boundary(7, 1, 3))
    assert life.states() == ["applied"]
    assert (life.told[0].step, life.told[0].revision, life.values["rate"]) == (7, 1, 0.5)
    assert life.desk.next_step is None
    life.desk.catch_up(Boundary(7, 1, 3))
    assert len(read_journal(life.journal.path)) == 2


def test_delivered_again_before_its_boundary_it_waits_for_it(lives: Lives) -> None:
    command = set_(rate=0.5)
    crash(lives, command, Boundary(7))
    life = lives(position=0)
    assert life.desk.handle(command, 5).state == "accepted"
    assert life.values["rate"] == 1.0
    life.desk.catch_up(Boundary(7))
    assert life.desk.handle(command, 8).state == "applied"


def test_applied_it_is_done_again_without_another_line_or_word(lives: Lives) -> None:
    first = lives()
    first.desk.handle(set_(rate=0.5), 7)
    first.desk.handle(command_of("note", {"text": "hello"}), 7)
    first.desk.handle(set_(size=8), 9)
    lines = first.journal.position
    life = lives(position=0)
    life.desk.catch_up(Boundary(7))
    assert (life.values, life.told, life.notes) == ({"rate": 0.5, "size": 4}, [], [])
    life.desk.catch_up(Boundary(9))
    assert life.values == {"rate": 0.5, "size": 8}
    assert (life.journal.position, life.desk.revision) == (lines, 2)


def test_failed_or_refused_it_is_not_tried_again(lives: Lives) -> None:
    first = lives()
    assert [first.desk.handle(command, 7).state for command in (set_(rate=13), set_(rate=-1))] == ["failed", "rejected"]
    assert lives(position=0).desk.next_step is None


def test_a_command_that_cannot_be_done_any_more_fails_where_it_had_not_been_done(lives: Lives) -> None:
    crash(lives, set_(rate=0.5), Boundary(7))
    life = lives(position=0, without="rate")
    life.desk.catch_up(Boundary(7))
    assert life.states() == ["failed"]
    assert "there is no knob 'rate'" in life.told[0].message


def test_a_knob_that_the_code_has_lost_stops_a_run_that_had_used_it(lives: Lives) -> None:
    lives().desk.handle(set_(rate=0.5), 7)
    life = lives(position=0, without="rate")
    with pytest.raises(CommandError, match=r"took effect at step 7, but now it fails.*no knob 'rate'.*Has the code"):
        life.desk.catch_up(Boundary(7))


def test_other_weights_than_in_the_earlier_life_are_said(lives: Lives, capsys: pytest.CaptureFixture[str]) -> None:
    lives().desk.handle(set_(rate=0.5), 7)
    life = lives(position=0)
    life.values["size"] = 5
    life.desk.catch_up(Boundary(7))
    assert "After set at step 7 the weights are not those of the earlier life" in capsys.readouterr().err


@pytest.mark.parametrize("boundary", [Boundary(8), Boundary(7, 1, 4), Boundary(7, 2, 0)])
def test_a_boundary_that_has_been_passed_is_an_error(lives: Lives, boundary: Boundary) -> None:
    crash(lives, set_(rate=0.5), Boundary(7, 1, 3))
    with pytest.raises(
        CommandError, match=r"to take effect at step 7 \(epoch 1, window 3\), which this run has passed"
    ):
        lives(position=0).desk.catch_up(boundary)


def test_a_rewind_is_journalled_with_the_place_it_went_to(lives: Lives) -> None:
    life = lives()
    life.desk.handle(set_(rate=0.5), 7)
    outcome = life.desk.handle(command_of("rewind", {"step": 5}), 9, 2, 1)
    assert (outcome.state, outcome.step, outcome.epoch, outcome.revision) == ("applied", 5, 0, 2)
    assert life.journal.entries[-1].position == 0
    assert lives(position=0).desk.next_step is None, "what it undid is not done again"


def test_a_replay_does_it_at_its_boundary_and_says_what_cannot_be(lives: Lives) -> None:
    life = lives()
    life.desk.plan([(Boundary(3), set_(rate=0.5)), (Boundary(4), set_(rate=13))])
    life.desk.catch_up(Boundary(3))
    assert life.states() == ["accepted", "applied"]
    with pytest.raises(CommandError, match="set cannot be replayed at step 4: ValueError: unlucky"):
        life.desk.catch_up(Boundary(4))
