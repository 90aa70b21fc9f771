"""The exception tree of the engine. Knows no HTTP: the server maps each class to a status in one table.

    KontextdError
    ├── InputError                the caller can mend it
    │   ├── InvalidValue          a parameter is outside its range or set
    │   ├── ImageLoadError        bytes that are no image, or a truncated one
    │   ├── UnsupportedImageFormat
    │   ├── ImageTooLarge
    │   ├── ImageTooSmall
    │   ├── AspectRatioOutOfRange
    │   ├── ContentPolicyViolation  the input image was flagged by a safety checker
    │   ├── FeatureNotSupported   a valid request that this model or version cannot serve
    │   └── LoraError             a LoRA cannot be used; the base model is as it was
    │       ├── LoraFileError     no sound safetensors file, or one with values or sizes that no LoRA has
    │       └── LoraMismatch      made for another architecture, or for another size of this one
    ├── ModelError                the model folder is missing a part, truncated, or of another architecture
    └── EngineError               nothing the caller did
        ├── EngineBusy            a second caller while an edit runs
        ├── OutOfMemory           the device ran out of memory; the engine goes on working
        └── SafetyCheckFailed     a safety checker could not run; the edit fails closed

Every message names the value and the remedy.
"""


class KontextdError(Exception):
    """Base of all errors raised on purpose by the engine."""


class InputError(KontextdError):
    """The request is wrong; sending it again unchanged cannot succeed.

    `field` is the name of the `EditRequest` field at fault.
    """

    def __init__(self, message: str, *, field: str = "image") -> None:
        super().__init__(message)
        self.field = field


class InvalidValue(InputError):
    """A parameter lies outside its range or set of values."""


class ImageLoadError(InputError):
    """The bytes are not an image, or break off in the middle."""


class UnsupportedImageFormat(InputError):
    """An image of a format that is not accepted."""


class ImageTooLarge(InputError):
    """A side, or the memory the image would need, is over the limit."""


class ImageTooSmall(InputError):
    """A side is under the limit."""


class AspectRatioOutOfRange(InputError):
    """The image is longer and narrower than the model's limit."""


class ContentPolicyViolation(InputError):
    """The input image was flagged by a safety checker (fal's type: `content_policy_violation`)."""


class FeatureNotSupported(InputError):
    """The value is a valid one that this model or this version cannot serve."""


class LoraError(InputError):
    """A LoRA cannot be used. `index` is its place in the request, once that is known."""

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message, field="loras")
        self.index = index


class LoraFileError(LoraError):
    """The file is no sound safetensors file, or holds values, sizes or forms that cannot be merged."""


class LoraMismatch(LoraError):
    """The file was made for another architecture, or for a model of another size."""


class ModelError(KontextdError):
    """The model folder cannot be used; the message names the file."""


class EngineError(KontextdError):
    """The engine failed; the request may be right."""


class EngineBusy(EngineError):
    """A second edit was started while one runs: an engine is used by one thread, one edit at a time."""


class OutOfMemory(EngineError):
    """The device ran out of memory; everything of this edit was freed and the engine works on."""


class SafetyCheckFailed(EngineError):
    """A safety checker could not run, so no image is handed out."""
