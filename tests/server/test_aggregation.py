"""Secure sums at the coordinator, with sites that run the real state machines: dropouts, retries, kills, lies."""

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common import sums
from wardround.common.config import RunConfig
from wardround.common.errors import ProtocolError
from wardround.common.messages import (
    CountInstruction,
    Instruction,
    KeysReply,
    MaskInstruction,
    Reply,
    SharesInstruction,
    SharesReply,
    UnmaskInstruction,
    encode,
)
from wardround.common.secagg.keys import COUNTS, smallest_threshold
from wardround.server.aggregation import ATTEMPTS, LostSumError, SecureSums, Total, Work
from wardround.server.cohort import QuorumError
from wardround.server.journal import Journal, open_journal
from wardround.server.phases import Answer, Consortium
from wardround.server.tracking import SilentProgress

from tests.server.sites_case import EXCHANGES, ROUND_ZERO, Sites, Stopped, Twist, changed, failing, identity, names_of
from tests.server.sites_case import roster_of as roster_of_names

D, K = 6, 2  # values in the ring and in the tail
RING = {
    name: np.arange(D, dtype=np.uint32) * 1_000_003 + np.uint32(i * 2**28 + 2**31 - 9)
    for i, name in enumerate(names_of(9).values())
}
TAIL = {name: np.array([i + 1, 2**40 - i]) for i, name in enumerate(RING)}


def config(**federation: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "t", "privacy": {"enabled": False}, "federation": federation})


def consortium_of(n: int, **changes: Any) -> Sites:
    return Sites(names=names_of(n), payloads={name: (RING[name], TAIL[name]) for name in RING}, **changes)


class Run:
    """A coordinator's process with one sum to add up."""

    def __init__(self, out: Path, sites: Sites, settings: RunConfig | None = None, *, resume: bool = False) -> None:
        settings = settings or config()
        self.journal: Journal = open_journal(out, settings, resume)
        self.consortium = Consortium(sites, settings, self.journal, SilentProgress())
        for node in sites.nodes():
            self.consortium.cohort.admit(sites.names[node], node, sites.nodes())
        self.sums = SecureSums(self.consortium, sites.roster)
        self.taken: list[Reply] = []

    def total(self, d: int = D, k: int = K) -> Total:
        def instruction(attempt: int) -> CountInstruction:
            head = self.consortium.head(0, ROUND_ZERO.digest)
            return CountInstruction(**head, attempt=attempt, dictionary_digest="d")

        inputs = sums.input_digest("d")
        return self.sums.total(Work("counts", "counts", COUNTS, instruction, d, k, inputs, self.taken.append))

    def losses(self) -> set[tuple[str, str, str]]:
        return {(loss["phase"], loss["site"], loss["code"]) for loss in self.journal.losses()}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()


def check(total: Total, survivors: list[str]) -> None:
    """The sum is that of the survivors, to the last bit."""
    ring, tail = np.zeros(D, np.uint32), np.zeros(K, np.int64)
    for name in survivors:
        ring += RING[name]
        tail += TAIL[name]
    assert total.sites == survivors
    assert total.ring.tolist() == ring.tolist()
    assert total.tail.tolist() == tail.tolist()


def kinds(sites: Sites) -> list[str]:
    """What was asked, each exchange once."""
    return [kind for kind, _ in itertools.groupby(kind for _, kind in sites.asked)]


WHOLE = [f"Count{exchange}" for exchange in EXCHANGES]


def test_the_sum_is_exact_and_takes_five_exchanges(tmp_path: Path):
    sites = consortium_of(5)
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, list(sites.names.values()))
        assert (total.failures, total.misfits, total.ring.dtype, total.tail.dtype) == ({}, [], np.uint32, np.int64)
        assert kinds(sites) == WHOLE
        assert [reply.site for reply in run.taken] == list(sites.names.values())
        assert run.losses() == set()


def test_a_masked_vector_says_nothing_of_its_site_alone(tmp_path: Path):
    sites = consortium_of(3)
    with Run(tmp_path, sites, config(max_sites=8)) as run:
        run.total()
    received = b"".join(encode(answer.reply) for answer in sites.answers if answer.reply is not None)
    for name in sites.names.values():
        assert RING[name].tobytes() not in received and TAIL[name].tobytes() not in received
    assert not {field for answer in sites.answers for field in vars(answer.reply)} - {
        "run_id", "site", "round_index", "advert", "ciphertexts", "masked", "signature", "answer",
    }  # fmt: skip


@pytest.mark.parametrize("how", ["silent", "lost"])
@pytest.mark.parametrize(("n", "most"), [(5, 1), (7, 2)])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_sites_that_drop_out_at_any_exchange_leave_the_exact_sum_of_the_others(
    tmp_path: Path, exchange: str, n: int, most: int, how: str
):
    names = list(names_of(n).values())
    for gone in [[name] for name in names] if n == 5 else [names[:most], names[-most:], names[1::3][:most]]:
        twists = {(name, f"Count{exchange}"): "silent" if how == "silent" else failing("silent") for name in gone}
        sites = consortium_of(n, twists=twists)
        with Run(tmp_path / "-".join(gone), sites) as run:
            total = run.total()
            late = exchange in ("/Survivors", "/Unmask")  # its vector is in the sum already
            check(total, names if late else [name for name in names if name not in gone])
            assert total.failures == ({} if late else dict.fromkeys(gone, "silent"))
            assert {(loss, site) for _, site, loss in run.losses()} >= {("silent", name) for name in gone}
            assert {site for _, site, _ in run.losses()} == set(gone)
            assert kinds(sites) == WHOLE


def test_sites_may_drop_out_at_every_exchange_down_to_the_threshold(tmp_path: Path):
    sites = consortium_of(9, colluders=2)  # n = 9, c = 2: t = 6
    sites.twists = {
        ("site-01", "Count/Shares"): "silent",
        ("site-02", "Count/Mask"): failing("verification"),
        ("site-03", "Count/Mask"): "silent",
        ("site-04", "Count/Unmask"): "silent",
    }
    with Run(tmp_path, sites, config(colluders=2, min_sites=4)) as run, pytest.raises(LostSumError, match="threshold"):
        run.total()  # six survivors, five answers
    sites.twists.pop(("site-04", "Count/Unmask"))
    with Run(tmp_path, sites, config(colluders=2, min_sites=4), resume=True) as run:
        check(run.total(), [f"site-{i:02d}" for i in range(4, 10)])


@pytest.mark.parametrize("exchange", ["", "/Shares", "/Mask"])
def test_below_the_threshold_nothing_is_released_and_the_same_work_is_tried_again(tmp_path: Path, exchange: str):
    gone = ["site-01", "site-02"] if exchange else ["site-01", "site-02", "site-03"]
    sites = consortium_of(5, twists={(name, f"Count{exchange}"): "silent" for name in gone}, once=True)
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, list(sites.names.values()))
        assert total.failures == {}  # those of the attempt that counts
        assert run.losses() == {(f"counts{': ' * bool(exchange)}{exchange[1:].lower()}".replace(
            "mask", "masked"), name, "silent") for name in gone}  # fmt: skip
    first = WHOLE[: EXCHANGES.index(exchange) + 1]
    assert kinds(sites) == ([] if len(first) == 1 else first) + WHOLE
    assert sites.attempts(COUNTS) == [1, 2]
    # Every site gave one payload, whatever it was asked.
    assert sorted(site for site, _ in sites.given) == list(sites.names.values())


@pytest.mark.parametrize("exchange", ["", "/Shares", "/Mask"])
def test_too_few_in_every_attempt_stop_the_run_with_their_names_until_it_is_resumed(tmp_path: Path, exchange: str):
    gone = ["site-02", "site-04"] + ([] if exchange else ["site-05"])
    sites = consortium_of(5, twists={(name, f"Count{exchange}"): failing("model") for name in gone})
    said = ", ".join(rf"{name} \(model\)" for name in gone)
    with Run(tmp_path, sites) as run, pytest.raises(QuorumError, match=rf"counts: expected at least 3 .*; {said}"):
        run.total()
    assert not {"Count/Survivors", "Count/Unmask"} & set(kinds(sites))
    assert sites.attempts(COUNTS) == list(range(1, ATTEMPTS + 1))
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        check(run.total(), list(sites.names.values()))
    assert sites.attempts(COUNTS) == list(range(1, ATTEMPTS + 2))


def test_fewer_than_min_sites_are_no_quorum_although_they_reach_the_threshold(tmp_path: Path):
    sites = consortium_of(5, away={"site-03"})
    with Run(tmp_path, sites, config(min_sites=5)) as run, pytest.raises(QuorumError, match="counts"):
        run.total()
    assert kinds(sites) == ["Count"]
    sites = consortium_of(5, twists={("site-03", "Count/Mask"): "silent"})
    with Run(tmp_path / "mask", sites, config(min_sites=5)) as run, pytest.raises(QuorumError, match="site-03"):
        run.total()
    assert "Count/Survivors" not in kinds(sites)


@pytest.mark.parametrize("exchange", ["/Survivors", "/Unmask"])
@pytest.mark.parametrize("how", ["silent", "lost"])
def test_after_survivors_were_fixed_too_few_lose_the_sum_and_only_the_same_sites_can_finish_it(
    tmp_path: Path, exchange: str, how: str
):
    gone = ["site-02", "site-04"]
    twists = {(name, f"Count{exchange}"): "silent" if how == "silent" else failing("silent") for name in gone}
    sites = consortium_of(5, twists=twists)
    with Run(tmp_path, sites) as run:
        for _ in range(2):
            with pytest.raises(LostSumError, match=r"counts: threshold: 3 .*; site-0") as lost:
                run.total()
            assert lost.value.code == "threshold"
            assert all(f"{name} silent" in str(lost.value) for name in gone)
    assert sites.attempts(COUNTS) == [1]
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        check(run.total(), list(sites.names.values()))
    assert sites.attempts(COUNTS) == [1]
    assert kinds(sites).count("Count/Mask") == 1


def stop_at_message(sites: Sites, when: int, patch: pytest.MonkeyPatch) -> None:
    sites.stop_after = when


def stop_at_write(sites: Sites, when: int, patch: pytest.MonkeyPatch) -> None:
    """A kill before (even) or after (odd) a write of the journal."""
    write, left = Journal.write, [when]

    def counting(self: Journal, *args: Any) -> None:
        if left[0] == 0:
            raise Stopped
        write(self, *args)
        if left[0] == 1:
            raise Stopped
        left[0] -= 2

    patch.setattr(Journal, "write", counting)


@pytest.mark.parametrize(
    ("stop_at", "twists", "every"),
    [
        (stop_at_message, {}, 1),
        (stop_at_message, {("site-02", "Count/Mask"): "silent"}, 4),
        (stop_at_message, {("site-01", "Count/Survivors"): failing("silent")}, 4),
        (stop_at_write, {}, 1),
        (stop_at_write, {("site-01", "Count/Unmask"): "silent"}, 3),
    ],
    ids=["message", "message-masked", "message-consistency", "write", "write-unmask"],
)
def test_a_coordinator_that_is_killed_anywhere_goes_on_and_ends_with_the_same_sum(
    tmp_path: Path, stop_at: Any, twists: dict[Any, Any], every: int
):
    survivors = [name for name in names_of(5).values() if (name, "Count/Mask") not in twists]
    for when in itertools.count(step=every):
        sites, out = consortium_of(5, twists=dict(twists)), tmp_path / str(when)
        with Run(out, sites) as run, pytest.MonkeyPatch.context() as patch:
            stop_at(sites, when, patch)
            try:
                total: Total | None = run.total()
            except Stopped:
                total = None
        if total is not None:
            check(total, survivors)
            break
        asked = len(sites.asked)
        fixed = (out / "journal" / "counts-sum.record").exists()
        sites.stop_after = 10**9
        with Run(out, sites, resume=True) as run:
            check(run.total(), survivors)
        # No attempt number is used by two processes; once survivors are fixed there is no other attempt.
        before, after = (
            {one.attempt for _, one in part if isinstance(one, CountInstruction)}
            for part in (sites.instructions[:asked], sites.instructions[asked:])
        )
        assert not before & after and before <= {1}
        assert len(after) == (0 if fixed else 1)
    assert when >= (23 if stop_at is stop_at_message else 2 * 4)  # messages; writes: attempt, given, sum, signed


def test_kills_in_a_row_never_use_a_number_twice(tmp_path: Path):
    sites = consortium_of(5)
    Run(tmp_path, sites).journal.close()
    for _ in range(4):
        sites.stop_after = len(sites.asked) + 13  # in exchange 3
        with Run(tmp_path, sites, resume=True) as run, pytest.raises(Stopped):
            run.total()
    sites.stop_after = 10**9
    with Run(tmp_path, sites, resume=True) as run:
        check(run.total(), list(sites.names.values()))
    assert sites.attempts(COUNTS) == [1, 2, 3, 4, 5]


def thresholds(sites: Sites) -> list[tuple[int, int]]:
    """Attempt and t of every key list that was sent."""
    return sorted({(a.attempt, a.threshold) for _, a in sites.instructions if isinstance(a, SharesInstruction)})


def leaving(sites: Sites, name: str) -> Twist:
    """Its reply is lost, and from then on the site is away."""

    def gone(reply: Reply) -> Reply:
        sites.away.add(name)
        return failing("silent")(reply)

    return gone


def test_the_threshold_rises_when_a_retry_has_fewer_members(tmp_path: Path):
    # n = 7: t = 5. Three are lost with their vectors: of the four left, three would do by themselves, but a quorum of
    # the first list and one of the second must share an honest member.
    assert (smallest_threshold(7, 1), smallest_threshold(4, 1)) == (5, 3)
    sites = consortium_of(7)
    sites.twists = {(name, "Count/Mask"): leaving(sites, name) for name in ("site-02", "site-03", "site-05")}
    with Run(tmp_path, sites) as run:
        check(run.total(), ["site-01", "site-04", "site-06", "site-07"])
    assert thresholds(sites) == [(1, 5), (2, 4)]


def test_a_retry_that_no_threshold_allows_asks_for_no_shares(tmp_path: Path):
    sites = consortium_of(7)
    sites.twists = {(name, "Count/Mask"): leaving(sites, name) for name in ("site-02", "site-03", "site-05", "site-07")}
    with Run(tmp_path, sites) as run, pytest.raises(QuorumError):  # three members, t = 4
        run.total()
    assert thresholds(sites) == [(1, 5)]
    sites.away.clear()
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        check(run.total(), list(sites.names.values()))
    assert thresholds(sites) == [(1, 5), (ATTEMPTS + 1, 5)]


def test_a_sites_own_wish_for_survivors_is_met_or_the_sum_is_tried_again(tmp_path: Path):
    sites = consortium_of(5, wanted={"site-05": 5}, twists={("site-01", "Count/Mask"): "silent"}, once=True)
    with Run(tmp_path, sites) as run:
        check(run.total(), list(sites.names.values()))
    assert sites.attempts(COUNTS) == [1, 2]


STRANGER = identity("a stranger")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"identities": {"site-04": STRANGER}}, "unknown-member"),
        ({"identities": {"site-04": identity("site-02")}}, "unknown-member"),
        ({"rosters": {"site-04": roster_of_names(list(names_of(4).values()))}}, "other-roster"),
        ({"twists": {("site-04", "Count"): changed(advert=np.zeros(375, np.uint8))}}, "malformed"),
        ({"twists": {("site-04", "Count"): changed(advert=np.zeros(0, np.uint8))}}, "malformed"),
        ({"twists": {("site-04", "Count"): changed(site="site-05")}}, "protocol"),
        ({"twists": {("site-04", "Count"): changed(run_id="0" * 32)}}, "protocol"),
        ({"twists": {("site-04", "Count"): changed(round_index=1)}}, "protocol"),
        ({"twists": {("site-04", "Count"): lambda reply: SharesReply(
            run_id=reply.run_id, site=reply.site, round_index=0, ciphertexts=reply.advert)}}, "protocol"),
    ],
    ids=["stranger", "another-site", "roster", "no-advert", "empty", "name", "run", "round", "kind"],
)  # fmt: skip
def test_keys_that_do_not_fit_leave_their_site_out_by_name_and_code(tmp_path: Path, changes: Any, code: str):
    sites = consortium_of(5, **changes)
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, ["site-01", "site-02", "site-03", "site-05"])
        assert total.failures == {"site-04": code}
        assert run.losses() == {("counts", "site-04", code)}


def test_a_forged_signature_is_found(tmp_path: Path):
    def forged(reply: KeysReply) -> Reply:
        advert = reply.advert.copy()
        advert[-1] ^= 1
        return changed(advert=advert)(reply)

    with Run(tmp_path, consortium_of(5, twists={("site-04", "Count"): forged})) as run:
        assert run.total().failures == {"site-04": "signature"}


@pytest.mark.parametrize("changes", [{"names": {6: "site-05", 2: "site-06"}}, {}], ids=["not-listed", "revoked"])
def test_a_site_that_is_not_on_the_roster_takes_no_part(tmp_path: Path, changes: Any):
    sites = consortium_of(6)
    if changes:
        sites.roster = roster_of_names([f"site-{i:02d}" for i in range(1, 6)])
    else:
        sites.roster = sites.roster.revoking(identity("the coordinator"), "site-06")
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, [f"site-{i:02d}" for i in range(1, 6)])
        assert total.failures == {"site-06": "unknown-member"}


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("model_digest", "7" * 64, "other-model"),
        ("dictionary_digest", "another", "other-input"),
        ("attempt", 4, "other-sum"),
    ],
)
def test_a_site_that_worked_on_something_else_is_left_out_and_the_run_goes_on(
    tmp_path: Path, name: str, value: Any, code: str
):
    class Misled(Sites):
        def advert(self, site: str, instruction: Any) -> np.ndarray:
            if site == "site-03":
                instruction = type(instruction)(**{**vars(instruction), name: value})
            return super().advert(site, instruction)

    sites = Misled(names=names_of(5), payloads={site: (RING[site], TAIL[site]) for site in RING})
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, ["site-01", "site-02", "site-04", "site-05"])
        assert total.failures == {"site-03": code}
        assert run.losses() == {("counts", "site-03", code)}


def test_a_site_with_another_config_is_left_out_and_the_run_goes_on(tmp_path: Path):
    class Misled(Sites):
        def advert(self, site: str, instruction: Any) -> np.ndarray:
            if site == "site-03":
                other = config(rounds=7).to_json()
                instruction = type(instruction)(**{**vars(instruction), "config": other})
            return super().advert(site, instruction)

    sites = Misled(names=names_of(5), payloads={site: (RING[site], TAIL[site]) for site in RING})
    with Run(tmp_path, sites) as run:
        assert run.total().failures == {"site-03": "other-config"}


@pytest.mark.parametrize(
    ("exchange", "twist", "code"),
    [
        ("/Shares", changed(ciphertexts=np.zeros(82 * 3, np.uint8)), "malformed"),
        ("/Shares", changed(ciphertexts=np.zeros(0, np.uint8)), "malformed"),
        ("/Mask", changed(masked=np.zeros(D + 2 * K - 1, np.uint32)), "malformed"),
        ("/Mask", changed(masked=np.zeros(0, np.uint32)), "malformed"),
        ("/Mask", changed(site="site-05"), "protocol"),
        ("/Mask", failing("verification"), "verification"),
    ],
)
def test_what_does_not_fit_leaves_its_site_out_of_the_sum(tmp_path: Path, exchange: str, twist: Twist, code: str):
    with Run(tmp_path, consortium_of(5, twists={("site-04", f"Count{exchange}"): twist})) as run:
        total = run.total()
        check(total, ["site-01", "site-02", "site-03", "site-05"])
        assert total.failures == {"site-04": code}


def test_shares_that_cannot_be_opened_stop_their_readers_and_nothing_is_released(tmp_path: Path):
    twist = changed(ciphertexts=np.zeros(82 * 4, np.uint8))
    sites = consortium_of(5, twists={("site-04", "Count/Shares"): twist})
    with Run(tmp_path, sites) as run, pytest.raises(QuorumError, match=r"site-01 \(share\)"):
        run.total()
    assert "Count/Survivors" not in kinds(sites)


@pytest.mark.parametrize(
    ("exchange", "twist", "code"),
    [
        ("/Survivors", changed(signature=np.zeros(64, np.uint8)), "signature"),
        ("/Survivors", changed(signature=np.zeros(63, np.uint8)), "signature"),
        ("/Unmask", changed(answer=np.zeros(33 * 4, np.uint8)), "malformed"),
        ("/Unmask", changed(answer=np.full(33 * 5, 255, np.uint8)), "malformed"),
    ],
)
def test_a_survivor_that_answers_nonsense_is_in_the_sum_all_the_same(
    tmp_path: Path, exchange: str, twist: Twist, code: str
):
    with Run(tmp_path, consortium_of(5, twists={("site-04", f"Count{exchange}"): twist})) as run:
        total = run.total()
        check(total, [f"site-{i:02d}" for i in range(1, 6)])
        assert {loss[1:] for loss in run.losses()} == {("site-04", code)} and total.failures == {}


def lying(reply: Any) -> Reply:
    """The first share is another one."""
    answer = reply.answer.copy()
    answer[0] ^= 1
    return changed(answer=answer)(reply)


def test_a_wrong_share_is_corrected_and_named_with_its_dealer(tmp_path: Path):
    sites = consortium_of(7, twists={("site-04", "Count/Unmask"): lying})
    with Run(tmp_path, sites) as run:
        total = run.total()
        check(total, list(sites.names.values()))
        first = min(sites.names.values(), key=lambda name: identity(name).id)
        assert total.misfits == [[first, "site-04"]]


def test_too_many_wrong_shares_lose_the_sum_and_release_nothing(tmp_path: Path):
    twists = {(name, "Count/Unmask"): lying for name in ("site-02", "site-04")}
    with Run(tmp_path, consortium_of(5, twists=twists)) as run, pytest.raises(LostSumError) as lost:
        run.total()
    assert lost.value.code == "share"


def test_a_first_reply_that_cannot_be_used_leaves_its_site_out(tmp_path: Path):
    sites = consortium_of(5)
    with Run(tmp_path, sites) as run:

        def instruction(attempt: int) -> CountInstruction:
            return CountInstruction(**run.consortium.head(0, ROUND_ZERO.digest), attempt=attempt, dictionary_digest="d")

        def take(reply: Reply) -> None:
            if reply.site == "site-02":
                raise ProtocolError("no")

        total = run.sums.total(Work("counts", "counts", COUNTS, instruction, D, K, sums.input_digest("d"), take))
        check(total, ["site-01", "site-03", "site-04", "site-05"])
        assert total.failures == {"site-02": "protocol"}


def test_traffic_is_all_that_went_over_the_wire_in_all_attempts(tmp_path: Path):
    sites = consortium_of(5, twists={(name, "Count/Mask"): "silent" for name in ("site-01", "site-02")}, once=True)
    with Run(tmp_path, sites) as run:
        total = run.total()
    assert sites.attempts(COUNTS) == [1, 2]
    assert total.traffic.bytes_up == sum(answer.bytes_up for answer in sites.answers) > 0
    assert total.traffic.bytes_down == sum(answer.bytes_down for answer in sites.answers) > 0


def test_what_was_kept_for_resuming_is_forgotten_once_the_result_is_written(tmp_path: Path):
    with Run(tmp_path, consortium_of(3)) as run:
        run.total()
        kept = {path.stem for path in (tmp_path / "journal").glob("counts-*.record")}
        assert kept == {"counts-attempt", "counts-sum", "counts-signed"}
        run.sums.forget("counts")
        assert not list((tmp_path / "journal").glob("counts-*.record"))


def test_a_site_that_is_gone_after_a_restart_is_absent_and_does_not_hold_up_the_others(tmp_path: Path):
    sites = consortium_of(5, stop_after=15)  # all vectors are in the sum
    with Run(tmp_path, sites) as run, pytest.raises(Stopped):
        run.total()
    sites.stop_after, sites.away = 10**9, {"site-03"}
    with Run(tmp_path, sites, resume=True) as run:
        check(run.total(), [f"site-{i:02d}" for i in range(1, 6)])
        assert run.losses() == {(f"counts: {phase}", "site-03", "absent") for phase in ("consistency", "unmask")}


def test_a_site_is_sent_nothing_but_its_own_ciphertexts(tmp_path: Path):
    sites = consortium_of(5)
    with Run(tmp_path, sites) as run:
        run.total()
    sent = {site: asked for site, asked in sites.instructions if isinstance(asked, MaskInstruction)}
    assert len({asked.ciphertexts.tobytes() for asked in sent.values()}) == 5
    assert {len(asked.ciphertexts) for asked in sent.values()} == {4 * 82}
    unmask = [encode(asked) for _, asked in sites.instructions if isinstance(asked, UnmaskInstruction)]
    assert len(set(unmask)) == 1


class Forgetful(Sites):
    """Keeps no answer."""

    def answer(self, node: int, site: str, kind: str, instruction: Instruction) -> Answer:
        self.answers.clear()
        return super().answer(node, site, kind, instruction)


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path: Path):
    d, peaks = 400_000, []
    vector = np.ones(d, np.uint32)
    for n in (3, 9):
        sites = Forgetful(names=names_of(n), payloads={name: (vector, np.ones(1, np.int64)) for name in RING})
        with Run(tmp_path / str(n), sites) as run:
            tracemalloc.start()
            assert run.total(d, 1).ring.tolist() == [n] * d
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
