"""Secure sums: ours against flwr's SecAgg+ and a plain sum, large vectors, the coordinator's memory.

    python benchmarks/secagg.py

Every part runs in a process of its own, best of several repeats; with other work on the machine figures get worse, so
the file says how busy it was. flwr's functions are called as its secaggplus_mod and secaggplus_workflow call them,
without Flower's messages on either side. Values are standard normal, clipped at 4. Targets (issue 4):

- 5 sites × 10,000,000 values: quantising and masking at a site ≥ 8 times as fast as flwr's, unmasking at the
  coordinator ≥ 10 times, 4 bytes a value up (flwr's: 8);
- 56,000,000 and 34,400,000 values, 9 peers: ≤ 3 s on 2 cores, resident peak above the interpreter ≤ 1.3 × the vector
  + 64 MB;
- the coordinator's peak ≤ 2.5 × one vector at 5, 20 and 50 sites.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from environment import peak_rss_bytes, record

TARGETS = {
    "site_ratio": 8.0,
    "unmask_ratio": 10.0,
    "bytes_a_value": 4.0,
    "large_s": 3.0,
    "large_peak": (1.3, 64e6),
    "coordinator_peak": 2.5,
}
COMPARED = (5, 10_000_000)
LARGE, PEERS = (56_000_000, 34_400_000), 9
COORDINATOR_SITES, COORDINATOR_VALUES = (5, 20, 50), 10_000_000
TABLE = [(sites, values) for sites in (3, 10, 50) for values in (1_000_000, 10_000_000)]
PHASES = ("keys", "shares", "masked", "consistency", "unmask")
COLLUDERS = {3: 1, 5: 2, 10: 2, 20: 3, 50: 5}
RANGE, WEIGHT, MOST_WEIGHT, TAIL = 4.0, 300, 1000, 16
REPEATS = 5


class Clock:
    """Best wall time, and best processor time of all threads, of each thing that was timed."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = work()
        took, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        self.best[name] = min(took, self.best.get(name, took))
        self.cpu[name] = min(cpu, self.cpu.get(name, cpu))
        return result


def resident_bytes(field: str) -> int:
    """This process's VmRSS or VmHWM (ru_maxrss would hold the parent's where a child was forked)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def fill(vector: Any, seed: int) -> None:
    """Standard normal values, a piece at a time: nothing else of the vector's size."""
    rng = np.random.default_rng(seed)
    for start in range(0, vector.size, 1 << 16):
        piece = vector[start : start + (1 << 16)]
        rng.standard_normal(piece.size, np.float32, piece)


def ours(sites: int, values: int, verify: bool = True) -> dict[str, Any]:
    """A whole sum through both state machines: every site's work, one after another, in this process."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from wardround.common.fixedpoint import FixedPoint, rounding_key
    from wardround.common.secagg import client_state as client
    from wardround.common.secagg.client_state import ClientSum, Membership
    from wardround.common.secagg.keys import UPDATE, Binding, members_of, smallest_threshold
    from wardround.common.secagg.masking import quantise_and_mask
    from wardround.common.secagg.server_state import Attempt

    fixed = FixedPoint(RANGE, max(sites, 3), MOST_WEIGHT)
    digests = (bytes(32),) * 4
    binding = Binding(bytes(16), 1, UPDATE, 1, values, TAIL, fixed.max_sites, RANGE, *digests)
    identities = {
        key.public_key().public_bytes_raw(): key for key in (Ed25519PrivateKey.generate() for _ in range(sites))
    }
    order = sorted(identities)
    colluders = COLLUDERS[sites]
    members = Membership(frozenset(order), frozenset(order), colluders, 3)
    threshold = smallest_threshold(sites, colluders)
    assert threshold is not None
    states = {site: ClientSum() for site in order}
    exact = np.zeros(values if verify else 0)
    fill(np.empty(min(values, 1 << 16), np.float32), 0)  # whatever numpy's generator loads
    clock, up, down = Clock(), dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    before = resident_bytes("VmRSS")
    attempt = Attempt(binding)

    for site in order:
        states[site], advert = clock.time(
            "keys site",
            lambda site=site: client.advertise(states[site], members, binding, identities[site], os.urandom),
        )
        clock.time("keys coordinator, a site", lambda site=site, advert=advert: attempt.add_advert(site, advert))
        up["keys"] = len(advert)
    key_list = clock.time("keys coordinator", lambda: attempt.close_keys(threshold)).to_bytes()
    for site in order:
        states[site], sealed = clock.time(
            "shares site", lambda site=site: client.share(states[site], members, threshold, key_list, os.urandom)
        )
        clock.time("shares coordinator, a site", lambda site=site, sealed=sealed: attempt.add_shares(site, sealed))
        up["shares"], down["shares"] = len(sealed), len(key_list)
    recipients = clock.time("shares coordinator", attempt.close_shares)

    def exchange_masked() -> None:
        whole = np.empty(values + 2 * TAIL, np.uint32)  # what travels: the ring, then the tail
        vector, tail = whole[:values].view(np.float32), whole[values:].view(np.uint64)

        def masked(site: bytes, given: bytes) -> None:
            states[site], keys = client.mask(states[site], members, recipients, given)
            arguments = (vector, tail, fixed, WEIGHT, rounding_key(0, "site", 1), keys.plus, keys.minus)
            clock.time("quantise and mask", lambda: quantise_and_mask(*arguments, clipped_slot=1))

        for number, site in enumerate(order):
            fill(vector, number)
            if verify:
                np.add(exact, np.clip(vector, -RANGE, RANGE), out=exact)
            tail[:] = 0
            tail[0] = WEIGHT
            given = attempt.ciphertexts_for(site)
            clock.time("masked site", lambda site=site, given=given: masked(site, given))
            clock.time("masked coordinator, a site", lambda site=site: attempt.add_masked(site, whole))
            up["masked"], down["masked"] = whole.nbytes, len(given) + len(recipients)

    exchange_masked()
    survivors = clock.time("masked coordinator", attempt.close_sum)
    assert len(members_of(survivors, sites)) == sites
    for site in order:
        states[site], signature = clock.time(
            "consistency site", lambda site=site: client.sign(states[site], members, survivors, identities[site])
        )
        clock.time("consistency coordinator, a site", lambda site=site, s=signature: attempt.add_signature(site, s))
        up["consistency"], down["consistency"] = len(signature), len(survivors)
    signers, signatures = clock.time("consistency coordinator", attempt.close_signatures)
    for site in order:
        states[site], answer = clock.time(
            "unmask site", lambda site=site: client.unmask(states[site], members, signers, signatures)
        )
        clock.time("unmask coordinator, a site", lambda site=site, answer=answer: attempt.add_answer(site, answer))
        up["unmask"], down["unmask"] = len(answer), len(signers) + len(signatures)
    total, total_tail = clock.time("unmask coordinator", attempt.unmask)
    assert total_tail[0] == sites * WEIGHT
    mean = clock.time("mean", lambda: fixed.mean(total, int(total_tail[0]), total.view(np.float32)))
    peak = resident_bytes("VmHWM") - before
    if verify:
        bound = MOST_WEIGHT / (sites * WEIGHT) * sites / fixed.scale + 1e-6  # and float32's own steps
        assert np.abs(mean - exact / sites).max() < bound, "the sum is wrong"
    return {
        "seconds": clock.best,
        "cpu_seconds": clock.cpu,
        "bytes_up": up,
        "bytes_down": down,
        "peak_bytes": peak,
    }


def theirs(sites: int, values: int) -> dict[str, Any]:
    """flwr's SecAgg+ with every site a neighbour of every other, the settings that come nearest to ours.

    2^32 for the modulus, 2^22 for the quantised range: its defaults. From 10 sites on only the first site masks.
    """
    from flwr.common import bytes_to_ndarray, ndarray_to_bytes
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        factor_combine,
        factor_extract,
        get_parameters_shape,
        parameters_addition,
        parameters_mod,
        parameters_multiply,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import dequantize, quantize
    from flwr.common.secure_aggregation.secaggplus_utils import (
        pseudo_rand_gen,
        share_keys_plaintext_concat,
        share_keys_plaintext_separate,
    )
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_private_key,
        bytes_to_public_key,
        generate_key_pairs,
        private_key_to_bytes,
        public_key_to_bytes,
    )

    modulus, target = 1 << 32, 1 << 22
    clock, up, down = Clock(), dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    colluders = COLLUDERS[sites]
    threshold = max((sites + colluders) // 2 + 1, colluders + 2)
    exact = np.zeros(values)

    def make_keys() -> tuple[bytes, bytes, bytes, bytes]:
        sk1, pk1 = generate_key_pairs()
        sk2, pk2 = generate_key_pairs()
        return private_key_to_bytes(sk1), public_key_to_bytes(pk1), private_key_to_bytes(sk2), public_key_to_bytes(pk2)

    keys = [clock.time("keys site", make_keys) for _ in range(sites)]
    up["keys"] = len(keys[0][1]) + len(keys[0][3])
    seeds = [os.urandom(32) for _ in range(sites)]
    seed_shares: list[list[bytes]] = []
    sent: list[dict[int, bytes]] = []

    def share(me: int) -> dict[int, bytes]:
        seed_shares.append(create_shares(seeds[me], threshold, sites))
        key_shares = create_shares(keys[me][0], threshold, sites)
        sealed: dict[int, bytes] = {}
        for other in range(sites):
            if other != me:
                shared = generate_shared_key(bytes_to_private_key(keys[me][2]), bytes_to_public_key(keys[other][3]))
                plain = share_keys_plaintext_concat(me, other, seed_shares[me][other], key_shares[other])
                sealed[other] = encrypt(shared, plain)
        return sealed

    for me in range(sites):
        sent.append(clock.time("shares site", lambda me=me: share(me)))
    up["shares"] = sum(len(text) for text in sent[0].values())
    down["shares"] = sites * up["keys"]
    down["masked"] = sum(len(sent[other][0]) for other in range(1, sites))

    def quantise_and_mask(me: int, vector: Any, pairs: dict[int, bytes]) -> list[Any]:
        ratio = round(WEIGHT / MOST_WEIGHT * target)
        parameters = parameters_multiply([vector], ratio / target)
        quantised = factor_combine(ratio, quantize(parameters, RANGE, target))
        dimensions = [array.shape for array in quantised]
        quantised = parameters_addition(quantised, pseudo_rand_gen(seeds[me], modulus, dimensions))
        for other, shared in pairs.items():
            pair_mask = pseudo_rand_gen(shared, modulus, dimensions)
            change = parameters_addition if me > other else parameters_subtraction
            quantised = change(quantised, pair_mask)
        return parameters_mod(quantised, modulus)

    def masked(me: int, vector: Any) -> list[bytes]:
        pairs: dict[int, bytes] = {}
        for other in range(sites):
            if other != me:
                shared = generate_shared_key(bytes_to_private_key(keys[me][2]), bytes_to_public_key(keys[other][3]))
                share_keys_plaintext_separate(decrypt(shared, sent[other][me]))
                pairs[other] = generate_shared_key(
                    bytes_to_private_key(keys[me][0]), bytes_to_public_key(keys[other][1])
                )
        result = clock.time("quantise and mask", lambda: quantise_and_mask(me, vector, pairs))
        return [ndarray_to_bytes(array) for array in result]

    total: list[Any] = []
    all_mask = sites < 10
    for me in range(sites if all_mask else 1):
        vector = np.empty(values, np.float32)
        fill(vector, me)
        exact += vector  # it clips after weighting, so here nothing
        arrived = clock.time("masked site", lambda me=me, vector=vector: masked(me, vector))
        up["masked"] = sum(len(data) for data in arrived)

        def add(arrived: list[bytes] = arrived) -> None:
            nonlocal total
            arrays = [bytes_to_ndarray(data) for data in arrived]
            total = parameters_addition(total, arrays) if total else arrays

        clock.time("masked coordinator, a site", add)
    up["unmask"] = sites * len(seed_shares[0][0])
    down["unmask"] = 8 * sites

    def unmask(masked_vector: list[Any]) -> list[Any]:
        masked_vector = parameters_mod(masked_vector, modulus)
        for me in range(sites):
            secret = combine_shares([seed_shares[me][other] for other in range(sites)])
            private = pseudo_rand_gen(secret, modulus, get_parameters_shape(masked_vector))
            masked_vector = parameters_subtraction(masked_vector, private)
        return parameters_mod(masked_vector, modulus)

    found: list[Any] = []
    for _ in range(REPEATS if all_mask else 1):
        found = clock.time("unmask coordinator", lambda: unmask(total))
    if all_mask:
        total_ratio, found = factor_extract(found)
        # As its workflow does: the mean over the ratios, corrected for the shift of every site's zero.
        inverse = target / int(total_ratio)
        mean = dequantize(found, RANGE, target)[0] - (sites - 1) * RANGE
        assert np.abs(mean * inverse - exact / sites).max() < 1e-3, "flwr's sum is wrong"
    return {"seconds": clock.best, "cpu_seconds": clock.cpu, "bytes_up": up, "bytes_down": down}


def plain(sites: int, values: int) -> dict[str, Any]:
    """Adding the sites' float32 vectors, unprotected."""
    vector, total, clock = np.empty(values, np.float32), np.zeros(values, np.float32), Clock()
    fill(vector, 0)
    for _ in range(min(sites, 10)):
        clock.time("masked coordinator, a site", lambda: np.add(total, vector, out=total))
    return {"seconds": clock.best, "cpu_seconds": clock.cpu, "bytes_up": {"masked": vector.nbytes}}


def large(values: int) -> dict[str, Any]:
    """One site, 9 peers: time, and resident peak above the interpreter, the vector included."""
    from wardround.common.fixedpoint import FixedPoint
    from wardround.common.secagg.masking import quantise_and_mask

    fixed = FixedPoint(RANGE, PEERS + 1, MOST_WEIGHT)
    keys = [os.urandom(32) for _ in range(PEERS + 1)]
    fill(np.empty(1 << 16, np.float32), 0)
    before = resident_bytes("VmRSS")
    whole = np.empty(values + 2 * TAIL, np.uint32)
    vector, tail = whole[:values].view(np.float32), whole[values:].view(np.uint64)
    times: list[float] = []
    cpu_times: list[float] = []
    for repeat in range(REPEATS):
        fill(vector, repeat)
        tail[:] = 0
        start, cpu_start = time.perf_counter(), time.process_time()
        quantise_and_mask(vector, tail, fixed, WEIGHT, bytes(32), keys[:5], keys[5:], clipped_slot=1)
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    peak = resident_bytes("VmHWM") - before
    rounded = {"seconds": times, "cpu_seconds": cpu_times}
    return {
        **{name: [round(one, 3) for one in all_] for name, all_ in rounded.items()},
        "peak_bytes": peak,
        "vector_bytes": 4 * values,
    }


def coordinator(sites: int, values: int) -> dict[str, Any]:
    """Peak of a process that holds the coordinator, and one site's vector at a time, as it arrives."""
    return {"peak_bytes": ours(sites, values, verify=False)["peak_bytes"], "vector_bytes": 4 * values}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours,
    "theirs": theirs,
    "plain": plain,
    "large": large,
    "coordinator": coordinator,
}


def in_child(part: str, *numbers: int) -> dict[str, Any]:
    """The part's figures, from a process of its own."""
    command = [sys.executable, __file__, "--part", part, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} {numbers}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(sites: int, values: int, repeats: int = 1) -> dict[str, Any]:
    """One line of the table: the three ways, by phase; best of so many processes each, in turn."""
    result: dict[str, Any] = {"sites": sites, "values": values}
    runs = [{part: in_child(part, sites, values) for part in ("ours", "theirs", "plain")} for _ in range(repeats)]
    for part, found in runs[0].items():
        for kind in ("seconds", "cpu_seconds"):
            found[kind] = {name: min(run[part][kind][name] for run in runs) for name in found[kind]}
        seconds = found["seconds"]
        result[part] = {
            phase: {
                "site_s": round(seconds.get(f"{phase} site", 0.0), 5),
                "coordinator_s": round(
                    seconds.get(f"{phase} coordinator", 0.0) + sites * seconds.get(f"{phase} coordinator, a site", 0.0),
                    5,
                ),
                "bytes_up": found["bytes_up"].get(phase, 0),
                "bytes_down": found.get("bytes_down", {}).get(phase, 0),
            }
            for phase in PHASES
        }
        result[part]["quantise_and_mask_s"] = round(seconds.get("quantise and mask", 0.0), 4)
        result[part]["quantise_and_mask_cpu_s"] = round(found["cpu_seconds"].get("quantise and mask", 0.0), 4)
        result[part]["unmask_cpu_s"] = round(found["cpu_seconds"].get("unmask coordinator", 0.0), 4)
    return result


def show(result: dict[str, Any]) -> None:
    """The row as text: seconds at a site + at the coordinator, and bytes up a site."""
    print(f"{result['sites']} sites × {result['values'] / 1e6:g}M values")
    for phase in PHASES:
        cells: Sequence[str] = [
            f"{name} {cell['site_s']:8.4f} + {cell['coordinator_s']:8.4f} s {cell['bytes_up']:>11,} B"
            for name in ("ours", "theirs", "plain")
            for cell in [result[name][phase]]
        ]
        print(f"  {phase:12} " + " | ".join(cells), flush=True)


def main() -> int:
    """Runs every part in its own process, writes benchmarks/results/secagg.json; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="so many times the values, without recording (a trial)"
    )
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if asked.part:
        print(json.dumps(PARTS[asked.part[0]](*map(int, asked.part[1:]))))
        return 0

    def scaled(values: int) -> int:
        return max(int(values * asked.scale), 1000)

    busy = [os.getloadavg()]
    compared = row(COMPARED[0], scaled(COMPARED[1]), REPEATS)
    show(compared)
    ratios = {
        "site_ratio": compared["theirs"]["quantise_and_mask_s"] / compared["ours"]["quantise_and_mask_s"],
        "unmask_ratio": compared["theirs"]["unmask"]["coordinator_s"] / compared["ours"]["unmask"]["coordinator_s"],
    }
    cpu_ratios = {  # of processor time: what is left of the ratio without threads
        "site_ratio": compared["theirs"]["quantise_and_mask_cpu_s"] / compared["ours"]["quantise_and_mask_cpu_s"],
        "unmask_ratio": compared["theirs"]["unmask_cpu_s"] / compared["ours"]["unmask_cpu_s"],
    }
    each = {
        name: (compared[name]["masked"]["bytes_up"] - own) / compared["values"]
        for name, own in (("ours", 8 * TAIL), ("theirs", 0))
    }
    print(f"  site {ratios['site_ratio']:.1f} times as fast, unmasking {ratios['unmask_ratio']:.1f} times", end=" ")
    print(f"(processor time {cpu_ratios['site_ratio']:.1f} and {cpu_ratios['unmask_ratio']:.1f});", end=" ")
    print(f"bytes a value {each['ours']:.3f} (and {8 * TAIL} for {TAIL} counts), flwr {each['theirs']:.3f}", flush=True)
    met = {name: ratio >= TARGETS[name] for name, ratio in ratios.items()}
    met["bytes_a_value"] = each["ours"] <= TARGETS["bytes_a_value"]

    vectors: list[dict[str, Any]] = []
    for values in map(scaled, LARGE):
        found = in_child("large", values)
        factor, constant = TARGETS["large_peak"]
        most = factor * found["vector_bytes"] + constant
        vectors.append({"values": values, "peers": PEERS, **found, "peak_target_bytes": round(most)})
        print(
            f"{values / 1e6:g}M values, {PEERS} peers: {found['seconds']} s, peak {found['peak_bytes'] / 1e6:.1f} MB",
            end="",
        )
        print(
            f" = {found['peak_bytes'] / found['vector_bytes']:.3f} × the vector (at most {most / 1e6:.1f} MB)",
            flush=True,
        )
        met[f"{values} values: time"] = min(found["seconds"]) <= TARGETS["large_s"]
        met[f"{values} values: peak"] = found["peak_bytes"] <= most

    peaks: list[dict[str, Any]] = []
    for sites in COORDINATOR_SITES:
        found = in_child("coordinator", sites, scaled(COORDINATOR_VALUES))
        times = found["peak_bytes"] / found["vector_bytes"]
        peaks.append({"sites": sites, **found, "times_the_vector": round(times, 3)})
        print(
            f"coordinator, {sites} sites: peak {found['peak_bytes'] / 1e6:.1f} MB = {times:.3f} × one vector",
            flush=True,
        )
        met[f"coordinator, {sites} sites: peak"] = times <= TARGETS["coordinator_peak"]

    table = [row(sites, scaled(values)) for sites, values in TABLE]
    for result in table:
        show(result)
    busy.append(os.getloadavg())
    for name, fine in met.items():
        print(f"{'met ' if fine else 'MISSED'} {name}")
    if asked.scale != 1.0:
        return 0
    path = record(
        "secagg",
        {
            "versions_of_ciphers": {name: version(name) for name in ("cryptography", "pycryptodome")},
            "targets": TARGETS,
            "met": met,
            "ratios_to_flwr": {name: round(ratio, 2) for name, ratio in ratios.items()},
            "ratios_of_processor_time": {name: round(ratio, 2) for name, ratio in cpu_ratios.items()},
            "bytes_a_value": {name: round(value, 4) for name, value in each.items()},
            "compared": compared,
            "large": vectors,
            "coordinator": peaks,
            "table": table,
            "load_average_before_and_after": [[round(value, 2) for value in load] for load in busy],
        },
    )
    print(path)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
