"""The site's Flower app: each handler takes a message apart, calls client/gate.py, puts the reply together.

Run by the site under Flower's SuperNode, or by simulations/federation.py in one process. Enters and leaves: an
instruction's and a reply's head as bytes in a ConfigRecord, its vectors as Arrays of raw little-endian bytes (Flower
cuts Arrays into pieces, bytes in a ConfigRecord not). Private: nothing is kept here. `node_config["site"]` is the path
of site.toml. This module imports no torch; only the phases that run the model do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from ..common.errors import WardroundError
from ..common.messages import (
    HEAD_RECORD,
    VECTOR_RECORD,
    CountInstruction,
    EvaluateInstruction,
    FinalizeInstruction,
    Instruction,
    MaskInstruction,
    SchemaInstruction,
    SharesInstruction,
    SurvivorsInstruction,
    TrainInstruction,
    UnmaskInstruction,
    ValidateInstruction,
    WarmupInstruction,
    dtypes_of,
    kind_of,
)
from .gate import respond

STYPE = "wardround.raw"  # raw little-endian values; neither numpy's nor torch's serialisation

app = ClientApp()


def unpack(content: RecordDict) -> tuple[bytes, dict[str, bytes]]:
    """Head and vectors of a Flower message; what is missing or odd is left for `messages.join` to refuse."""
    config = content.config_records.get(HEAD_RECORD, {})
    head = config.get("head", b"")
    arrays = content.array_records.get(VECTOR_RECORD, {})
    return head if isinstance(head, bytes) else b"", {name: array.data for name, array in arrays.items()}


def pack(head: bytes, vectors: Mapping[str, bytes]) -> RecordDict:
    """A Flower message's content from head and vectors."""
    arrays = {
        name: Array(dtype=str(dtype), shape=(len(vectors[name]) // dtype.itemsize,), stype=STYPE, data=vectors[name])
        for name, dtype in dtypes_of(kind_of(head)).items()
    }
    return RecordDict({HEAD_RECORD: ConfigRecord({"head": head}), VECTOR_RECORD: ArrayRecord(arrays)})


def _answer(message: Message, context: Context, kind: type[Instruction]) -> Message:
    try:
        head, vectors = respond(Path(str(context.node_config["site"])), kind, *unpack(message.content))
    except (OSError, WardroundError):
        # Site folder or ledger unusable: nothing that depends on anything may leave, only that fact.
        return Message(Error(code=0, reason="site"), reply_to=message)
    return Message(pack(head, vectors), reply_to=message)


@app.query("warmup")
def warmup(message: Message, context: Context) -> Message:
    """Round-0 adapter."""
    return _answer(message, context, WarmupInstruction)


@app.query("count")
def count(message: Message, context: Context) -> Message:
    """Counts for the question schema."""
    return _answer(message, context, CountInstruction)


@app.query("schema")
def schema(message: Message, context: Context) -> Message:
    """The published question schema."""
    return _answer(message, context, SchemaInstruction)


@app.train("local")
def train(message: Message, context: Context) -> Message:
    """One local GRPO round."""
    return _answer(message, context, TrainInstruction)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Everybody's keys for a secure sum."""
    return _answer(message, context, SharesInstruction)


@app.query("mask")
def mask(message: Message, context: Context) -> Message:
    """Sealed shares; asks for the masked vector."""
    return _answer(message, context, MaskInstruction)


@app.query("survivors")
def survivors(message: Message, context: Context) -> Message:
    """Who is in the sum."""
    return _answer(message, context, SurvivorsInstruction)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Everybody's agreement to who is in the sum."""
    return _answer(message, context, UnmaskInstruction)


@app.evaluate("validate")
def validate(message: Message, context: Context) -> Message:
    """The global model on validation patients."""
    return _answer(message, context, ValidateInstruction)


@app.evaluate("test")
def evaluate(message: Message, context: Context) -> Message:
    """Base, warmed-up and final model on test patients."""
    return _answer(message, context, EvaluateInstruction)


@app.query("finalize")
def finalize(message: Message, context: Context) -> Message:
    """The final adapter, back to the site."""
    return _answer(message, context, FinalizeInstruction)
