"""Two real processes over loopback agree, take turns, read their own rows and stop at one step."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jax
import numpy as np

from rwkv_jax.parallel.coordination import (
    SyncedStop,
    allgather_text,
    assert_same,
    differences,
    global_array,
    run_on_first_process,
)
from rwkv_jax.parallel.processes import Processes
from tests.parallel.process_pair import end_of


@functools.cache
def all_is_well() -> list[dict[str, Any]]:
    """What both processes saw."""
    ended = end_of("well")
    assert [process.status for process in ended] == [0, 0], ended[0].errors[-3000:] + ended[1].errors[-3000:]
    assert not any("before its time" in process.errors for process in ended)
    return [json.loads(process.output.splitlines()[-1]) for process in ended]


def test_the_first_process_works_alone_and_the_others_find_it_done() -> None:
    assert [seen["found"] for seen in all_is_well()] == [False, True]


def test_each_process_hears_what_all_say() -> None:
    assert [seen["said"] for seen in all_is_well()] == [["I am 0", "I am 1"]] * 2


def test_a_process_that_does_not_come_is_named_with_what_to_do() -> None:
    first, second = all_is_well()
    assert second["lost"].startswith(
        "process 1 of 2: not all processes came in time to compare what the other does not say, for which the others "
    )
    assert re.fullmatch(
        r"process 0 of 2: process 1 did not come to compare what the other does not say, for which the others wait "
        r"0\.2 seconds \(DEADLINE_EXCEEDED: .*\); see what each printed last, and start all processes again with the "
        r"same command; where the start alone takes long, with a larger --distributed\.join-seconds",
        first["lost"],
    ), first["lost"]


def test_each_process_reads_the_rows_of_its_own_devices_once() -> None:
    seen = all_is_well()
    assert [process["rows"]["read"] for process in seen] == [[[0, 2], [2, 4]], [[4, 6], [6, 8]]]
    assert [process["copies"]["read"] for process in seen] == [[[0, 4]], [[4, 8]]]
    for process in seen:
        assert process["rows"]["wrong"] == process["copies"]["wrong"] == 0
        assert process["rows"]["sum"] == process["copies"]["sum"] == 276


def test_a_student_begins_as_its_teacher_though_each_process_holds_parts() -> None:
    """Of layers that are one array, of which the teacher has some."""
    assert [process["copied"] for process in all_is_well()] == [[], []]


def test_a_signal_to_either_process_stops_both_after_the_same_step() -> None:
    for process in all_is_well():
        assert process["stops"] == [{"step": 4, "name": "SIGTERM"}] * 2


def test_disagreement_shows_which_process_has_which_value() -> None:
    for index, process in enumerate(all_is_well()):
        assert process["disagreement"] == (
            f"process {index} of 2: the processes were started with different batches; start all with the same:\n"
            "  field  value  processes\n"
            "  batch  8      0\n"
            "  batch  16     1"
        )


def test_processes_that_disagree_all_end_by_themselves() -> None:
    for process in end_of("disagree"):
        assert process.status == 1
        assert process.errors.count("different settings") == 1
        assert "batch  0      0\n  batch  1      1" in process.errors


def test_one_process_agrees_takes_its_turn_and_stops_by_itself() -> None:
    alone = Processes()
    assert_same(alone, {"seed": 0}, seconds=1)
    assert run_on_first_process(alone, "work", lambda: 3) == 3
    assert allgather_text(alone, "numbers", "3") == ["3"]
    requests = iter([None, "SIGINT"])
    stop = SyncedStop(lambda: next(requests), alone)
    assert [stop.name(), stop.name()] == [None, "SIGINT"]


def test_rows_of_one_process_are_read_once_for_each_slice() -> None:
    read: list[slice] = []

    def read_rows(rows: slice) -> np.ndarray:
        read.append(rows)
        return np.arange(6).reshape(3, 2)[rows]

    array = global_array(jax.sharding.SingleDeviceSharding(jax.devices()[0]), (3, 2), read_rows)
    assert read == [slice(0, 3)]
    np.testing.assert_array_equal(array, np.arange(6).reshape(3, 2))


def test_differences_name_the_processes_that_have_each_value() -> None:
    values = [{"a": "1", "b": "x"}] * 3 + [{"a": "2", "b": "x"}, {"a": "1", "b": "x", "c": "new"}]
    assert differences(values) == (
        "  field  value  processes\n"
        "  a      1      0-2, 4\n"
        "  a      2      3\n"
        "  c      -      0-3\n"
        "  c      new    4"
    )  # fmt: skip
    assert differences([{"a": "1"}] * 2) == ""
