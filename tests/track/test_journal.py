"""The journal survives what happens to files: kill -9, torn lines, full disks, several writers."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.track import journal
from ftlib.track.journal import Journal, State, encode, is_open, journal_file, opening, read


def records(path):
    return [r for r, _ in read(path, 0, 1 << 30)]


def test_records_come_back_in_order_with_their_offsets(tmp_path):
    j = Journal(tmp_path / "a.jsonl")
    for i in range(50):
        j.append(encode({"op": "metrics", "i": i}))
    seen = list(read(j.path))
    assert [r["i"] for r, _ in seen] == list(range(50))
    assert [r["i"] for r, _ in read(j.path, seen[29][1])] == list(range(30, 50))
    assert seen[-1][1] == j.path.stat().st_size


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), garbage=st.binary(max_size=40))
def test_a_torn_end_costs_at_most_the_torn_record(tmp_path_factory, cut, garbage):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    lines = [encode({"op": "tags", "values": {"k": "ü" * i}}) for i in range(8)]
    data = b"".join(lines)
    cut = min(cut, len(data))
    path.write_bytes(data[:cut] + garbage.replace(b"\n", b""))
    whole = [i for i in range(8) if len(b"".join(lines[: i + 1])) <= cut]
    j = Journal(path)
    j.append(encode({"op": "end"}))
    got = [r for r in records(path) if r is not None]
    assert [len(r["values"]["k"]) for r in got if r["op"] == "tags"][: len(whole)] == whole
    assert got[-1] == {"op": "end"}


def test_an_unfinished_last_line_is_left_for_later(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode({"op": "tags"}) + b'{"op":"met')
    assert len(records(path)) == 1
    with open(path, "ab") as f:
        f.write(b'rics"}\n')
    assert [r["op"] for r in records(path)] == ["tags", "metrics"]


def test_a_record_longer_than_a_block_is_read_whole(tmp_path):
    j = Journal(tmp_path / "a.jsonl")
    j.append(encode({"op": "text", "text": "x" * 5000}))
    j.append(encode({"op": "tags"}))
    (record, end), *rest = read(j.path, 0, 100)
    assert len(record["text"]) == 5000 and not rest
    assert [r["op"] for r, _ in read(j.path, end)] == ["tags"]


def test_what_was_appended_survives_kill_9(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ftlib.track.journal import Journal, encode\nj = Journal(Path(sys.argv[1]))\n"
        "i = 0\nwhile True:\n"
        "    j.append(encode({'op': 'metrics', 'i': i})); print(i, flush=True); i += 1\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    last = -1
    for line in process.stdout:
        last = int(line)
        if last >= 500:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    got = [r["i"] for r in records(path) if r]
    assert got[: last + 1] == list(range(last + 1))


def test_processes_and_threads_append_whole_lines_to_one_file(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from ftlib.track.journal import Journal, encode\nj = Journal(Path(sys.argv[1]))\n"
        "for i in range(300):\n"
        "    pad = 'x' * (i % 97)\n"
        "    j.append(encode({'op': 'metrics', 'who': sys.argv[2], 'i': i, 'pad': pad}))\n"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(k)], cwd=Path(__file__).parents[2]
        )
        for k in range(2)
    ]
    j = Journal(path)
    threads = [
        threading.Thread(
            target=lambda k=k: [
                j.append(encode({"op": "metrics", "who": f"t{k}", "i": i})) for i in range(300)
            ]
        )
        for k in range(2)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [p.wait() for p in others] == [0, 0]
    got = records(path)
    assert None not in got and len(got) == 1200
    for who in ("0", "1", "t0", "t1"):
        assert [r["i"] for r in got if r["who"] == who] == list(range(300))


def test_a_full_disk_keeps_lines_in_memory_and_loses_none(tmp_path, monkeypatch, caplog):
    room = [130]
    real = os.write

    def write(fd, data):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        part = data[: room[0]]
        room[0] -= len(part)
        return real(fd, part)

    monkeypatch.setattr(journal.os, "write", write)
    j = Journal(tmp_path / "a.jsonl")
    for i in range(20):
        j.append(encode({"op": "metrics", "i": i}))
    assert j.buffered > 0 and "wait in memory" in caplog.text
    room[0] = 1 << 30
    j.retry()
    assert j.buffered == 0
    assert [r["i"] for r in records(j.path) if r] == list(range(20))


def test_appending_never_raises(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    j = Journal(blocked / "below" / "a.jsonl")
    j.append(encode({"op": "tags"}))
    assert j.buffered == 1


def test_state_survives_and_a_damaged_one_starts_over(tmp_path):
    path = tmp_path / "a.jsonl"
    State(12, "run", "1", True, 3).save(path)
    assert State.load(path) == State(12, "run", "1", True, 3)
    journal.state_file(path).write_text('{"offset": 1')
    assert State.load(path) == State()
    journal.state_file(path).write_text(json.dumps({"other": 1}))
    assert State.load(path) == State()


@pytest.mark.parametrize(
    "name", ["phase2", "t03 do.27 mx.44", "../../etc/passwd", "", "ü/ö", "a" * 300]
)
def test_any_name_has_a_journal_file_its_own_in_the_folder(tmp_path, name):
    path = journal_file(tmp_path, name)
    assert path.parent == tmp_path and len(path.name) < 120
    assert path != journal_file(tmp_path, name + "x")


def test_folder_belongs_to_one_process_and_is_free_after_its_death(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom ftlib.track.journal import acquire\n"
        f"print(acquire(Path({str(tmp_path)!r})), flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout.readline().strip() == "True"
    assert not journal.acquire(tmp_path)
    other.kill()
    other.wait()
    other.stdout.close()
    assert journal.acquire(tmp_path)
    assert not journal.acquire(tmp_path)
    journal.release(tmp_path)
    assert journal.acquire(tmp_path)
    journal.release(tmp_path)


def test_parents_come_before_children_and_what_waits_is_known(tmp_path):
    for name, t in [("child", 2), ("parent", 1)]:
        Journal(journal_file(tmp_path, name)).append(encode({"op": "run", "key": name, "t": t}))
    (tmp_path / "x.rejected.jsonl").write_bytes(encode({"op": "tags"}))
    assert [p.stem for p in journal.find_journals(tmp_path)] == ["parent", "child"]
    path = journal_file(tmp_path, "parent")
    assert opening(path)["key"] == "parent" and is_open(path)
    Journal(path).append(encode({"op": "end"}))
    assert not is_open(path)
    State(path.stat().st_size, "r", "1", True).save(path)
    assert journal.undelivered(tmp_path) == [journal_file(tmp_path, "child")]
