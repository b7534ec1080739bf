"""How many lines of batches run at once, and beside other requests."""

from __future__ import annotations

import time

from batch_helpers import begin, ended, held_job, line, until


def long_line(name: str) -> dict:
    return line(name, f"{name} " + "x" * 600)


def test_no_more_lines_are_begun_than_fit(start_server, tmp_path) -> None:
    """Prompts of 600 tokens: two of them are more than may wait, at the start and after a restart.

    A character is a token.
    """
    first = start_server(files_dir=tmp_path / "files")
    batch = held_job(first, [long_line(f"r{i}") for i in range(100)])
    until(lambda: len(first.engine.requests) >= 2)
    time.sleep(0.3)  # in which more would come
    assert len(first.engine.requests) == 2
    first.stop()
    first.engine.gate.set()
    second = start_server(files_dir=tmp_path / "files", is_held=True)
    until(lambda: len(second.engine.requests) >= 2)
    time.sleep(0.3)
    assert len(second.engine.requests) == 2
    second.engine.gate.set()
    with second.client() as client:
        batch = ended(client, batch)
    assert batch.request_counts.completed == 100


def test_lines_of_all_batches_have_one_bound(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", batch_requests=3)
    server.engine.gate.clear()
    with server.client() as client:
        batches = [begin(client, [line(f"r{i}") for i in range(8)]) for _ in range(3)]
        until(lambda: len(server.engine.requests) >= 3)
        time.sleep(0.3)
        assert len(server.engine.requests) == 3
        # The third waits until one of the others has ended: lines in memory are bounded.
        assert client.batches.retrieve(batches[2].id).status == "validating"
        server.engine.gate.set()
        assert {ended(client, batch).status for batch in batches} == {"completed"}


def test_few_lines_run_beside_other_requests(start_server, tmp_path) -> None:
    """One for 16 places of the running batch, until no other request has come for a while."""
    server = start_server(files_dir=tmp_path / "files", max_num_seqs=32)
    assert server.chat().status_code == 200
    server.engine.gate.clear()
    with server.client() as client:
        batch = begin(client, [line(f"r{i}") for i in range(8)])
        until(lambda: len(server.engine.requests) >= 3)
        time.sleep(0.3)
        assert len(server.engine.requests) == 3
        server.engine.gate.set()
        assert ended(client, batch).status == "completed"


def test_lines_that_are_refused_make_way(start_server, tmp_path) -> None:
    """All places are held by lines that wait to be tried again; none of them is lost."""
    from chunkllama.errors import OverloadedError

    server = start_server(files_dir=tmp_path / "files", batch_requests=2)
    server.engine.fail_with = OverloadedError("full", 1)
    with server.client() as client:
        batch = begin(client, [line(f"r{i}") for i in range(6)])
        until(lambda: len(server.engine.requests) >= 2)
        server.engine.fail_with = None
        assert ended(client, batch).request_counts.completed == 6


def test_a_batch_that_waits_for_a_place_can_be_cancelled(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", batch_requests=1)
    server.engine.gate.clear()
    with server.client() as client:
        batches = [begin(client, [line("a"), line("b")]) for _ in range(3)]
        for batch in batches[1:]:
            client.batches.cancel(batch.id)
        assert [ended(client, batch).status for batch in batches[1:]] == ["cancelled"] * 2
        server.engine.gate.set()
        assert ended(client, batches[0]).status == "completed"
