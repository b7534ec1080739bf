"""The tier of a cache: which chunks have files, and which are read for a prompt."""

from __future__ import annotations

from cache_driver import CacheDriver, ids

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.admin import drop_adapter, run_command
from chunkllama.cache.imports import promote_next
from chunkllama.cache.node import encode_tokens
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import Form, Promotion, ReadLimits, ReadPrice, TierEntry, Wait
from chunkllama.cache_messages import CacheCommand
from chunkllama.messages import CommandReply


class Store:
    """Writes at once; reads when asked to."""

    def __init__(self, driver: CacheDriver, capacity: int, first: int = 1) -> None:
        self.first = first
        self.cache = driver.cache
        self.tier = driver.cache.tier = Tier(capacity, driver.cache.chunk_size, self)
        self.files: set[int] = set()
        self.unwritten: list[int] = []
        self.num_written = 0
        self.reading: list[Promotion] = []

    def form(self, depth: int) -> Form:
        return Form(1, 2) if depth else Form(self.first)

    def residences(self) -> tuple[int, int]:
        return 0, 0

    def accepts(self) -> bool:
        return True

    def write(self, entry: TierEntry, chunk_id: int) -> None:
        self.files.add(entry.file)
        self.unwritten.append(entry.file)
        self.num_written += 1

    def remove(self, file: int) -> None:
        self.files.remove(file)

    def read(self, promotion: Promotion) -> None:
        self.reading.append(promotion)

    def end_writes(self) -> None:
        for file in self.unwritten:
            self.tier.written(file)
        self.unwritten.clear()

    def end_reads(self) -> list[int | None]:
        """Insert everything; returns what became of each chunk."""
        found: list[int | None] = []
        for promotion in self.reading:
            for entry in promotion.entries:
                found.append(promote_next(self.cache, promotion, entry.file))
                if found[-1] is None:
                    break
            self.tier.end(promotion)
        self.reading.clear()
        return found


def make(num_chunks: int = 16, capacity: int = 8, first: int = 1) -> tuple[CacheDriver, Store]:
    driver = CacheDriver(num_chunks)
    return driver, Store(driver, capacity, first)


def evict(driver: CacheDriver, store: Store, count: int) -> None:
    driver.cache.tree.evict(count)
    store.end_writes()
    driver.check()


def promote(
    driver: CacheDriver,
    text: str,
    namespace: str = "",
    seconds: float | None = None,
    **limits: int,
) -> Wait | None:
    """Ask for what continues the text; computing it takes ``seconds``."""
    match = driver.match(text, namespace)
    defaults = {"least_tokens": 1, "needed_chunks": 4, "available_chunks": 100}
    given = {**defaults, "most_promotions": 100, **limits}
    read_limits = ReadLimits(compute_seconds=lambda tokens: seconds, **given)
    key = encode_tokens(ids(text))
    return driver.cache.promote(match, key, len(text) - 1, namespace, read_limits)


def chain(driver: CacheDriver, text: str, namespace: str = "") -> int:
    """Chunks in files that continue the match."""
    tier, match = driver.cache.tier, driver.match(text, namespace)
    assert tier is not None
    return len(tier.chain(match.nodes, encode_tokens(ids(text)), len(text) - 1, namespace))


def test_an_evicted_chunk_is_read_again_and_keeps_its_file() -> None:
    driver, store = make()
    driver.store("abcdefghij")
    evict(driver, store, 3)  # the last one is not whole
    assert store.num_written == 2 and driver.match("abcdefghij.").num_tokens == 0
    assert promote(driver, "abcdefghij.") == Wait(store.reading[0])
    assert store.end_reads() == [0, 1]
    assert driver.match("abcdefghij.").num_tokens == 8
    driver.check()
    evict(driver, store, 2)
    assert store.num_written == 2 and chain(driver, "abcdefghij.") == 2


def test_a_file_continues_what_is_in_the_pool() -> None:
    driver, store = make()
    driver.store("abcdefghijkl")
    evict(driver, store, 2)
    assert driver.match("abcdefghijklm").num_tokens == 4
    assert chain(driver, "abcdefghijklm") == 2
    assert chain(driver, "abcdefghijkl") == 1  # the last token is always computed
    assert chain(driver, "abcdefghXjklm") == 1 and chain(driver, "abcXefghijklm") == 0


def test_a_chunk_that_is_not_written_yet_is_not_read() -> None:
    driver, store = make()
    driver.store("abcd")
    driver.cache.tree.evict(1)
    assert chain(driver, "abcd.") == 0
    store.end_writes()
    assert chain(driver, "abcd.") == 1


def test_namespaces_are_isolated() -> None:
    driver, store = make()
    driver.store("pppp")
    driver.store("ppppaaaa", "A", "A")
    driver.store("ppppbbbb", "B", "B")
    evict(driver, store, 3)
    assert chain(driver, "ppppaaaa.", "A") == 2 and chain(driver, "ppppbbbb.", "B") == 2
    assert chain(driver, "ppppaaaa.", "B") == chain(driver, "ppppaaaa.") == 1
    promote(driver, "ppppaaaa.", "A")
    assert len(store.end_reads()) == 2
    assert driver.match("ppppaaaa.", "A").num_tokens == 8
    assert driver.match("ppppaaaa.", "B").num_tokens == 4
    driver.check()


def test_two_prompts_wait_for_one_read() -> None:
    driver, store = make()
    driver.store("abcdefgh")
    evict(driver, store, 2)
    first = promote(driver, "abcdefgh.")
    assert promote(driver, "abcdefghi") == first and len(store.reading) == 1
    store.end_reads()
    assert promote(driver, "abcdefghi") is None


def test_reads_are_for_sequences_that_fit() -> None:
    driver, store = make()
    driver.store("aaaabbbbcccc")
    driver.store("xxxxyyyyzzzz")
    evict(driver, store, 6)
    assert promote(driver, "aaaabbbbcccc.", available_chunks=3) is None
    assert promote(driver, "aaaabbbbcccc.", available_chunks=4) is not None
    assert [len(each.entries) for each in store.reading] == [3]
    assert promote(driver, "xxxxyyyyzzzz.", available_chunks=7) == Wait(None)
    assert promote(driver, "xxxxyyyyzzzz.", most_promotions=1) == Wait(None)
    assert promote(driver, "xxxxyyyyzzzz.", available_chunks=3) is None
    assert promote(driver, "xxxxyyyyzzzz.", most_promotions=1, least_tokens=13) is None
    store.tier.price.add(1.0)
    assert promote(driver, "xxxxyyyyzzzz.", most_promotions=1, seconds=0.0) is None
    wait = promote(driver, "xxxxyyyyzzzz.", available_chunks=8)
    assert wait is not None and wait.promotion is store.reading[1]


def test_a_read_saves_as_many_tokens_as_it_has_to() -> None:
    driver, store = make()
    driver.store("abcdefgh")
    evict(driver, store, 2)
    assert promote(driver, "abcdefgh.", least_tokens=9) is None
    assert promote(driver, "abcdefgh.", least_tokens=8) is not None


def test_the_cheaper_of_reading_and_computing_is_done() -> None:
    price = ReadPrice()
    assert price.is_lower(10, 0.0)  # neither is known
    price.add(1.0)
    assert price.is_lower(10, None) and price.is_lower(10, 10.0)
    assert not price.is_lower(10, 5.0)
    tries = 0
    while not price.is_lower(10, 5.0):  # a price that was high once is measured again
        tries += 1
    assert 20 < tries < 60


def test_the_least_recently_used_file_goes_first() -> None:
    driver, store = make(capacity=2)
    for text in ("aaaa", "bbbb", "cccc"):
        driver.store(text)
        evict(driver, store, 1)
    assert [chain(driver, text) for text in ("aaaa.", "bbbb.", "cccc.")] == [0, 1, 1]
    promote(driver, "bbbb.")
    store.end_reads()
    driver.store("dddd")
    evict(driver, store, 2)
    assert [chain(driver, text) for text in ("bbbb.", "cccc.", "dddd.")] == [1, 0, 1]
    assert len(store.files) == 2


def test_the_budget_is_of_bytes() -> None:
    """A prompt's first chunk is kept as it is, and takes as much as three others."""
    driver, store = make(capacity=7, first=3)
    driver.store("aaaabbbbccccdddd")
    evict(driver, store, 4)
    assert store.tier.num_bytes == 6 and store.tier.num_chunks == 4
    driver.store("xxxxyyyy")
    evict(driver, store, 1)  # yyyy
    assert store.tier.num_bytes == 7
    evict(driver, store, 1)  # xxxx, for which what is below aaaa is dropped
    assert store.tier.num_bytes == 7 and store.tier.num_chunks == 3
    assert (chain(driver, "aaaabbbb."), chain(driver, "xxxxyyyy.")) == (1, 2)
    promote(driver, "xxxxyyyy.")
    store.end_reads()
    assert [node.bits for node in driver.match("xxxxyyyy.").nodes] == [0, 2]


def test_what_no_budget_holds_is_not_kept() -> None:
    driver, store = make(capacity=2, first=3)
    driver.store("aaaabbbb")
    evict(driver, store, 2)
    assert store.tier.num_bytes == 1 and chain(driver, "aaaabbbb.") == 0


def test_a_tenant_does_not_remove_the_files_of_another() -> None:
    driver, store = make(capacity=12)
    for text in ("mmmm", "nnnn"):
        driver.store(text, "B", "B")
        evict(driver, store, 1)
    for i in range(20):
        driver.store(f"{i:04d}", "A", "A")
        evict(driver, store, 1)
    assert chain(driver, "mmmm.", "B") == chain(driver, "nnnn.", "B") == 1


def test_a_chunk_below_another_goes_before_it() -> None:
    driver, store = make(capacity=3)
    driver.store("aaaabbbb")
    evict(driver, store, 2)
    driver.store("cccc")
    evict(driver, store, 1)
    driver.store("dddd")
    evict(driver, store, 1)
    assert chain(driver, "aaaabbbb.") == 1
    driver.check()


def test_a_damaged_file_ends_the_chain() -> None:
    driver, store = make()
    driver.store("aaaabbbbcccc")
    evict(driver, store, 3)
    promote(driver, "aaaabbbbcccc.")
    (promotion,) = store.reading
    assert promote_next(store.cache, promotion, promotion.entries[0].file) == 0
    store.tier.damaged(promotion.entries[1].file)
    driver.check()
    store.tier.end(promotion)
    assert driver.match("aaaabbbbcccc.").num_tokens == 4 and chain(driver, "aaaabbbbcccc.") == 0
    driver.store("aaaabbbb")
    assert chain(driver, "aaaabbbbcccc.") == 1  # what is below is right still
    assert store.tier.damaged_total == 1


def test_what_is_dropped_while_it_is_read_is_not_inserted() -> None:
    driver, store = make()
    driver.store("aaaabbbb", "A", "A")
    evict(driver, store, 2)
    promote(driver, "aaaabbbb.", "A")
    files = [entry.file for entry in store.reading[0].entries]
    command = CacheCommand(command_id=1, action="drop_tenant", tenant="A")
    reply = run_command(command, driver.cache, 0.0)
    assert reply.found and reply.num_dropped == 2 and not store.files
    driver.check()
    assert promote_next(driver.cache, store.reading[0], files[0]) is None


def test_a_branch_is_dropped_with_the_files_below_it() -> None:
    driver, store = make()
    driver.store("aaaabbbbcccc")
    driver.store("aaaadddd")
    (node,) = driver.match("aaaabbbbc").nodes[1:]
    driver.cache.tree.evict(1)  # cccc
    store.end_writes()
    command = CacheCommand(command_id=1, action="drop_branch", chunk_id=node.chunk_id)
    assert run_command(command, driver.cache, 0.0).num_dropped == 2
    assert not store.files and driver.match("aaaabbbbcccc.").num_tokens == 4
    driver.check()


def test_an_adapter_leaves_no_file_under_its_number() -> None:
    driver, store = make()
    tagged = AdapterUse(number=3, start=4).tagged(ids("aaaabbbb"))
    assert driver.cache.tier is not None
    driver.store("aaaabbbb")
    evict(driver, store, 2)
    key = encode_tokens(tagged)
    admission = next(driver.cache.admissions(driver.cache.match(key, 7, ""), 2, ""))
    chunks = driver.cache.admit(admission, key, "", 99)
    driver.cache.will_compute(chunks, 0, 8)
    driver.cache.did_compute(chunks, 0, 8)
    driver.cache.release(chunks, tagged, 8)
    evict(driver, store, 2)
    assert store.num_written == 3
    reply = CommandReply(command_id=1)
    drop_adapter(driver.cache, 3, reply)
    assert reply.num_dropped == 1 and len(store.files) == 2
    assert chain(driver, "aaaabbbb.") == 2


def test_entries_that_stand_for_nothing_are_gone() -> None:
    driver, store = make()
    driver.store("aaaabbbbccccdddd")
    evict(driver, store, 1)
    assert [*store.tier._root.descendants()] and store.num_written == 1
    store.tier.close()
    assert not [*store.tier._root.descendants()] and not store.files
    driver.check()
