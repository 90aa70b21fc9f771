"""The exception tree of fetching. Knows no HTTP status of ours: the server maps each class to fal's vocabulary.

    FetchError                   fal: file_download_error, unless said otherwise
    ├── InvalidReference         no URL, data URI, hub id or file of ours; or a URL that nobody should follow
    │   └── UnknownRoot          a path in a LoRA root that this server does not have
    ├── InvalidDataUri           a `data:` URI that does not decode
    ├── AddressDenied            the operator's rules do not let the server connect there
    ├── NotMirrored              this box does not fetch it, and the mirror does not hold it
    ├── NotInRoot                a LoRA root holds no such file
    ├── RootUnavailable          a LoRA root whose folder is not there now
    ├── NoHubFile                a repository of the hub that does not say which file is meant
    ├── OwnFileGone              a file of ours that was deleted or has expired
    ├── DownloadFailed           the other side: no name, no connection, no certificate, an error, half a file
    │   └── DownloadTimedOut     it did not answer or not come to an end in time
    ├── InputTooLarge            fal: file_too_large
    └── NotWeights               a LoRA's URL gave something else, such as a web page

What is delivered as an image but is none is told by the engine's own errors, `ImageLoadError` and
`UnsupportedImageFormat`: its intake decides, and fetching asks it early. Every message names the address and the
remedy; none shows a password, and none but `NotMirrored` a query, which often holds a signature.
"""

from __future__ import annotations

from kontextd_models.errors import KontextdError


class FetchError(KontextdError):
    """An input could not be had."""


class InvalidReference(FetchError):
    """What was given names nothing that can be fetched."""


class InvalidDataUri(FetchError):
    """A `data:` URI that does not decode."""


class AddressDenied(FetchError):
    """The rules of this purpose deny the address; `setting` is the one that could allow it, None where none can."""

    def __init__(self, message: str, *, setting: str | None) -> None:
        super().__init__(message)
        self.setting = setting


class UnknownRoot(InvalidReference):
    """A path in a LoRA root that this server does not have."""


class NotInRoot(FetchError):
    """A LoRA root holds no such file, or none that may be read."""


class RootUnavailable(FetchError):
    """The folder of a LoRA root is not there now, as of a share that is not mounted."""


class NotMirrored(FetchError):
    """A box that fetches nothing, or no hub ids, was asked for one that its mirror does not hold."""


class NoHubFile(FetchError):
    """A repository of the hub holds no weights, or several files of them."""


class OwnFileGone(FetchError):
    """A file of this server that is not there any more."""


class DownloadFailed(FetchError):
    """The other side failed; where it is `transient`, trying again may help."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class DownloadTimedOut(DownloadFailed):
    """The other side took longer than it may."""


class InputTooLarge(FetchError):
    """More bytes than an input of this purpose may have."""


class NotWeights(FetchError):
    """The bytes that a LoRA's address gave are no safetensors file."""
