"""The errors of wardround: one small tree.

    WardroundError
    ├── UserError                a person's mistake: one clear line, exit code 2
    │   ├── ConfigError          run, site or coordinator configuration
    │   ├── DictionaryError      data dictionary
    │   ├── RegistryError        table: names file, row, column
    │   ├── ModelError           base model or adapter that cannot be used
    │   └── RunFolderError       run folder: another run's, changed config, no disk
    ├── ProtocolError            a wire message that is not what the protocol says
    ├── RefusedError             this site's policy says no
    ├── VerificationError        a digest, signature or round trip does not match
    ├── LedgerBehindError        the coordinator holds a receipt for a reply that this site's ledger does not show
    └── SumError                 a secure sum that must not go on; `code` is the check that failed

What leaves a site in place of an exception is `code`, an enumerated word, never the text: texts may hold what a
patient's row held, and Flower sends `str(exception)` to the coordinator.
"""


class WardroundError(Exception):
    """Base of all; `code` is the only part that may leave a site."""

    code = "failure"
    exit_code = 1


class UserError(WardroundError):
    """A person's mistake. The message is one line: what was expected, what came, where, what to do."""

    code = "user"
    exit_code = 2


class ConfigError(UserError):
    """A configuration key is unknown, missing or out of range."""

    code = "config"


class DictionaryError(UserError):
    """The data dictionary is malformed or contradicts itself."""

    code = "dictionary"


class RegistryError(UserError):
    """The table is missing, malformed, or does not fit its dictionary."""

    code = "registry"


class ModelError(UserError):
    """A model or adapter is missing, has no chat template, or does not fit."""

    code = "model"


class RunFolderError(UserError):
    """The run folder holds another run, a run whose config differs, or there is not enough disk."""

    code = "run-folder"


class ProtocolError(WardroundError):
    """A wire message is malformed, of another protocol version, or out of turn."""

    code = "protocol"


class RefusedError(WardroundError):
    """The site's own policy refuses the request; nothing was computed or sent."""

    code = "refused"


class VerificationError(WardroundError):
    """A digest, signature or round trip does not match what was promised."""

    code = "verification"


class LedgerBehindError(WardroundError):
    """The site's ledger does not show a reply that the coordinator received: it was cut, or an old copy is there."""

    code = "ledger-behind"


class SumError(WardroundError):
    """A check of a secure sum failed (docs/secure-sums.md); nothing was released.

    Attributes:
        code: the failure word of the specification's tables, one of `WORDS`.
    """

    WORDS = frozenset(
        {
            "malformed",
            "unknown-member",
            "signature",
            "other-roster",
            "other-config",
            "other-model",
            "other-input",
            "other-sum",
            "own-keys",
            "repeated-key",
            "threshold",
            "share",
            "survivors",
            "difference",
            "out-of-turn",
            "restored",
        }
    )

    def __init__(self, code: str, text: str) -> None:
        if code not in self.WORDS:
            raise ValueError(f"'{code}': not a failure word of docs/secure-sums.md")
        super().__init__(f"{code}: {text}")
        self.code = code
