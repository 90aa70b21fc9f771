"""HTTP requests under the rules of a purpose. Knows HTTP, TLS and proxies; knows nothing of files or what is fetched.

One request, one connection: nothing is reused, so nothing is reused for the wrong host. No cookies, no credentials, no
proxy and no certificates from the environment of the request; what httpcore2 does not do by itself is not done.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import httpcore2

from kontextd_server.fetch.addresses import Address, Purpose, check_address, check_name, check_through_proxy
from kontextd_server.fetch.errors import DownloadFailed, DownloadTimedOut, NotMirrored
from kontextd_server.fetch.network import CheckedNetwork, Deadline, Resolver, resolve, system_resolver
from kontextd_server.fetch.rules import FetchConfig, Proxy, PurposeRules
from kontextd_server.fetch.urls import Target, follow

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

CREDENTIAL = "Authorization"

Headers = Mapping[str, str]


class Answer:
    """The head of a response, and its body as it comes."""

    def __init__(self, target: Target, response: httpcore2.Response) -> None:
        self.target = target
        self.response = response
        self.status = response.status
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1").strip() for name, value in response.headers
        }

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    def chunks(self) -> Iterator[bytes]:
        yield from self.response.iter_stream()


class Web:
    """Makes requests for purposes, each by its own rules."""

    def __init__(self, config: FetchConfig, resolver: Resolver = system_resolver) -> None:
        self.config = config
        self.resolver = resolver

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Read at the first https request: hundreds of certificates take longer than many a download."""
        context = httpcore2.default_ssl_context()
        if self.config.ca_bundle is not None:
            context.load_verify_locations(self.config.ca_bundle)
        return context

    @contextmanager
    def get(self, target: Target, purpose: Purpose, deadline: Deadline, headers: Headers) -> Iterator[Answer]:
        """GET, following redirects, each of which is checked as if it had been asked for.

        A credential among `headers` is sent to the first server alone.
        """
        rules = self.config.rules(purpose)
        for _ in range(rules.max_redirects + 1):
            with self.request("GET", target, purpose, deadline, headers) as answer:
                if answer.status not in _REDIRECTS or "location" not in answer.headers:
                    yield answer
                    return
                target = follow(answer.target, _location(answer))
                if target.origin != answer.target.origin:
                    headers = {name: value for name, value in headers.items() if name != CREDENTIAL}
        raise DownloadFailed(f"{target} is reached only after more than {rules.max_redirects} redirects.")

    @contextmanager
    def request(
        self,
        method: str,
        target: Target,
        purpose: Purpose,
        deadline: Deadline,
        headers: Headers,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """One request. Raises `AddressDenied`, `DownloadFailed` and `DownloadTimedOut`, naming the target."""
        if self.config.offline and purpose is not Purpose.WEBHOOK:  # which have no mirror, but rules: see `_admit`
            raise NotMirrored(f"{target} cannot be reached: this server is off-line.")
        rules = self.config.rules(purpose)
        timeouts = {"connect": rules.connect_s, "read": rules.idle_s, "write": rules.idle_s, "pool": rules.connect_s}
        fields = {
            "Host": target.authority,
            "User-Agent": self.config.agent,
            "Accept": "*/*",
            **headers,
        }
        with (
            _failures(target, deadline, rules),
            self._pool(target, purpose, deadline) as pool,
            pool.stream(
                method,
                _httpcore_url(target),
                headers=list(fields.items()),
                content=body,
                extensions={"timeout": timeouts},
            ) as response,
        ):
            yield Answer(target, response)

    def check(self, target: Target, purpose: Purpose, deadline: Deadline) -> None:
        """What `request` would refuse, without a request: raises the same errors."""
        rules = self.config.rules(purpose)
        if rules.proxy is not None:
            check_through_proxy(target.host, purpose, rules.allow)
            return
        check_name(target.host, purpose)
        for address in resolve(self.resolver, target.host, target.port, deadline.bounded_s(rules.connect_s)):
            self._admit(address, target.host, purpose)

    def _admit(self, address: Address, host: str, purpose: Purpose) -> None:
        check_address(address, host, purpose, self.config.rules(purpose).allow, listed_only=self.config.offline)

    def _pool(self, target: Target, purpose: Purpose, deadline: Deadline) -> httpcore2.ConnectionPool:
        rules = self.config.rules(purpose)
        tls = self.tls if target.scheme == "https" else None

        def admit(host: str, address: Address) -> None:
            self._admit(address, host, purpose)

        def admit_proxy(_: str, __: Address) -> None:
            """The operator chose the proxy himself."""

        if rules.proxy is None:
            check_name(target.host, purpose)
            network = CheckedNetwork(deadline, self.resolver, admit)
            return httpcore2.ConnectionPool(ssl_context=tls, network_backend=network)
        check_through_proxy(target.host, purpose, rules.allow)
        network = CheckedNetwork(deadline, self.resolver, admit_proxy)
        return httpcore2.ConnectionPool(ssl_context=tls, proxy=self._proxy(rules.proxy), network_backend=network)

    def _proxy(self, proxy: Proxy) -> httpcore2.Proxy:
        secured = proxy.target.scheme == "https"
        return httpcore2.Proxy(_httpcore_url(proxy.target), auth=proxy.auth, ssl_context=self.tls if secured else None)


def _httpcore_url(target: Target) -> httpcore2.URL:
    """From the parts, so that nothing parses the text again."""
    return httpcore2.URL(
        scheme=target.scheme.encode("ascii"),
        host=target.host.encode("ascii"),
        port=target.port_unless_default,
        target=target.resource.encode("ascii"),
    )


def _location(answer: Answer) -> str:
    """Sent as UTF-8 by those who do not percent-encode it."""
    raw = answer.headers["location"].encode("latin-1")
    return raw.decode("utf-8", "replace")


@contextmanager
def _failures(target: Target, deadline: Deadline, rules: PurposeRules) -> Iterator[None]:
    """Turn what httpcore2 raises into our errors."""
    try:
        yield
    except DownloadTimedOut as error:
        raise DownloadTimedOut(f"{target}: {error}", transient=error.transient) from error
    except httpcore2.TimeoutException as error:
        if deadline.left_s() <= 0.05:
            raise DownloadTimedOut(f"{target}: it took longer than the {deadline.total_s:g} s allowed.") from error
        waited_s = rules.connect_s if isinstance(error, httpcore2.ConnectTimeout) else rules.idle_s
        raise DownloadTimedOut(f"{target} did not answer for {waited_s:g} s.", transient=True) from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError) as error:
        raise DownloadFailed(f"{target} cannot be read: {_told(error)}", transient=_may_pass(error)) from error


def _told(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message}). KONTEXTD_FETCH_CA_BUNDLE can name another CA."
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}."
    return f"{str(error).rstrip('.') or type(error).__name__}."


def _may_pass(error: Exception) -> bool:
    return not isinstance(_cause(error), ssl.SSLError) and not isinstance(error, httpcore2.LocalProtocolError)


def _cause(error: Exception) -> object:
    """What httpcore2 translated: its pool raises `from None`, but the first argument is the original."""
    return error.args[0] if error.args else None
