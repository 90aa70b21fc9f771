"""The storage host: upload addresses and tokens. Knows fal's two protocols and grants; receives no bytes itself."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request

from kontextd_server.api.documented import JSON_ERRORS
from kontextd_server.api.parts import Api
from kontextd_server.files import Grant, Label
from kontextd_server.wire import auth
from kontextd_server.wire.answers import CdnToken, InitiateUpload, TokenRequest, UploadGrant
from kontextd_server.wire.openapi import body_of, takes
from kontextd_server.wire.request_options import upload_expiration
from kontextd_server.wire.statuses import iso_time
from kontextd_server.wire.virtual_hosts import context_of

GRANTS_PATH = "/files/grants"


class StorageRoutes:
    """Handlers of the storage host."""

    def __init__(self, api: Api) -> None:
        self._api = api
        small = api.config.limits.small_body
        self._upload, self._wanted = body_of(InitiateUpload, small), body_of(TokenRequest, small)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/rest", tags=["storage"], responses=JSON_ERRORS)
        takes_upload = takes(InitiateUpload)
        router.post("/storage/upload/initiate", openapi_extra=takes_upload)(self.initiate)
        router.post("/storage/upload/initiate-multipart", openapi_extra=takes_upload)(self.initiate_multipart)
        router.post("/storage/auth/token")(self.files_token)
        router.post("/tokens/", openapi_extra=takes(TokenRequest))(self.token)
        router.post("/tokens", include_in_schema=False)(self.token)
        return router

    async def initiate(self, request: Request) -> UploadGrant:
        return await self._granted(request, in_parts=False)

    async def initiate_multipart(self, request: Request) -> UploadGrant:
        return await self._granted(request, in_parts=True)

    async def files_token(self, request: Request) -> CdnToken:
        caller = await self._api.gate.caller(request)
        expires_at = int(time.time() + self._api.config.files_token_s)
        return CdnToken(
            token=auth.files_token(self._api.parts.tokens, caller, expires_at),
            token_type=auth.TOKEN_TYPE,
            base_url=context_of(request).bases.files,
            expires_at=iso_time(expires_at),
        )

    async def token(self, request: Request) -> str:
        caller = await self._api.gate.caller(request)
        asked = await self._wanted(request)
        expires_at = int(time.time()) + asked.token_expiration
        return auth.infer_token(self._api.parts.tokens, caller, asked.allowed_apps, expires_at)

    async def _granted(self, request: Request, *, in_parts: bool) -> UploadGrant:
        """An address to upload to, good for one file and some hours, for whoever holds it."""
        owner = (await self._api.gate.caller(request)).owner
        asked = await self._upload(request)
        label = Label(asked.file_name or "upload.bin", asked.content_type, upload_expiration(request.headers), owner)
        files, config = self._api.files, self._api.config
        key = files.new_key(label.file_name)
        upload_id = await self._api.off_loop.file(files.begin_upload, label, key) if in_parts else None
        grant = self._api.parts.grants.issue(Grant(key, label, time.time() + config.grant_s, upload_id))
        bases = context_of(request).bases
        return UploadGrant(upload_url=f"{bases.files}{GRANTS_PATH}/{grant}", file_url=bases.file_url(key))
