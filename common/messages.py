"""Every message between coordinator and site: frozen dataclasses with one explicit byte encoding (docs/protocol.md §3).

Used by both roles. No pickle, no bare dict: a message is a head (magic, version, kind, canonical JSON) and raw
little-endian vectors whose length and SHA-256 stand in the head, so that the head alone binds the whole message. Over
Flower the head travels in a ConfigRecord and each vector as an Array of its own; on disk and in ledgers the two are
one run of bytes. Decoding is strict: anything but the bytes that encoding would have made is a `ProtocolError`.

No message can carry an update, a weight or a count of one site: everything that says something of patients is a payload
of a secure sum (docs/secure-sums.md), and leaves as the masked vector of `MaskedReply`, which only the sum of a quorum
can be read from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar, cast, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from .errors import ProtocolError

PROTOCOL_VERSION = 3
MAGIC = b"WARD"
_PREFIX = struct.Struct("<4sHHI")  # magic, version, kind, length of the JSON header in bytes
# Where a message's two parts lie in a Flower RecordDict.
HEAD_RECORD, VECTOR_RECORD = "wardround", "wardround.vectors"
MAX_HEADER_BYTES = 32 * 2**20  # a schema of thousands of features fits; a forged length cannot exhaust memory
MAX_VECTOR_VALUES = 2**32

# A vector field: 1-D, little-endian, carried outside the JSON header.
Float32 = Annotated[NDArray[np.float32], "<f4"]
Uint32 = Annotated[NDArray[np.uint32], "<u4"]
Uint8 = Annotated[NDArray[np.uint8], "|u1"]  # bytes whose layout docs/secure-sums.md gives


@dataclass(frozen=True, kw_only=True, eq=False)
class WireMessage:
    """Base of all messages. Fields are str, int, float, bool or vectors; two messages are equal if their bytes are."""

    KIND: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WireMessage) and encode(self) == encode(other)

    def __hash__(self) -> int:
        return hash(encode(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Instruction(WireMessage):
    """Coordinator → site. Self-contained: a site that restarted needs nothing but its own state folder.

    `config` is `RunConfig.to_json()` and `config_digest` its digest; `round_index` is 0 before the first training
    round, then 1, 2, …; `model_digest` covers the manifest and the whole global adapter at this point of the run.
    `receipt` is the coordinator's newest for this site (common/receipt.py), signed; empty before there is one.
    """

    ROUTE: ClassVar[str] = ""  # Flower message type, "<category>.<action>"

    run_id: str
    config: str
    config_digest: str
    round_index: int
    model_digest: str
    receipt: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply(WireMessage):
    """Site → coordinator."""

    run_id: str
    site: str
    round_index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure(Reply):
    """A site could not or would not. `code` is an enumerated word (common/errors.py), never an exception's text."""

    KIND: ClassVar[int] = 255
    code: str


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmupInstruction(Instruction):
    """Round-0 adapter and config to every site. `vector` is the full adapter (LoRA: A and B), `manifest` its JSON.

    The config names the prompt template; `prompt_digest` binds what it says.
    """

    KIND: ClassVar[int] = 1
    ROUTE: ClassVar[str] = "query.warmup"
    manifest: str
    dictionary_digest: str
    prompt_digest: str
    vector: Float32


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmupReply(Reply):
    """The model and dictionary digests that the site computed itself."""

    KIND: ClassVar[int] = 2
    model_digest: str
    dictionary_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class CountInstruction(Instruction):
    """Asks for counts over the dictionary's bins (common/schema.py) of training patients."""

    KIND: ClassVar[int] = 3
    ROUTE: ClassVar[str] = "query.count"
    attempt: int
    dictionary_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class KeysReply(Reply):
    """The work is done and its result is kept at the site; the site's keys for adding it up (secure-sums.md §S5).

    `advert` is empty where a simulation adds up in the clear, on its own machine, without a message.
    """

    KIND: ClassVar[int] = 4
    advert: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class SchemaInstruction(Instruction):
    """Publishes the one schema that all sites ask questions from."""

    KIND: ClassVar[int] = 5
    ROUTE: ClassVar[str] = "query.schema"
    schema: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SchemaReply(Reply):
    """The digest of the schema that the site stored."""

    KIND: ClassVar[int] = 6
    schema_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainInstruction(Instruction):
    """One local GRPO round from the global adapter. `vector` holds its trainable part."""

    KIND: ClassVar[int] = 7
    ROUTE: ClassVar[str] = "train.local"
    attempt: int
    schema_digest: str
    vector: Float32


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidateInstruction(Instruction):
    """Scores the global adapter on validation patients, the same questions every round."""

    KIND: ClassVar[int] = 11
    ROUTE: ClassVar[str] = "evaluate.validate"
    attempt: int
    schema_digest: str
    vector: Float32


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluateInstruction(Instruction):
    """Scores base, warmed-up and final model once on test patients. Full vectors; `model_digest` is the final one's."""

    KIND: ClassVar[int] = 13
    ROUTE: ClassVar[str] = "evaluate.test"
    attempt: int
    schema_digest: str
    warmup_digest: str
    warmup: Float32
    final: Float32


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluateReply(Reply):
    """As `KeysReply`; `samples` is JSON, and "[]" unless registry and policy are open."""

    KIND: ClassVar[int] = 14
    samples: str
    advert: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalizeInstruction(Instruction):
    """The final adapter, full, back to every site."""

    KIND: ClassVar[int] = 15
    ROUTE: ClassVar[str] = "query.finalize"
    manifest: str
    vector: Float32


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalizeReply(Reply):
    """The digest of the final adapter that the site computed, verified and stored."""

    KIND: ClassVar[int] = 16
    model_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SumInstruction(Instruction):
    """One exchange of one attempt of a secure sum; `purpose` is a number of secure-sums.md §S1."""

    purpose: int
    attempt: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SharesInstruction(SumInstruction):
    """Everybody's keys (§S6)."""

    KIND: ClassVar[int] = 17
    ROUTE: ClassVar[str] = "query.shares"
    threshold: int
    key_list: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class SharesReply(Reply):
    """Sealed shares, for each other member one (§S6)."""

    KIND: ClassVar[int] = 18
    ciphertexts: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskInstruction(SumInstruction):
    """Whose shares arrived, and what they sealed for this site (§S7)."""

    KIND: ClassVar[int] = 19
    ROUTE: ClassVar[str] = "query.mask"
    recipients: Uint8
    ciphertexts: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedReply(Reply):
    """The site's vector under its masks (§S7): uniform by itself."""

    KIND: ClassVar[int] = 20
    masked: Uint32


@dataclass(frozen=True, kw_only=True, eq=False)
class SurvivorsInstruction(SumInstruction):
    """Whose vectors are in the sum (§S8)."""

    KIND: ClassVar[int] = 21
    ROUTE: ClassVar[str] = "query.survivors"
    survivors: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class SurvivorsReply(Reply):
    """The site's signature over them (§S8)."""

    KIND: ClassVar[int] = 22
    signature: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class UnmaskInstruction(SumInstruction):
    """The survivors' signatures (§S9)."""

    KIND: ClassVar[int] = 23
    ROUTE: ClassVar[str] = "query.unmask"
    signers: Uint8
    signatures: Uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class UnmaskReply(Reply):
    """One share for each recipient (§S9)."""

    KIND: ClassVar[int] = 24
    answer: Uint8


INSTRUCTIONS: tuple[type[Instruction], ...] = (
    WarmupInstruction,
    CountInstruction,
    SchemaInstruction,
    TrainInstruction,
    ValidateInstruction,
    EvaluateInstruction,
    FinalizeInstruction,
    SharesInstruction,
    MaskInstruction,
    SurvivorsInstruction,
    UnmaskInstruction,
)
REPLIES: tuple[type[Reply], ...] = (
    WarmupReply,
    KeysReply,
    SchemaReply,
    EvaluateReply,
    FinalizeReply,
    SharesReply,
    MaskedReply,
    SurvivorsReply,
    UnmaskReply,
    Failure,
)
_KINDS: dict[int, type[WireMessage]] = {kind.KIND: kind for kind in (*INSTRUCTIONS, *REPLIES)}


def _layout(kind: type[WireMessage]) -> tuple[dict[str, type], dict[str, str]]:
    """Scalar fields with their types, vector fields with their dtypes, both in declaration order."""
    hints = get_type_hints(kind, include_extras=True)
    scalars: dict[str, type] = {}
    vectors: dict[str, str] = {}
    for item in fields(kind):
        if extras := get_args(hints[item.name])[1:]:
            vectors[item.name] = str(extras[0])
        else:
            scalars[item.name] = hints[item.name]
    return scalars, vectors


_LAYOUTS = {number: _layout(kind) for number, kind in _KINDS.items()}

Expected = TypeVar("Expected", bound=WireMessage)


def dtypes_of(kind: type[WireMessage]) -> dict[str, np.dtype[Any]]:
    """Names and dtypes of a kind's vectors, in order.

    >>> dtypes_of(MaskedReply)
    {'masked': dtype('uint32')}
    """
    return {name: np.dtype(dtype) for name, dtype in _LAYOUTS[kind.KIND][1].items()}


def kind_of(head: bytes) -> type[WireMessage]:
    """What a well-formed head is the head of."""
    return _KINDS[_PREFIX.unpack_from(head)[2]]


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode("ascii")


def _check_scalar(kind: str, name: str, value: object, expected: type) -> None:
    if type(value) is not expected:
        raise ProtocolError(f"{kind}.{name}: expected {expected.__name__}, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ProtocolError(f"{kind}.{name}: expected a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ProtocolError(f"{kind}.{name}: expected a 64-bit integer, got {value.bit_length()} bits")


Packed = dict[int, tuple[bytes, str]]  # by the array's id: its raw bytes and their SHA-256


def split(message: WireMessage, packed: Packed | None = None) -> tuple[bytes, dict[str, bytes]]:
    """A message as its head and its raw vectors, in field order.

    Args:
        message: any kind.
        packed: vectors that several messages share are copied and hashed once; used only while all of these messages
            are alive.

    Raises:
        ProtocolError: a field has the wrong type, or a vector the wrong dtype or more than one dimension.
    """
    kind = type(message)
    if _KINDS.get(kind.KIND) is not kind:
        raise ProtocolError(f"expected a message kind of protocol version {PROTOCOL_VERSION}, got {kind.__name__}")
    types, dtypes = _LAYOUTS[kind.KIND]
    scalars: dict[str, Any] = {}
    for name, expected in types.items():
        scalars[name] = getattr(message, name)
        _check_scalar(kind.__name__, name, scalars[name], expected)
    vectors: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for name, dtype in dtypes.items():
        array = cast("NDArray[Any]", getattr(message, name))
        if array.dtype != np.dtype(dtype) or array.ndim != 1:
            raise ProtocolError(f"{kind.__name__}.{name}: expected 1-D {dtype}, got {array.ndim}-D {array.dtype.str}")
        raw, digest = (packed or {}).get(id(array), (b"", ""))
        if not digest:
            raw = array.astype(dtype, copy=False).tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            if packed is not None:
                packed[id(array)] = raw, digest
        vectors[name] = raw
        described[name] = {"count": int(array.size), "sha256": digest}
    header = _canonical({"fields": scalars, "vectors": described})
    return _PREFIX.pack(MAGIC, PROTOCOL_VERSION, kind.KIND, len(header)) + header, vectors


def encode(message: WireMessage) -> bytes:
    """A message as one run of bytes: its head, then its vectors in field order."""
    head, vectors = split(message)
    return b"".join([head, *vectors.values()])


def _object(value: object, names: Collection[str], where: str) -> dict[str, Any]:
    """A JSON object with exactly these keys."""
    if not isinstance(value, dict) or set(cast("dict[str, Any]", value)) != set(names):
        raise ProtocolError(f"{where}: expected an object of {sorted(names)}")
    return cast("dict[str, Any]", value)


def _read_head(data: bytes | memoryview) -> tuple[type[WireMessage], dict[str, Any], dict[str, tuple[int, str]], int]:
    """Kind, scalar fields, (count, SHA-256) of each vector, and length of a head; `data` may go on after it."""
    if len(data) < _PREFIX.size:
        raise ProtocolError(f"head: expected at least {_PREFIX.size} bytes, got {len(data)}")
    magic, version, number, size = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"head: expected magic {MAGIC!r}, got {bytes(magic)!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"head: expected protocol version {PROTOCOL_VERSION}, got {version}")
    kind = _KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"head: expected a known message kind, got {number}")
    end = _PREFIX.size + size
    if size > MAX_HEADER_BYTES or end > len(data):
        raise ProtocolError(f"head: expected a header of at most {len(data) - _PREFIX.size} bytes, got {size}")
    raw = bytes(data[_PREFIX.size : end])
    try:
        header = json.loads(raw)
        again = _canonical(header)
    except (ValueError, TypeError, RecursionError):
        raise ProtocolError(f"{kind.__name__}: expected a canonical JSON header, got {size} other bytes") from None
    if again != raw:
        raise ProtocolError(f"{kind.__name__}: expected a canonical header, got the same data in other bytes")
    types, dtypes = _LAYOUTS[number]
    parts = _object(header, ("fields", "vectors"), f"{kind.__name__}")
    scalars = _object(parts["fields"], types, f"{kind.__name__} fields")
    vectors = _object(parts["vectors"], dtypes, f"{kind.__name__} vectors")
    for name, expected in types.items():
        _check_scalar(kind.__name__, name, scalars[name], expected)
    counts: dict[str, tuple[int, str]] = {}
    for name in dtypes:
        about = _object(vectors[name], ("count", "sha256"), f"{kind.__name__}.{name}")
        count, digest = about["count"], about["sha256"]
        if type(count) is not int or not 0 <= count <= MAX_VECTOR_VALUES or type(digest) is not str:
            raise ProtocolError(f"{kind.__name__}.{name}: expected a count of 0 to {MAX_VECTOR_VALUES} and a SHA-256")
        counts[name] = (count, digest)
    return kind, scalars, counts, end


def join(head: bytes, vectors: Mapping[str, bytes | memoryview], expected: type[Expected]) -> Expected:
    """A message from its head and its raw vectors; the inverse of `split`. Vectors are read-only views, not copies.

    Raises:
        ProtocolError: another kind, version or field; a vector of another name, length or SHA-256.
    """
    kind, scalars, described, end = _read_head(head)
    if end != len(head):
        raise ProtocolError(f"head: expected {end} bytes, got {len(head)}")
    if not issubclass(kind, expected):
        raise ProtocolError(f"expected {expected.__name__}, got {kind.__name__}")
    if set(vectors) != set(described):
        raise ProtocolError(f"{kind.__name__}: expected vectors {sorted(described)}, got {sorted(vectors)}")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in _LAYOUTS[kind.KIND][1].items():
        size = described[name][0] * np.dtype(dtype).itemsize
        if len(vectors[name]) != size:
            raise ProtocolError(f"{kind.__name__}.{name}: expected {size} bytes, got {len(vectors[name])}")
        if hashlib.sha256(vectors[name]).hexdigest() != described[name][1]:
            raise ProtocolError(f"{kind.__name__}.{name}: the vector's SHA-256 is not the one in the head")
        arrays[name] = np.frombuffer(vectors[name], dtype=dtype)
    return kind(**scalars, **arrays)


def decode(data: bytes, expected: type[Expected]) -> Expected:
    """A message from one run of bytes; the inverse of `encode`.

    Raises:
        ProtocolError: as `join`; or bytes are missing or left over.
    """
    view = memoryview(data)
    kind, _, described, end = _read_head(view)
    head, start = bytes(view[:end]), end
    vectors: dict[str, bytes | memoryview] = {}
    for name, dtype in _LAYOUTS[kind.KIND][1].items():
        stop = start + described[name][0] * np.dtype(dtype).itemsize
        vectors[name] = view[start:stop]
        start = stop
    if start != len(data):
        raise ProtocolError(f"{kind.__name__}: expected {start} bytes, got {len(data)}")
    return join(head, vectors, expected)
