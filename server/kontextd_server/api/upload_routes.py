"""Uploads at the files host: by grant, whole, and in parts. Knows addresses and labels; keeps nothing itself."""

from __future__ import annotations

from urllib.parse import unquote

from fastapi import APIRouter
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kontextd_server.api.documented import UPLOAD
from kontextd_server.api.parts import Api
from kontextd_server.api.receiving import receive
from kontextd_server.files import Grant, Label, Part
from kontextd_server.files.errors import InvalidGrant
from kontextd_server.files.names import UNKNOWN_TYPE
from kontextd_server.wire.answers import CdnFile, CdnMultipart, CompleteUpload
from kontextd_server.wire.openapi import body_of, takes
from kontextd_server.wire.request_options import upload_expiration
from kontextd_server.wire.virtual_hosts import context_of


class PartNumbers(Convertor[int]):
    """What stands in a path as a part's number, so that `…/complete` is none; the file store knows the limit."""

    regex = "[0-9]{1,9}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


class UploadRoutes:
    """Handlers of the files host that take bytes. A grant is its own leave; all else needs a key or a token."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._listed = body_of(CompleteUpload, api.config.limits.small_body)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/files", tags=["files"], responses=UPLOAD)
        register_url_convertor("part", PartNumbers())
        complete_body = takes(CompleteUpload)
        router.put("/grants/{grant}")(self.put_granted)
        router.put("/grants/{grant}/{number:part}")(self.put_granted_part)
        router.post("/grants/{grant}/complete", openapi_extra=complete_body)(self.complete_granted)
        router.post("/upload", response_model=CdnFile)(self.upload)
        router.post("/upload/multipart", response_model=CdnMultipart)(self.begin)
        router.put("/{key}/multipart/{upload_id}/{number:part}")(self.put_part)
        router.post("/{key}/multipart/{upload_id}/complete", openapi_extra=complete_body)(self.complete)
        return router

    async def put_granted(self, request: Request, grant: str) -> Response:
        granted = self._grant(grant)
        if granted.upload_id is not None:
            raise InvalidGrant("the upload address is for an upload in parts. Append /1, /2 and so on.")
        stored = await receive(request, self._api.off_loop, lambda: self._api.files.create(granted.label, granted.key))
        return JSONResponse({}, headers={"ETag": f'"{stored.sha256}"'})

    async def put_granted_part(self, request: Request, grant: str, number: int) -> Response:
        return await self._put_part(request, self._upload_id(self._grant(grant)), number)

    async def upload(self, request: Request) -> Response:
        label = _label(request, (await self._api.gate.caller(request)).owner)
        stored = await receive(request, self._api.off_loop, lambda: self._api.files.create(label))
        return JSONResponse({"access_url": context_of(request).bases.file_url(stored.key)})

    async def begin(self, request: Request) -> Response:
        label = _label(request, (await self._api.gate.caller(request)).owner)
        key = self._api.files.new_key(label.file_name)
        upload_id = await self._api.off_loop.file(self._api.files.begin_upload, label, key)
        return JSONResponse({"access_url": context_of(request).bases.file_url(key), "uploadId": upload_id})

    async def put_part(self, request: Request, key: str, upload_id: str, number: int) -> Response:
        await self._api.gate.caller(request)
        return await self._put_part(request, upload_id, number)

    async def complete_granted(self, request: Request, grant: str) -> Response:
        return await self._complete(request, self._upload_id(self._grant(grant)), {})

    async def complete(self, request: Request, key: str, upload_id: str) -> Response:
        await self._api.gate.caller(request)
        return await self._complete(request, upload_id, {"access_url": context_of(request).bases.file_url(key)})

    async def _put_part(self, request: Request, upload_id: str, number: int) -> Response:
        """The ETag without quotes: the clients send it back as they got it."""
        part = await receive(request, self._api.off_loop, lambda: self._api.files.write_part(upload_id, number))
        return JSONResponse({"partNumber": part.number, "etag": part.etag}, headers={"ETag": part.etag})

    async def _complete(self, request: Request, upload_id: str, told: dict[str, str]) -> Response:
        listed = await self._listed(request)
        parts = [Part(part.part_number, part.etag.strip('"')) for part in listed.parts]
        await self._api.off_loop.file(self._api.files.complete_upload, upload_id, parts)
        return JSONResponse(told)

    def _grant(self, token: str) -> Grant:
        return self._api.parts.grants.check(token)

    def _upload_id(self, granted: Grant) -> str:
        if granted.upload_id is None:
            raise InvalidGrant("the upload address is for a whole file. Send it there in one request.")
        return granted.upload_id


def _label(request: Request, owner: str) -> Label:
    """What the clients say in headers; Python's quotes names that are no ASCII."""
    name = unquote(request.headers.get("x-fal-file-name", "")) or "upload.bin"
    return Label(name, request.headers.get("content-type", UNKNOWN_TYPE), upload_expiration(request.headers), owner)
