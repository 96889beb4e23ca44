"""The exception tree, re-exported as `k2lite.errors`.

K2LiteError                 anything the user can act on: one line, exit code 2
├── ConfigError             config.json: a key or value k2lite does not support
├── CheckpointError         a weight file or tensor that is not as it must be
├── TokenizerError          tokenizer or chat template: missing, malformed, unsupported
├── ContextLengthError      more tokens asked for than the context holds
├── MemoryPlanError         what must be in memory does not fit
├── BackendError            a backend that is unknown or not ready
│   ├── DeviceMemoryError   an accelerator's memory ran out in mid-run: this request fails, others go on
│   └── DeviceLostError     an accelerator is gone until the process starts anew
└── RequestError            an argument out of range

A message names where (file, tensor, key), what was expected, what was found, and what to do.
"""


class K2LiteError(Exception):
    """Something the user can act on. Its text is complete: no traceback is needed to understand it."""


class ConfigError(K2LiteError):
    """config.json holds a key or a value that k2lite does not support."""


class CheckpointError(K2LiteError):
    """A weight file or a tensor is missing, malformed, misplaced or of another shape than the config says."""


class TokenizerError(K2LiteError):
    """The tokenizer or chat template is missing, malformed or of an unsupported kind."""


class ContextLengthError(K2LiteError):
    """A request needs more tokens than the context holds; raised before any work is done."""


class MemoryPlanError(K2LiteError):
    """What must be in memory does not fit; the message shows the sum."""


class BackendError(K2LiteError):
    """A backend is unknown, not ready, or can't take what the plan gives it."""


class DeviceMemoryError(BackendError):
    """An accelerator has no memory left for what was asked of it just now. What ran before goes on."""


class DeviceLostError(BackendError):
    """An accelerator failed or was lost; nothing runs on it until the process starts anew."""


class RequestError(K2LiteError):
    """An argument of a request is out of range or contradicts another."""
